"""Forwarded ports against the kernel: who reaches what, and what nobody may reach by them."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from test_host_firewall import (
    GATEWAY,
    HOST_OUTSIDE,
    NETWORKS,
    ONE,
    OTHER,
    TWO_MAC,
    WORLD,
    Guest,
    firewalled,
    new_guests,
)
from test_host_network_kernel import BRIDGE, in_namespace, ip

from oscloudd.errors import HostError, InUseError, InvalidArgumentError
from oscloudd.host.network.connections import end_connections_of, end_forwarded
from oscloudd.host.network.port_rules import (
    EVERYWHERE,
    Forward,
    apply_forwards,
    build_forwards,
    set_route_localnet,
)
from oscloudd.host.ports import find_port_holder, hold_port

LOOPBACK = IPv4Address("127.0.0.1")
GUEST = IPv4Address("192.168.0.2")
SUBNET = IPv4Network("192.168.0.0/16")
LIMIT_SECONDS = 90

# Says to each who connects which address that has.
SERVER = """
import socket
with socket.create_server(("0.0.0.0", 80)) as server:
    print("ready", flush=True)
    while True:
        client, address = server.accept()
        client.sendall(address[0].encode())
        client.close()
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as client:
    print(client.recv(100).decode())
"""
# Sends a frame to a hardware address as if loopback were on the wire.
LOOPBACK_FRAME = """
import socket, struct, sys
mac, source, target, port = sys.argv[1:5]
words = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 33, 1, 0, 64, 17, 0,
                    socket.inet_aton(source), socket.inet_aton(target))
total = sum(struct.unpack("!10H", words))
total = (total & 0xFFFF) + (total >> 16)
words = words[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + words[12:]
udp = struct.pack("!HHHH", 40000, int(port), 13, 0) + b"smash"
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind(("eth0", 0))
    own = raw.getsockname()[4]
    raw.send(bytes.fromhex(mac.replace(":", "")) + own + b"\\x08\\x00" + words + udp)
"""


def forward(
    address: IPv4Address, port: int, guest_port: int = 80, protocol: str = "tcp"
) -> Forward:
    return Forward(protocol, address, port, GUEST, guest_port, BRIDGE.name, SUBNET)


def apply(*forwards: Forward) -> None:
    asyncio.run(apply_forwards(forwards, [BRIDGE.name]))


@contextmanager
def served(guest: Guest) -> Iterator[None]:
    enter = ["nsenter", "--net", "--target", str(guest.process.pid)]
    command = [*enter, sys.executable, "-I", "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.kill()


def reach(address: str, port: int) -> str:
    """Give the address that the server sees when the host itself connects."""
    with socket.create_connection((address, port), LIMIT_SECONDS) as client:
        return client.recv(100).decode()


def reach_from(guest: Guest, address: str, port: int) -> str:
    """Give the same when somebody else connects; "" when that is refused or not answered."""
    enter = ["nsenter", "--net", "--target", str(guest.process.pid)]
    command = [*enter, sys.executable, "-I", "-c", CLIENT, address, str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@in_namespace
def test_the_host_the_world_and_other_guests_reach_a_port_that_is_for_everybody() -> None:
    with firewalled(NETWORKS) as (one, other, world), new_guests(1) as (two,), served(one):
        two.connect("osctap1", "192.168.0.3", GATEWAY, TWO_MAC)
        ip(f"link set osctap1 master {BRIDGE.name}")
        with pytest.raises(OSError, match="refused"):
            reach("127.0.0.1", 8080)
        apply(forward(EVERYWHERE, 8080))
        assert reach("127.0.0.1", 8080) == GATEWAY
        assert reach(HOST_OUTSIDE, 8080) == HOST_OUTSIDE
        assert reach_from(world, HOST_OUTSIDE, 8080) == WORLD
        # It seems to be the host: the answer to a neighbour would go past it.
        assert reach_from(two, GATEWAY, 8080) == GATEWAY
        assert reach_from(other, "172.16.0.1", 8080) == OTHER
        apply()
        with pytest.raises(OSError, match="refused"):
            reach("127.0.0.1", 8080)


@in_namespace
def test_an_isolated_guest_is_reached_by_its_port_and_reaches_no_others() -> None:
    networks = [replace(NETWORKS[0], isolated=True), NETWORKS[1]]
    with firewalled(networks) as (one, other, world), served(one), served(other):
        their = Forward(
            "tcp", EVERYWHERE, 8081, IPv4Address(OTHER), 80, "oscbr1", NETWORKS[1].subnet
        )
        apply(forward(EVERYWHERE, 8080), their)
        assert reach_from(world, HOST_OUTSIDE, 8080) == WORLD
        assert reach_from(other, "172.16.0.1", 8080) == OTHER
        assert reach_from(world, HOST_OUTSIDE, 8081) == WORLD
        assert reach_from(one, GATEWAY, 8081) == ""


@in_namespace
def test_only_the_host_reaches_a_port_at_loopback() -> None:
    with firewalled(NETWORKS) as (one, _, world), served(one):
        apply(forward(LOOPBACK, 8080))
        assert reach("127.0.0.1", 8080) == GATEWAY
        for address in (HOST_OUTSIDE, GATEWAY):
            with pytest.raises(OSError, match="refused"):
                reach(address, 8080)
        assert reach_from(world, HOST_OUTSIDE, 8080) == ""


@in_namespace
def test_udp_and_an_address_of_the_host() -> None:
    with firewalled(NETWORKS) as (one, _, world):
        one.ask("bind udp 53")
        apply(forward(IPv4Address(HOST_OUTSIDE), 5353, 53, "udp"))
        world.ask(f"send {HOST_OUTSIDE} 5353 question")
        assert one.ask("receive 53") == f"question {WORLD}"


def hardware_address(interface: str) -> str:
    shown = subprocess.run(
        ["ip", "-o", "link", "show", interface], check=True, capture_output=True, text=True
    )
    return shown.stdout.split("link/ether ")[1].split()[0]


@in_namespace
def test_loopback_addresses_on_the_wire_reach_neither_host_nor_guest() -> None:
    """A frame to 127.0.0.1 from outside: rewriting comes before the kernel's own refusal."""
    with (
        firewalled(NETWORKS) as (one, _, world),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns,
    ):
        dns.bind(("127.0.0.1", 53))
        dns.settimeout(LIMIT_SECONDS)
        one.ask("bind udp 80")
        forwards = [forward(LOOPBACK, 8080, 80, "udp")]
        uplink = hardware_address("uplink")

        def flush_firewall() -> None:
            subprocess.run(["nft", "flush table inet oscloud"], check=True)

        def attack() -> None:
            send(world, WORLD, uplink, 8080)
            send(one, ONE, BRIDGE.mac, 53)

        # Without our drop both arrive: that is what it is for. The firewall, which would keep the
        # guest from the host's address as well, is not to be relied on for that.
        flush_firewall()
        lines = build_forwards(forwards).splitlines(keepends=True)
        text = "".join(line for line in lines if "127.0.0.0/8 drop" not in line)
        subprocess.run(["nft", "-f", "-"], input=text, check=True, text=True)
        set_route_localnet(BRIDGE.name, on=True)
        attack()
        assert one.ask("receive 80") == f"smash {WORLD}"
        assert dns.recv(100) == b"smash"

        apply(*forwards)
        attack()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.sendto(b"honest", ("127.0.0.1", 8080))
            host.sendto(b"honest", ("127.0.0.1", 53))
        assert one.ask("receive 80") == f"honest {GATEWAY}"
        assert dns.recv(100) == b"honest"

        # Nor when nothing is forwarded any more.
        apply()
        send(one, ONE, BRIDGE.mac, 53)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.sendto(b"last", ("127.0.0.1", 53))
        assert dns.recv(100) == b"last"


def send(guest: Guest, source: str, mac: str, port: int) -> None:
    command = [sys.executable, "-I", "-c", LOOPBACK_FRAME]
    guest.run(*command, mac, source, "127.0.0.1", str(port))


def holder_of(address: IPv4Address) -> str | None:
    return asyncio.run(find_port_holder("tcp", address, 8080))


@in_namespace
def test_a_port_that_is_taken_is_refused_with_who_has_it() -> None:
    ours = f"(process {threading.main_thread().native_id})"
    for bound, addresses in (("0.0.0.0", (LOOPBACK, EVERYWHERE)), ("127.0.0.1", (LOOPBACK,))):
        with socket.create_server((bound, 8080)):
            for address in addresses:
                with pytest.raises(InUseError, match=r"port 8080/tcp of .* is in use"):
                    hold_port("tcp", address, 8080)
                assert str(holder_of(address)).endswith(ours)
            assert (holder_of(IPv4Address("127.0.0.2")) is None) is (bound == "127.0.0.1")
    assert holder_of(LOOPBACK) is None
    with pytest.raises(InvalidArgumentError, match=r"192.0.2.1 is no address of this host"):
        hold_port("tcp", IPv4Address("192.0.2.1"), 8080)


@in_namespace
def test_nobody_else_can_have_a_port_that_is_held() -> None:
    held = [hold_port(protocol, LOOPBACK, 8080) for protocol in ("tcp", "udp")]
    for reuse in (0, 1):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            with pytest.raises(OSError, match="in use"):
                other.bind(("0.0.0.0", 8080))
    for each in held:
        assert each is not None
        each.close()


@in_namespace
def test_a_low_port_is_not_held_without_the_capability_for_it() -> None:
    code = (
        "from ipaddress import IPv4Address; from oscloudd.host.ports import hold_port;"
        "print(hold_port('tcp', IPv4Address('127.0.0.1'), 80))"
    )
    drop = ["setpriv", "--bounding-set", "-net_bind_service"]
    for prefix, said in ((drop, "None"), ([], "<socket")):
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        assert done.stdout.startswith(said), done


@in_namespace
def test_what_the_kernel_refuses_is_an_error() -> None:
    set_route_localnet("nothing", on=True)
    with pytest.raises(HostError):
        asyncio.run(apply_forwards([forward(LOOPBACK, 8080, 99999)], []))


@contextmanager
def open_flows() -> Iterator[tuple[Guest, Guest]]:
    """Give a guest and a machine of the world whose packets go on to it, though no rule says so."""
    with firewalled(NETWORKS) as (one, _, world):
        one.ask("bind udp 53")
        apply(forward(EVERYWHERE, 5353, 53, "udp"), forward(EVERYWHERE, 5354, 53, "udp"))
        for port, host_port in ((7000, 5353), (7001, 5354)):
            world.ask(f"bind udp {port}")
            world.ask(f"send-from {port} {HOST_OUTSIDE} {host_port} first")
            assert one.ask("receive 53") == f"first {WORLD}"
        apply()
        world.ask(f"send-from 7000 {HOST_OUTSIDE} 5353 later")
        assert one.ask("receive 53") == f"later {WORLD}"
        yield one, world


def next_arrived(one: Guest) -> str:
    """Give what has arrived at the guest, or what the host sends it now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"nothing", (ONE, 53))
    return one.ask("receive 53").split()[0]


@in_namespace
def test_a_flow_by_a_port_that_is_deleted_is_ended_and_no_other() -> None:
    with open_flows() as (one, world):
        for port, address, guest_port in ((5353, LOOPBACK, 53), (5353, EVERYWHERE, 54)):
            assert end_forwarded("udp", address, port, GUEST, guest_port) == 0
        assert end_forwarded("tcp", EVERYWHERE, 5353, GUEST, 53) == 0
        assert end_forwarded("udp", IPv4Address(HOST_OUTSIDE), 5353, GUEST, 53) == 1
        assert end_forwarded("udp", EVERYWHERE, 5353, GUEST, 53) == 0
        world.ask(f"send-from 7000 {HOST_OUTSIDE} 5353 ended")
        assert next_arrived(one) == "nothing"
        world.ask(f"send-from 7001 {HOST_OUTSIDE} 5354 open")
        assert one.ask("receive 53") == f"open {WORLD}"


@in_namespace
def test_nothing_goes_on_to_a_guest_that_is_gone_or_comes_back_to_it() -> None:
    with open_flows() as (one, world):
        one.ask(f"send-from 53 {WORLD} 7009 out")
        world.ask("bind udp 7009")
        one.ask(f"send-from 53 {WORLD} 7009 out")
        assert world.ask("receive 7009") == f"out {HOST_OUTSIDE}"
        assert end_connections_of(IPv4Address(OTHER)) == 0
        assert end_connections_of(IPv6Address("fd00:a::2")) == 0
        assert end_connections_of(GUEST) >= 3
        for port, host_port in ((7000, 5353), (7001, 5354)):
            world.ask(f"send-from {port} {HOST_OUTSIDE} {host_port} ended")
        world.ask("answer 7009")
        assert next_arrived(one) == "nothing"
