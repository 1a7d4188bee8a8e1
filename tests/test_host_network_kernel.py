"""Bridges, taps, neighbours, routes and firewall against the kernel, in the tests' own namespaces.

A namespace belongs to one thread: each test runs in a thread that has unshared its own, which ends
with the thread and takes every interface with it. Guests are processes in namespaces of theirs.
"""

import asyncio
import ctypes
import errno
import fcntl
import functools
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface
from pathlib import Path
from typing import ParamSpec

import pytest

from oscloudd.errors import AlreadyExistsError, HostError, NotFoundError
from oscloudd.host.network import neighbours
from oscloudd.host.network.bridges import Bridge, ensure_bridge, remove_bridge
from oscloudd.host.network.counters import read_guest_traffic
from oscloudd.host.network.firewall import (
    apply_ruleset,
    find_missing_tables,
    find_ruleset_bridges,
    remove_ruleset,
)
from oscloudd.host.network.forwarding import (
    ensure_forwarding,
    ensure_forwarding6,
    find_closed_sysctl,
    has_ipv6,
)
from oscloudd.host.network.links import (
    Links,
    Tap,
    find_tap_holders,
    list_links,
    list_masters,
    list_permanent_neighbours,
    numbers_in_use,
    permanent_addresses,
)
from oscloudd.host.network.neighbours import delete_neighbour, set_neighbour
from oscloudd.host.network.routes import find_free_subnet
from oscloudd.host.network.ruleset import GuestNetwork, GuestPort
from oscloudd.host.network.taps import join_tap, open_tap

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

Given = ParamSpec("Given")
CLONE_NEWNET = 0x40000000
BRIDGE = Bridge("oscbr0", IPv4Address("192.168.0.1"), 16)
OTHER_BRIDGE = Bridge("oscbr1", IPv4Address("172.16.0.1"), 16)
NETWORKS = [
    GuestNetwork("oscbr0", IPv4Network("192.168.0.0/16")),
    GuestNetwork("oscbr1", IPv4Network("172.16.0.0/16")),
]
PORTS = [GuestPort("osctap0", "52:54:00:00:00:01", IPv4Address("192.168.0.2"))]


def in_namespace(test: Callable[Given, None]) -> Callable[Given, None]:
    @functools.wraps(test)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> None:
        failures: list[BaseException] = []

        def body() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                ip("link set lo up")
                test(*args, **kwargs)
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    return wrapper


def ip(arguments: str) -> str:
    done = subprocess.run(["ip", *arguments.split()], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def interfaces() -> dict[str, dict[str, object]]:
    return {entry["ifname"]: entry for entry in json.loads(ip("-json -details address show"))}


@in_namespace
def test_bridge_is_made_once_and_removed() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    before = ip("-4 address show oscbr0")
    assert "192.168.0.1/16" in before
    asyncio.run(ensure_bridge(BRIDGE))
    assert ip("-4 address show oscbr0") == before
    asyncio.run(remove_bridge("oscbr0"))
    assert "oscbr0" not in interfaces()
    asyncio.run(remove_bridge("oscbr0"))


@in_namespace
def test_bridge_gets_a_new_address_and_keeps_its_ports() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    tap_fd = open_tap("tap0", "oscbr0")
    asyncio.run(ensure_bridge(Bridge("oscbr0", IPv4Address("10.0.0.1"), 16)))
    shown = ip("-4 address show oscbr0")
    assert "10.0.0.1/16" in shown
    assert "192.168" not in shown
    assert interfaces()["tap0"]["master"] == "oscbr0"
    os.close(tap_fd)


@in_namespace
def test_foreign_interfaces_are_refused_and_left_alone() -> None:
    ip("link add oscbr0 type bridge")
    ip("link add oscbr1 type veth peer name other")
    ip("link set oscbr1 alias oscloud")
    for name in ("oscbr0", "oscbr1"):
        with pytest.raises(AlreadyExistsError, match="not ours"):
            asyncio.run(ensure_bridge(Bridge(name, IPv4Address("10.0.0.1"), 16)))
        with pytest.raises(AlreadyExistsError, match="not ours"):
            asyncio.run(remove_bridge(name))
    assert ip("-4 address show oscbr0") == ""
    assert {"oscbr0", "oscbr1"} <= set(interfaces())


@in_namespace
def test_bridge_has_an_address_of_each_family_at_once() -> None:
    dual = replace(BRIDGE, interface6=IPv6Interface("fd00:a::1/64"))
    for _ in range(2):
        asyncio.run(ensure_bridge(dual))
        shown = ip("-6 address show oscbr0 scope global")
        assert "fd00:a::1/64" in shown
        assert "tentative" not in shown
    # One that an earlier daemon has made had none, or another.
    asyncio.run(ensure_bridge(replace(dual, interface6=IPv6Interface("fd00:b::1/64"))))
    assert "fd00:b::1/64" in ip("-6 address show oscbr0")
    assert "fd00:a" not in ip("-6 address show oscbr0")
    asyncio.run(ensure_bridge(BRIDGE))
    assert "fd00" not in ip("-6 address show oscbr0")
    assert "192.168.0.1/16" in ip("-4 address show oscbr0")


@in_namespace
def test_a_host_that_takes_its_routes_from_advertisements_still_does_when_it_forwards() -> None:
    ip("link add uplink type veth peer name router")
    Path("/proc/sys/net/ipv6/conf/router/accept_ra").write_text("0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
    assert find_closed_sysctl() == "net.ipv4.ip_forward"
    ensure_forwarding()
    assert find_closed_sysctl() == "net.ipv6.conf.all.forwarding"
    for _ in range(2):
        ensure_forwarding6()
        assert find_closed_sysctl() is None
    names = ("uplink", "router", "default")
    settings = [Path(f"/proc/sys/net/ipv6/conf/{name}/accept_ra").read_text() for name in names]
    assert settings == ["2\n", "0\n", "2\n"]
    assert has_ipv6()
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    assert not has_ipv6()


@in_namespace
def test_bridge_keeps_its_hardware_address_as_taps_come() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    tap_fd = open_tap("tap0", "oscbr0")
    assert interfaces()["oscbr0"]["address"] == BRIDGE.mac
    os.close(tap_fd)
    assert interfaces()["oscbr0"]["address"] == BRIDGE.mac


@in_namespace
def test_tap_is_a_port_and_ends_with_its_descriptor() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    tap_fd = open_tap("tap0", "oscbr0")
    shown = interfaces()["tap0"]
    assert shown["master"] == "oscbr0"
    assert "UP" in str(shown["flags"])
    flags = fcntl.ioctl(tap_fd, 0x800454D2, bytes(40))  # TUNGETIFF
    assert int.from_bytes(flags[16:18], sys.byteorder) & 0x5002 == 0x5002
    assert not os.get_inheritable(tap_fd)
    os.close(tap_fd)
    assert "tap0" not in interfaces()


@in_namespace
def test_tap_of_no_bridge_joins_one_later() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    tap_fd = open_tap("tap0", None)
    assert "master" not in interfaces()["tap0"]
    for _ in range(2):
        join_tap("tap0", "oscbr0")
    assert interfaces()["tap0"]["master"] == "oscbr0"
    assert list_masters("tap") == {"tap0": "oscbr0"}
    ip("link add theirs type bridge")
    ip("link set tap0 master theirs")
    assert list_masters("") == {"lo": None, "oscbr0": None, "theirs": None, "tap0": "theirs"}
    join_tap("tap0", "oscbr0")
    assert list_masters("tap") == {"tap0": "oscbr0"}
    ip("link delete oscbr0")
    assert list_masters("tap") == {"tap0": None}
    with pytest.raises(NotFoundError, match="no bridge oscbr0"):
        join_tap("tap0", "oscbr0")
    asyncio.run(ensure_bridge(BRIDGE))
    os.close(tap_fd)
    with pytest.raises(HostError, match="tap0 can't join bridge oscbr0: no interface"):
        join_tap("tap0", "oscbr0")


@in_namespace
def test_tap_that_can_not_be_leaves_nothing() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    descriptors = set(os.listdir("/proc/self/fd"))
    ip("tuntap add dev tap0 mode tap")
    for taken in ("tap0", "lo"):
        with pytest.raises(AlreadyExistsError, match=f"interface {taken} already"):
            open_tap(taken, "oscbr0")
    with pytest.raises(NotFoundError, match="no bridge oscbr9"):
        open_tap("tap1", "oscbr9")
    assert set(interfaces()) == {"lo", "oscbr0", "tap0"}
    assert set(os.listdir("/proc/self/fd")) == descriptors


@in_namespace
def test_tap_is_ready_sooner_than_one_run_of_ip() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    ours, theirs, descriptors = [], [], []
    for number in range(10):
        start = time.perf_counter()
        descriptors.append(open_tap(f"tap{number}", "oscbr0"))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        ip("-V")
        theirs.append(time.perf_counter() - start)
    for descriptor in descriptors:
        os.close(descriptor)
    assert statistics.median(ours) < statistics.median(theirs)


@in_namespace
def test_what_a_guest_sends_and_receives_is_counted() -> None:
    assert read_guest_traffic("tap0") is None
    asyncio.run(ensure_bridge(BRIDGE))
    tap_fd = open_tap("tap0", BRIDGE.name)
    header = bytes(10)  # struct virtio_net_hdr: nothing to offload
    for size in (100, 200):
        os.write(tap_fd, header + bytes(size))
    traffic = read_guest_traffic("tap0")
    assert traffic is not None
    assert (traffic.tx_packets, traffic.tx_bytes) == (2, 300)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        # The kernel wakes a new tap's queue some time after its carrier is there, and drops what
        # it is to send until then.
        for _ in range(100):
            host.sendto(bytes(1000), ("192.168.255.255", 9))
            if select.select([tap_fd], [], [], 0.1)[0] and len(os.read(tap_fd, 4096)) >= 1042:
                break
        else:
            pytest.fail("100 datagrams to the network did not come to the tap")
    traffic = read_guest_traffic("tap0")
    assert traffic is not None
    assert traffic.rx_packets >= 1
    assert traffic.rx_bytes >= 1042
    os.close(tap_fd)
    assert read_guest_traffic("tap0") is None


@in_namespace
def test_neighbours_of_a_kernel_without_ipv6_are_those_it_knows() -> None:
    def refuse(*_messages: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    asyncio.run(ensure_bridge(BRIDGE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "exchange", refuse)
        set_neighbour("oscbr0", IPv6Address("fd00:a::2"), "52:54:00:00:00:01")
        delete_neighbour("oscbr0", IPv6Address("fd00:a::2"))
        with pytest.raises(HostError, match="can't be set"):
            set_neighbour("oscbr0", IPv4Address("192.168.0.2"), "52:54:00:00:00:01")
        with pytest.raises(HostError, match="can't be deleted"):
            delete_neighbour("oscbr0", IPv4Address("192.168.0.2"))


@in_namespace
def test_neighbour_is_set_replaced_and_forgotten() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    for address in (IPv4Address("192.168.0.2"), IPv6Address("fd00:a::2")):
        for mac in ("52:54:00:00:00:01", "52:54:00:00:00:02"):
            set_neighbour("oscbr0", address, mac)
            assert f"{address} lladdr {mac} PERMANENT" in ip("neighbour show dev oscbr0")
        assert asyncio.run(list_permanent_neighbours(["oscbr0"])) == [("oscbr0", address)]
        delete_neighbour("oscbr0", address)
        delete_neighbour("oscbr0", address)
        assert "52:54" not in ip("neighbour show dev oscbr0")
        delete_neighbour("oscbr9", address)
        with pytest.raises(HostError, match="can't be set: no interface"):
            set_neighbour("oscbr9", address, "52:54:00:00:00:01")


@in_namespace
def test_what_is_there_is_found() -> None:
    assert asyncio.run(list_links()) == Links((), ())
    assert asyncio.run(list_permanent_neighbours(["oscbr0"])) == []
    asyncio.run(ensure_bridge(BRIDGE))
    ip("link add foreign type bridge")
    ip("link set foreign up")
    for bridge in ("oscbr0", "foreign"):
        set_neighbour(bridge, IPv4Address("192.168.0.2"), "52:54:00:00:00:01")
    ip("neighbour add 192.168.0.3 lladdr 52:54:00:00:00:03 dev oscbr0 nud reachable")
    tap_fd = open_tap("tap0", "oscbr0")
    ip("tuntap add dev tap1 mode tap")
    ip("tuntap add dev tun0 mode tun")
    links = asyncio.run(list_links())
    assert links == Links(("oscbr0",), (Tap("tap0", False), Tap("tap1", True)))
    found = asyncio.run(list_permanent_neighbours(links.bridges))
    assert found == [("oscbr0", IPv4Address("192.168.0.2"))]
    assert permanent_addresses("oscbr0") == permanent_addresses("foreign") == {"192.168.0.2"}
    assert (numbers_in_use("tap"), numbers_in_use("t"), numbers_in_use("tun")) == (
        {0, 1},
        set(),
        {0},
    )
    with subprocess.Popen(["sleep", "1000"], pass_fds=[tap_fd]) as holder:
        os.close(tap_fd)
        try:
            held = find_tap_holders(["tap0", "tap1"])
        finally:
            holder.kill()
    assert held == {"tap0": [holder.pid], "tap1": []}


@in_namespace
def test_subnet_gives_way_to_routes_and_other_networks_but_not_to_our_own_bridge() -> None:
    wanted = IPv4Network("192.168.0.0/16")
    assert asyncio.run(find_free_subnet(wanted)) == wanted
    asyncio.run(ensure_bridge(BRIDGE))
    assert asyncio.run(find_free_subnet(wanted)) == wanted
    ip("link add uplink type bridge")
    ip("link set uplink up")
    ip("address add 192.168.7.9/24 dev uplink")
    ip("route add 172.16.5.0/24 dev uplink table 77")
    ip("route add default dev uplink")
    assert asyncio.run(find_free_subnet(wanted)) == IPv4Network("172.17.0.0/16")
    taken = [IPv4Network("172.16.0.0/12")]
    assert asyncio.run(find_free_subnet(wanted, taken)) == IPv4Network("10.0.0.0/16")
    assert asyncio.run(find_free_subnet(wanted, ignored_interfaces=["uplink"])) == wanted


@in_namespace
def test_ruleset_is_replaced_and_other_tables_are_left_alone() -> None:
    foreign = "table ip foreign { chain x { type filter hook forward priority 0; policy drop; }; }"
    subprocess.run(["nft", "-f", "-"], input=foreign, check=True, text=True)

    def listed(*what: str) -> str:
        done = subprocess.run(["nft", "list", *what], check=True, capture_output=True, text=True)
        return done.stdout

    before = listed("ruleset")
    assert asyncio.run(find_ruleset_bridges()) == set()
    assert asyncio.run(find_missing_tables()) == ["bridge oscloud", "inet oscloud"]
    asyncio.run(apply_ruleset([], []))
    assert asyncio.run(find_ruleset_bridges()) == set()
    assert asyncio.run(find_missing_tables()) == []
    asyncio.run(apply_ruleset(NETWORKS, PORTS))
    assert asyncio.run(find_ruleset_bridges()) == {"oscbr0", "oscbr1"}
    once = listed("ruleset")
    asyncio.run(apply_ruleset(NETWORKS, PORTS))
    assert listed("ruleset") == once
    assert listed("table", "ip", "foreign").strip() in once
    asyncio.run(remove_ruleset())
    asyncio.run(remove_ruleset())
    assert listed("ruleset") == before
