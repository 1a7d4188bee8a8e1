"""What the firewall lets a guest do, against the kernel: veths stand in for taps, frames are raw.

Each harm is first done without our rules, where it arrives, so that its absence means something.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import NamedTuple

import frames
import pytest
from frames import BROADCAST, NOBODY_MAC, UDP, Pair, ethernet, grace, harm, ip4
from test_host_network_kernel import in_namespace, ip

from oscloudd.errors import HostError, NotFoundError
from oscloudd.host.network import firewall
from oscloudd.host.network.bridge_ports import guard_port
from oscloudd.host.network.bridges import Bridge, ensure_bridge
from oscloudd.host.network.firewall import apply_ruleset, check_ruleset, remove_ruleset
from oscloudd.host.network.forwarding import ensure_forwarding, ensure_forwarding6
from oscloudd.host.network.nft_events import TableEvents
from oscloudd.host.network.ruleset import (
    FAMILIES,
    TABLE,
    GuestNetwork,
    GuestPort,
    build_elements,
    build_ruleset,
)
from oscloudd.host.network.set_elements import add_elements, delete_elements

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

GATEWAY, GATEWAY_MAC = "192.168.0.1", "02:05:c0:a8:00:01"
ONE, ONE_MAC = "192.168.0.2", "52:54:00:00:00:02"
TWO, TWO_MAC = "192.168.0.3", "52:54:00:00:00:03"
OTHER, OTHER_MAC = "172.16.0.2", "52:54:00:00:00:04"
PAIR = Pair(ONE, ONE_MAC, TWO, TWO_MAC, GATEWAY, GATEWAY_MAC, "fd00:a::2", "fd00:a::3", "fd00:a::1")
HOST_OUTSIDE = "10.9.0.1"


class Family(NamedTuple):
    """The addresses of one family: of guests and gateways, and of the world outside."""

    one: str
    two: str
    gateway: str
    other: str
    other_gateway: str
    world: str
    host_outside: str
    metadata: str
    unused: str
    option: str

    @property
    def any(self) -> str:
        return "0.0.0.0" if self.option == "-4" else "::"

    @property
    def socket_family(self) -> socket.AddressFamily:
        return socket.AF_INET if self.option == "-4" else socket.AF_INET6


FOUR = Family(
    ONE, TWO, GATEWAY, OTHER, "172.16.0.1", "10.9.0.2", HOST_OUTSIDE, "169.254.169.254",
    "203.0.113.5", "-4",
)  # fmt: skip
SIX = Family(
    PAIR.one_own6, PAIR.two_own6, PAIR.gateway_own6, "fd00:b::2", "fd00:b::1", "fd00:9::2",
    "fd00:9::1", "fd00:ec2::254", "2001:db8::5", "-6",
)  # fmt: skip
FAMILIES_OF_IP = pytest.mark.parametrize("net", [FOUR, SIX], ids=["IPv4", "IPv6"])
WORLD = FOUR.world

BRIDGES = [
    Bridge("oscbr0", IPv4Address(GATEWAY), 16, IPv6Interface(f"{SIX.gateway}/64")),
    Bridge("oscbr1", IPv4Address("172.16.0.1"), 16, IPv6Interface(f"{SIX.other_gateway}/64")),
]
NETWORKS = [
    GuestNetwork("oscbr0", IPv4Network("192.168.0.0/16"), subnet6=IPv6Network("fd00:a::/64")),
    GuestNetwork("oscbr1", IPv4Network("172.16.0.0/16"), subnet6=IPv6Network("fd00:b::/64")),
]
PORTS = [
    GuestPort("osctap0", ONE_MAC, IPv4Address(ONE), IPv6Address(SIX.one)),
    GuestPort("osctap1", TWO_MAC, IPv4Address(TWO), IPv6Address(SIX.two)),
    GuestPort("osctap2", OTHER_MAC, IPv4Address(OTHER), IPv6Address(SIX.other)),
]

# A guest: one command a line on its standard input, one answer a line. What it sends twice it
# waits for once: whatever was sent before has arrived by then, or never will.
GUEST = """
import socket, sys
bound, raw = {}, None
def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET
for line in sys.stdin:
    verb, *words = line.split()
    answer = "done"
    if verb == "card":
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        raw.bind(("eth0", 0))
        raw.settimeout(20)
    if verb == "frame":
        raw.send(bytes.fromhex(words[0]))
    if verb == "until":
        seen, last = "", words[0].encode()
        while True:
            frame, origin = raw.recvfrom(65536)
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            seen += frame.hex()
            if last in frame:
                break
        answer = seen
    if verb == "bind":
        kind = socket.SOCK_STREAM if words[0] == "tcp" else socket.SOCK_DGRAM
        address = words[2] if len(words) > 2 else "0.0.0.0"
        bound[words[1]] = socket.socket(family(address), kind)
        bound[words[1]].settimeout(20)
        bound[words[1]].bind((address, int(words[1])))
        if words[0] == "tcp":
            bound[words[1]].listen()
    if verb == "send":
        with socket.socket(family(words[0]), socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            if len(words) > 3:
                sender.bind((words[3], 0))
            sender.sendto(words[2].encode(), (words[0], int(words[1])))
    if verb == "receive":
        data, source = bound[words[0]].recvfrom(100)
        answer = f"{data.decode()} {source[0]}"
    if verb == "send-from":
        bound[words[0]].sendto(words[3].encode(), (words[1], int(words[2])))
    if verb == "answer":
        bound[words[0]].sendto(b"answer", source)
    if verb == "accept":
        client, source = bound[words[0]].accept()
        client.close()
        answer = source[0]
    if verb == "connect":
        with socket.create_connection((words[0], int(words[1])), 20) as stream:
            stream.recv(1)
    if verb == "ping":
        v6 = ":" in words[0]
        protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
        with socket.socket(family(words[0]), socket.SOCK_RAW, protocol) as line:
            line.settimeout(20)
            request = bytes([128 if v6 else 8, 0, 0, 0, 0, 9, 0, 1])
            if not v6:
                check = ~sum((0x0800, 9, 1)) & 0xffff
                request = request[:2] + check.to_bytes(2, "big") + request[4:]
            scope = socket.if_nametoindex("eth0") if v6 else 0
            line.sendto(request, (words[0], 0, 0, scope) if v6 else (words[0], 0))
            while line.recv(100)[0 if v6 else 20] != (129 if v6 else 0):
                pass
    print(answer, flush=True)
"""


class Guest:
    """A process with a network card in a namespace of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-I", "-c", GUEST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("ready")

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the guest has failed"
        return line

    def ask(self, command: str) -> str:
        self.say(command)
        return self.hear()

    def run(self, *argv: str) -> None:
        enter = ["nsenter", "--net", "--target", str(self.process.pid)]
        subprocess.run([*enter, *argv], check=True, capture_output=True)

    def connect(
        self,
        port: str,
        address: str,
        gateway: str,
        mac: str = NOBODY_MAC,
        *,
        address6: str | None = None,
        gateway6: str | None = None,
    ) -> None:
        """Give the guest the other end of the interface `port` of ours."""
        ip(f"link add {port} type veth peer name eth0 address {mac} netns {self.process.pid}")
        ip(f"link set {port} up")
        self.run("ip", "address", "add", f"{address}/16", "dev", "eth0")
        # For its link-local address; see `add_address`.
        self.run("sh", "-c", "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad")
        self.run("ip", "link", "set", "eth0", "up")
        self.run("ip", "route", "add", "default", "via", gateway)
        if address6 is not None and gateway6 is not None:
            self.add_address(f"{address6}/64")
            self.run("ip", "-6", "route", "add", "default", "via", gateway6)
        self.ask("card")

    def add_address(self, address: str) -> None:
        """Give the guest's card one more address, of either family."""
        # Nothing can be sent from one that is still being looked for elsewhere.
        nodad = ["nodad"] if ":" in address else []
        self.run("ip", "address", "add", address, "dev", "eth0", *nodad)

    def until(self, tag: bytes) -> bytes:
        """Give all frames up to the one with this tag."""
        return bytes.fromhex(self.ask(f"until {tag.decode()}"))


@contextmanager
def new_guests(count: int) -> Iterator[list[Guest]]:
    with ExitStack() as stack:
        guests = []
        for _ in range(count):
            guest = Guest()
            stack.callback(guest.process.communicate, timeout=30)
            guests.append(guest)
        yield guests


def apply(networks: list[GuestNetwork], ports: list[GuestPort] | None = None) -> None:
    asyncio.run(apply_ruleset(networks, PORTS if ports is None else ports))


@contextmanager
def two_neighbours() -> Iterator[tuple[Guest, Guest]]:
    """Give two guests on one bridge, without any rules yet."""
    asyncio.run(ensure_bridge(BRIDGES[0]))
    with new_guests(2) as (one, two):
        for guest, port in ((one, PORTS[0]), (two, PORTS[1])):
            guest.connect(
                port.tap,
                str(port.address),
                GATEWAY,
                port.mac,
                address6=str(port.address6),
                gateway6=SIX.gateway,
            )
            ip(f"link set {port.tap} master oscbr0")
        yield one, two


@contextmanager
def firewalled(networks: list[GuestNetwork]) -> Iterator[tuple[Guest, Guest, Guest]]:
    """Give a guest on each of two networks, and a machine of the outside world."""
    for bridge in BRIDGES:
        asyncio.run(ensure_bridge(bridge))
    apply(networks)
    ensure_forwarding()
    ensure_forwarding6()
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
    with new_guests(3) as (one, other, world):
        one.connect("osctap0", ONE, GATEWAY, ONE_MAC, address6=SIX.one, gateway6=SIX.gateway)
        ip("link set osctap0 master oscbr0")
        other.connect(
            "osctap2", OTHER, "172.16.0.1", OTHER_MAC, address6=SIX.other,
            gateway6=SIX.other_gateway,
        )  # fmt: skip
        ip("link set osctap2 master oscbr1")
        world.connect("uplink", WORLD, HOST_OUTSIDE, address6=SIX.world, gateway6=SIX.host_outside)
        ip(f"address add {HOST_OUTSIDE}/16 dev uplink")
        ip(f"address add {SIX.host_outside}/64 dev uplink nodad")
        yield one, other, world


def send_all(sender: Guest, victim: Guest, sent: dict[str, bytes]) -> set[str]:
    """Send these frames and give the names of those that have arrived."""
    for frame in sent.values():
        sender.ask(f"frame {frame.hex()}")
    return find_arrived(sender, victim, sent)


def find_arrived(sender: Guest, victim: Guest, sent: dict[str, bytes]) -> set[str]:
    """Send one more, which has to arrive, and give the names of those that did before it."""
    sender.ask(f"frame {PAIR.own_udp(frames.tag(1)).hex()}")
    arrived = victim.until(frames.tag(1))
    # The end of a frame, which no VLAN's tag is in: the kernel takes that out for who listens.
    ends = {name: frame[-28:] for name, frame in sent.items()}
    assert len(set(ends.values())) == len(ends)
    return {name for name, end in ends.items() if end in arrived}


@in_namespace
def test_nothing_forged_reaches_a_neighbour_and_all_that_is_honest_does() -> None:
    with two_neighbours() as (one, two):
        assert send_all(one, two, harm(PAIR)) == set(harm(PAIR))
        apply(NETWORKS)
        for port in PORTS[:2]:
            guard_port(port.tap, port.mac)
        assert send_all(one, two, harm(PAIR)) == set()
        assert send_all(one, two, grace(PAIR)) == set(grace(PAIR))


@in_namespace
def test_a_guest_is_told_by_its_tap() -> None:
    with two_neighbours() as (one, two):
        # The other's tap has these addresses, and what is known of this one's is nothing.
        apply(NETWORKS, [replace(PORTS[0], tap="osctap1")])
        assert _arrives_before_what_is_allowed_next(one, two) == set()
        add_elements(build_elements(PORTS[0]))
        assert send_all(one, two, grace(PAIR)) == set(grace(PAIR))
        delete_elements(build_elements(PORTS[0]))
        delete_elements(build_elements(PORTS[0]))
        assert _arrives_before_what_is_allowed_next(one, two) == set()


def _arrives_before_what_is_allowed_next(one: Guest, two: Guest) -> set[str]:
    """Send what is honest, then allow it, and send a last one."""
    for frame in grace(PAIR).values():
        one.ask(f"frame {frame.hex()}")
    add_elements(build_elements(PORTS[0]))
    arrived = find_arrived(one, two, grace(PAIR))
    delete_elements(build_elements(PORTS[0]))
    return arrived


def _steal(one: Guest, two: Guest) -> bool:
    """Have one claim the other's MAC, and tell whether it gets what is for the other."""
    # No bridge forwards this, and no chain of the bridge sees it; it is learned from all the same.
    claim = ethernet(TWO_MAC, "01:80:c2:00:00:0e", 0x88CC, bytes(46))
    one.ask(f"frame {claim.hex()}")
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with sender:
        sender.bind(("oscbr0", 0))
        for target, number in ((TWO_MAC, 1), (BROADCAST, 2)):
            packet = ip4(GATEWAY, TWO, UDP, frames.udp(7000, 7000, frames.tag(number)))
            sender.send(ethernet(GATEWAY_MAC, target, 0x0800, packet))
    got = frames.tag(1) in one.until(frames.tag(2))
    assert got != (frames.tag(1) in two.until(frames.tag(2)))
    return got


@in_namespace
def test_a_bridge_does_not_learn_from_guests() -> None:
    with two_neighbours() as (one, two):
        apply(NETWORKS)
        assert _steal(one, two)
        for port in PORTS[:2]:
            guard_port(port.tap, port.mac)
            guard_port(port.tap, port.mac)
        assert not _steal(one, two)


@in_namespace
def test_a_frame_that_no_bridge_forwards_does_not_reach_the_host() -> None:
    with two_neighbours() as (one, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind((GATEWAY, 7000))
        service.settimeout(20)
        packet = ip4(ONE, GATEWAY, UDP, frames.udp(7000, 7000, b"slipped in"))
        frame = ethernet(ONE_MAC, "01:80:c2:00:00:0e", 0x0800, packet)
        one.ask(f"frame {frame.hex()}")
        assert service.recv(100) == b"slipped in"
        apply(NETWORKS)
        one.ask(f"frame {frame.hex()}")
        one.ask(f"ping {GATEWAY}")
        service.setblocking(False)
        with pytest.raises(BlockingIOError):
            service.recv(100)


@in_namespace
def test_neighbours_ping_and_connect_and_ping_their_gateway() -> None:
    with two_neighbours() as (one, two):
        apply(NETWORKS)
        for port in PORTS[:2]:
            guard_port(port.tap, port.mac)
        for address in (TWO, GATEWAY, PAIR.two6, PAIR.gateway6, SIX.two, SIX.gateway):
            assert one.ask(f"ping {address}") == "done"
        for port, net in ((80, FOUR), (81, SIX)):
            two.ask(f"bind tcp {port} {net.two}")
            two.say(f"accept {port}")
            one.ask(f"connect {net.two} {port}")
            assert two.hear() == net.one


@FAMILIES_OF_IP
@in_namespace
def test_guest_reaches_the_world_behind_the_hosts_address_only(net: Family) -> None:
    with firewalled(NETWORKS) as (one, _, world):
        world.ask(f"bind udp 7000 {net.any}")
        world.add_address(net.metadata)
        ip(f"{net.option} route add {net.metadata} dev uplink")
        # These don't pass; what comes after them on the same way shows that they didn't.
        one.add_address(net.unused)
        forged = GuestPort("osctap0", ONE_MAC, IPv4Address(FOUR.unused), IPv6Address(SIX.unused))
        add_elements(build_elements(forged))
        one.ask(f"send {net.world} 7000 forged {net.unused}")
        one.ask(f"send {net.metadata} 7000 metadata {net.one}")
        one.ask(f"send {net.world} 7000 honest {net.one}")
        assert world.ask("receive 7000") == f"honest {net.host_outside}"
        world.ask(f"bind tcp 80 {net.any}")
        world.say("accept 80")
        one.ask(f"connect {net.world} 80")  # answers come back
        assert world.hear() == net.host_outside


@in_namespace
def test_a_guest_whose_bridge_is_gone_reaches_nothing() -> None:
    with firewalled(NETWORKS) as (one, _, world):
        world.ask("bind udp 7000")
        ip("link set osctap0 nomaster")
        # The host answers for each of its addresses on any interface: its neighbour's MAC is known.
        mac = json.loads(ip("-json link show osctap0"))[0]["address"]
        packet = ip4(ONE, WORLD, UDP, frames.udp(7000, 7000, b"slipped by"))
        one.ask(f"frame {ethernet(ONE_MAC, mac, 0x0800, packet).hex()}")
        ip("link set osctap0 master oscbr0")
        one.ask(f"send {WORLD} 7000 honest")
        assert world.ask("receive 7000") == f"honest {HOST_OUTSIDE}"


@FAMILIES_OF_IP
@in_namespace
def test_isolated_guest_reaches_its_own_network_and_gateway_only(net: Family) -> None:
    isolated = [replace(NETWORKS[0], isolated=True), NETWORKS[1]]
    with firewalled(isolated) as (one, other, world):
        world.ask(f"bind udp 7000 {net.any}")
        one.ask(f"send {net.world} 7000 isolated")
        other.ask(f"send {net.world} 7000 other")
        assert world.ask("receive 7000") == f"other {net.host_outside}"
        assert one.ask(f"ping {net.gateway}") == "done"


@FAMILIES_OF_IP
@in_namespace
def test_guest_without_nat_is_seen_and_reached_under_its_own_address(net: Family) -> None:
    routed = [replace(NETWORKS[0], nat=False), NETWORKS[1]]
    with firewalled(routed) as (one, other, world):
        world.ask(f"bind udp 7000 {net.any}")
        one.ask(f"send {net.world} 7000 routed")
        assert world.ask("receive 7000") == f"routed {net.one}"
        one.ask(f"bind udp 7000 {net.any}")
        other.ask(f"send {net.one} 7000 other")
        world.ask(f"send {net.one} 7000 world")
        assert one.ask("receive 7000") == f"world {net.world}"


@FAMILIES_OF_IP
@in_namespace
def test_world_and_other_networks_do_not_reach_a_guest_but_the_host_does(net: Family) -> None:
    with firewalled(NETWORKS) as (one, other, world):
        for guest, address, stranger, gateway in (
            (one, net.one, other, net.gateway),
            (other, net.other, one, net.other_gateway),
        ):
            guest.ask(f"bind udp 7000 {net.any}")
            world.ask(f"send {address} 7000 world")
            stranger.ask(f"send {address} 7000 stranger")
            with socket.socket(net.socket_family, socket.SOCK_DGRAM) as host:
                host.sendto(b"host", (address, 7000))
            assert guest.ask("receive 7000") == f"host {gateway}"


@in_namespace
def test_guest_reaches_dns_at_its_gateway_by_ipv6_and_nothing_else_on_the_host() -> None:
    with firewalled(NETWORKS) as (one, _, _), ExitStack() as stack:
        services = {}
        for port in (53, 67, 547, 7000):
            service = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            services[port] = stack.enter_context(service)
            service.bind(("::", port))
            service.settimeout(20)
        link_local = f"{PAIR.gateway6}%eth0"
        for port in services:
            for address in (SIX.host_outside, SIX.other_gateway, link_local, "ff02::1%eth0"):
                one.ask(f"send {address} {port} forbidden")
            if port != 53:
                one.ask(f"send {SIX.gateway} {port} forbidden")
        one.ask(f"send {SIX.gateway} 53 question")
        assert services[53].recv(100) == b"question"
        with socket.create_server((SIX.gateway, 53), family=socket.AF_INET6) as server:
            one.say(f"connect {SIX.gateway} 53")
            server.accept()[0].close()
            assert one.hear() == "done"
        for service in services.values():
            service.setblocking(False)
            with pytest.raises(BlockingIOError):
                service.recv(100)
        # Once there are no rules, all of that arrives.
        asyncio.run(remove_ruleset())
        for service in services.values():
            service.settimeout(20)
        one.ask(f"send {link_local} 7000 forbidden")
        assert services[7000].recv(100) == b"forbidden"


@in_namespace
def test_guest_reaches_dns_and_dhcp_at_its_gateway_and_nothing_else_on_the_host() -> None:
    with firewalled(NETWORKS) as (one, _, _), ExitStack() as stack:
        services = {}
        for port in (53, 67, 68, 7000):
            services[port] = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            services[port].bind(("0.0.0.0", port))
            services[port].settimeout(20)
        for address in (GATEWAY, HOST_OUTSIDE, "172.16.0.1"):
            for port in services if address != GATEWAY else (68, 7000):
                one.ask(f"send {address} {port} forbidden")
            if address != GATEWAY:
                one.ask(f"frame {_dhcp(address, GATEWAY_MAC).hex()}")
        for target in ("192.168.255.255", "255.255.255.255"):
            one.ask(f"send {target} 7000 forbidden")
        one.ask(f"send {GATEWAY} 53 question")
        assert services[53].recv(100) == b"question"
        for frame in (_dhcp(GATEWAY, GATEWAY_MAC), _dhcp("255.255.255.255", BROADCAST, "0.0.0.0")):
            one.ask(f"frame {frame.hex()}")
            assert services[67].recv(100) == frame[42:]
        with socket.create_server((GATEWAY, 53)) as server:
            one.say(f"connect {GATEWAY} 53")
            server.accept()[0].close()
            assert one.hear() == "done"
        for service in services.values():
            service.setblocking(False)
            with pytest.raises(BlockingIOError):
                service.recv(100)
        # An answer to the host's own word comes in.
        services[7000].settimeout(20)
        one.ask("bind udp 7001")
        services[7000].sendto(b"hello", (ONE, 7001))
        assert one.ask("receive 7001") == f"hello {GATEWAY}"
        one.ask("answer 7001")
        assert services[7000].recv(100) == b"answer"


def _dhcp(target: str, target_mac: str, source: str = ONE) -> bytes:
    """A frame with what a DHCP client sends."""
    packet = ip4(source, target, UDP, frames.dhcp(ONE_MAC, 1))
    return ethernet(ONE_MAC, target_mac, 0x0800, packet)


def _listed() -> str:
    return subprocess.run(
        ["nft", "list", "ruleset"], check=True, capture_output=True, text=True
    ).stdout


@in_namespace
def test_elements_of_one_guest_are_what_the_whole_ruleset_has_of_it() -> None:
    with pytest.raises(NotFoundError, match="no table bridge oscloud"):
        add_elements(build_elements(PORTS[0]))
    apply(NETWORKS, [])
    without = _listed()
    apply(NETWORKS, PORTS[:1])
    whole = _listed()
    apply(NETWORKS, [])
    add_elements(build_elements(PORTS[0]))
    add_elements(build_elements(PORTS[0]))
    assert _listed() == whole
    delete_elements(build_elements(PORTS[0]))
    assert _listed() == without


@in_namespace
def test_rules_do_not_become_more_with_networks_and_guests() -> None:
    def count_rules() -> int:
        shown = subprocess.check_output(["nft", "--json", "list", "ruleset"])
        return sum("rule" in entry for entry in json.loads(shown)["nftables"])

    counts = set()
    for number in (0, 1, 20):
        networks = [
            GuestNetwork(f"oscbr{at}", IPv4Network(f"10.{at}.0.0/24")) for at in range(number)
        ]
        ports = [
            GuestPort(f"osctap{at}", f"52:54:00:00:00:{at:02x}", IPv4Address(f"10.0.0.{at + 2}"))
            for at in range(number)
        ]
        apply(networks, ports)
        counts.add(count_rules())
    assert len(counts) == 1


def test_what_a_host_lacks_is_found_and_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_namespace
    def check() -> None:
        apply(NETWORKS)
        before = subprocess.check_output(["nft", "list", "ruleset"])
        asyncio.run(check_ruleset())
        for family in FAMILIES:
            # No kernel has this chain.
            chain = f"add chain {family} {TABLE} x {{ type nat hook forward priority 0; }}\n"
            text = build_ruleset([], []) + chain
            monkeypatch.setattr(firewall, "build_ruleset", lambda *_, text=text: text)
            with pytest.raises(HostError, match="nft"):
                asyncio.run(check_ruleset())
        assert subprocess.check_output(["nft", "list", "ruleset"]) == before

    check()


@in_namespace
def test_a_change_by_another_is_heard_of_and_one_of_our_own_is_not() -> None:
    def nft(text: str) -> None:
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)

    async def scenario() -> None:
        changes = TableEvents(TABLE)
        with changes.own_change():
            await apply_ruleset(NETWORKS, PORTS)
        with changes.own_change():
            add_elements(build_elements(PORTS[0]))
        nft("table inet oscloud_not_ours { chain x { }; }\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(changes.touched(), 0.1)
        for change in (
            "flush ruleset\n",
            "table inet oscloud { chain x { }; }\n",
            "delete table inet oscloud\n",
        ):
            nft(change)
            await asyncio.wait_for(changes.touched(), 20)
        with changes.own_change():
            await apply_ruleset(NETWORKS, PORTS)
            nft("flush ruleset\n")
        await asyncio.wait_for(changes.touched(), 20)
        changes.close()

    asyncio.run(scenario())
