"""The firewall against real guests: what one that means harm can send, and what it can reach."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import frames
import pytest
from frames import Pair, grace, harm
from guest_cloud import LIMIT_SECONDS, GuestCloud, open_cloud

from oscloudd.errors import ExhaustedError

pytestmark = pytest.mark.guest

SOURCE = Path(__file__).with_name("send_frames.c")

# Prints all that goes to a guest by its tap, until a tag comes.
LISTEN = """
import socket, sys
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind((sys.argv[1], 0))
raw.settimeout(100)
print("ready", flush=True)
while True:
    frame, origin = raw.recvfrom(65536)
    if origin[2] == socket.PACKET_OUTGOING:
        print(frame.hex(), flush=True)
        if sys.argv[2].encode() in frame:
            break
"""
# Says hello on TCP ports of all of the host's addresses.
SERVE = """
import select, socket, sys
dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
servers = [socket.create_server(("::", int(port)), **dual) for port in sys.argv[1:]]
print("ready", flush=True)
while True:
    for server in select.select(servers, [], [])[0]:
        client, _ = server.accept()
        client.sendall(b"hello")
        client.close()
"""


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        cloud.call("network_create", name="lab", subnet="10.20.0.0/29")
        cloud.call("network_create", name="other", subnet="10.21.0.0/24", isolated=True)
        yield cloud


@pytest.fixture(scope="module")
def guests(cloud: GuestCloud) -> list[dict[str, Any]]:
    one, two = (cloud.create(name, network="lab") for name in ("one", "two"))
    program = cloud.root / "send_frames"
    subprocess.run(["gcc", "-O1", "-static", "-o", program, SOURCE], check=True)
    argv = cloud.ssh_command(one, "-i", str(cloud.key), "-o", "BatchMode=yes")
    with program.open("rb") as file:
        subprocess.run(
            [*cloud.inside(*argv), "cat >/tmp/send && chmod +x /tmp/send"],
            stdin=file, env=cloud.environment(), check=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    return [one, two]


@contextmanager
def beside(cloud: GuestCloud, script: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a script on the host, with what it prints for the caller, while in the block."""
    argv = cloud.inside(sys.executable, "-I", "-c", script, *arguments)
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def send_all(cloud: GuestCloud, guests: list[dict[str, Any]], sent: dict[str, bytes]) -> set[str]:
    """Have the one guest send these, and give the names of those that get to the other's tap."""
    one, two = guests
    last = frames.tag(1)
    lines = [frame.hex() for frame in (*sent.values(), pair_of(guests).own_udp(last))]
    with beside(cloud, LISTEN, "osctap1", last.decode()) as listener:
        argv = cloud.ssh_command(one, "-i", str(cloud.key), "-o", "BatchMode=yes")
        done = subprocess.run(
            [*cloud.inside(*argv), "/tmp/send"], input="\n".join(lines) + "\n", text=True,
            env=cloud.environment(), check=True, timeout=LIMIT_SECONDS, capture_output=True,
        )  # fmt: skip
        assert done.stdout == "sent\n"
        assert listener.stdout is not None
        arrived = listener.stdout.read()
    assert two["network"] == one["network"]
    return {name for name, frame in sent.items() if frame[-28:].hex() in arrived}


def pair_of(guests: list[dict[str, Any]]) -> Pair:
    one, two = guests
    return Pair(
        one["ip"], one["mac"], two["ip"], two["mac"], one["gateway"], "02:05:0a:14:00:01",
        one["ip6"], two["ip6"], str(ip_network(f"{one['ip6']}/64", strict=False)[1]),
    )  # fmt: skip


def answers(cloud: GuestCloud, vm: dict[str, Any], address: str, ports: list[int]) -> set[str]:
    """Give what answers a guest at an address: "ping", and TCP ports that take a connection."""
    ping = "ping6" if ":" in address else "ping"
    words = [f"{ping} -c 1 -W 5 {address} >/dev/null && echo ping"]
    for port in ports:
        hello = f"timeout 5 nc {address} {port} </dev/null 2>/dev/null | head -c 1"
        words.append(f'[ -n "$({hello})" ] && echo {port}')
    return set(cloud.ssh(vm, "; ".join([*words, "true"])).split())


def test_a_guest_finds_ping_and_dns_at_its_gateway_and_nothing_else_on_the_host(
    cloud: GuestCloud, guests: list[dict[str, Any]]
) -> None:
    one, two = guests
    ports = [22, 80, 7000]
    gateways = {one["gateway"], pair_of(guests).gateway_own6}
    cloud.run("ip", "address", "add", "fd00:99::1/64", "dev", "lo")
    uplink = cloud.run("ip", "-o", "address", "show", "scope", "global").splitlines()
    addresses = {line.split()[3].partition("/")[0] for line in uplink}
    assert gateways < addresses
    assert {":" in address for address in addresses - gateways} == {True, False}
    with beside(cloud, SERVE, *map(str, ports)):
        for gateway in gateways:
            assert answers(cloud, one, gateway, ports) == {"ping"}, gateway
        for address in addresses - gateways:
            assert answers(cloud, one, address, ports) == set(), address
    for gateway in gateways:
        found = cloud.ssh(one, f"nslookup two.oscloud {gateway}")
        assert two["ip"] in found
        assert two["ip6"] in found
    # Its neighbour's ssh, and from there back.
    for here, there in ((one, two), (two, one)):
        for address in (there["ip"], there["ip6"]):
            assert answers(cloud, here, address, [22, 80]) == {"ping", "22"}


def test_networks_do_not_reach_each_other_nor_the_metadata_address(
    cloud: GuestCloud, guests: list[dict[str, Any]]
) -> None:
    other = cloud.create("other", network="other")
    for key in ("ip", "ip6"):
        assert answers(cloud, guests[0], other[key], [22]) == set()
        assert answers(cloud, other, guests[0][key], [22]) == set()
    assert answers(cloud, other, other["gateway"], [22]) == {"ping"}
    cloud.run("ip", "address", "add", "169.254.169.254/32", "dev", "lo")
    with beside(cloud, SERVE, "80"):
        for vm in (guests[0], other):
            assert answers(cloud, vm, "169.254.169.254", [80]) == set()


def more(cloud: GuestCloud, name: str) -> dict[str, Any]:
    """Make a vm in the lab, and don't wait for its boot."""
    size = {"mem_size": "128M", "disk_size": "1G"}
    made: dict[str, Any] = cloud.call(
        "vm_create", name=name, image="tiny", network="lab", wait="started", **size
    )
    return made


def test_addresses_are_kept_over_stop_and_start_and_run_out(
    cloud: GuestCloud, guests: list[dict[str, Any]]
) -> None:
    one = guests[0]
    cloud.call("vm_restart", vm=one["id"])
    again = cloud.wait(one)
    assert (again["ip"], again["mac"]) == (one["ip"], one["mac"])
    assert one["ip"] in cloud.ssh(one, "ip -4 address show dev eth0")
    assert f"{one['ip6']}/64" in cloud.ssh(one, "ip -6 address show dev eth0")
    assert again["ip6"] == one["ip6"]
    rest = [more(cloud, f"more{number}") for number in range(3)]
    assert [vm["ip"] for vm in rest] == ["10.20.0.4", "10.20.0.5", "10.20.0.6"]
    with pytest.raises(ExhaustedError, match=r"10\.20\.0\.0/29 has 5 for vms"):
        cloud.create("one-more", network="lab")
    cloud.call("vm_delete", vm=rest[1]["id"], force=True)
    assert more(cloud, "next")["ip"] == "10.20.0.5"


# The last one: without our rules it leaves the guests with wrong ideas of their neighbours.
def test_nothing_forged_leaves_a_guest_and_all_that_is_honest_does(
    cloud: GuestCloud, guests: list[dict[str, Any]]
) -> None:
    pair = pair_of(guests)
    assert send_all(cloud, guests, harm(pair)) == set()
    assert send_all(cloud, guests, grace(pair)) == set(grace(pair))
    # Without our rules it does: nobody is there to put them back.
    cloud.end(signal.SIGKILL)
    cloud.run("nft", "flush ruleset")
    assert send_all(cloud, guests, harm(pair)) == set(harm(pair))
    cloud.start()
    tables = "bridge oscloud"
    cloud.until(lambda: tables in cloud.run("nft", "list", "tables"), "the tables")
    assert send_all(cloud, guests, harm(pair)) == set()
