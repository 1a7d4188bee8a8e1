"""Frames as a guest that means harm would send them, and as an honest one does; pure functions."""

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

NOBODY_MAC = "52:54:00:00:00:99"
BROADCAST = "ff:ff:ff:ff:ff:ff"
UDP, ICMP, ICMP6 = 17, 1, 58
# What nobody sends by itself, so that a frame is known again wherever it arrives.
_TAG = b"oscloud-frame-%04d!"


def tag(number: int) -> bytes:
    return _TAG % number


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def link_local(address: str) -> str:
    """The IPv6 address a guest makes of its MAC."""
    raw = mac(address)
    made = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return str(IPv6Address(b"\xfe\x80" + bytes(6) + made))


def ethernet(source: str, target: str, kind: int, payload: bytes) -> bytes:
    return mac(target) + mac(source) + struct.pack("!H", kind) + payload


def tagged(frame: bytes, *kinds: int) -> bytes:
    """The frame with tags of VLAN 5 in it, the outermost first."""
    tags = b"".join(struct.pack("!HH", kind, 5) for kind in kinds)
    return frame[:12] + tags + frame[12:]


def arp(operation: int, sender: tuple[str, str], target: tuple[str, str]) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    for hardware, address in (sender, target):
        body += mac(hardware) + IPv4Address(address).packed
    return body


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip4(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    def header(check: int) -> bytes:
        return (
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, check)
            + IPv4Address(source).packed
            + IPv4Address(target).packed
        )

    return header(checksum(header(0))) + payload


def ip6(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    addresses = IPv6Address(source).packed + IPv6Address(target).packed
    return struct.pack("!IHBB", 0x60000000, len(payload), protocol, 255) + addresses + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", source, target, 8 + len(payload), 0) + payload


def dhcp(client: str, number: int) -> bytes:
    """A DHCP client's message by UDP, about the card with this MAC, as far as its chaddr."""
    header = bytes([1, 1, 6, 0]) + bytes(24)
    return udp(68, 67, header + mac(client) + bytes(10) + struct.pack("!I", number))


def first_fragment(packet: bytes, length: int) -> bytes:
    """The IPv4 packet's first fragment, with so much of what it carries."""
    header = packet[:2] + struct.pack("!HHH", 20 + length, 7, 0x2000) + packet[8:10] + bytes(2)
    header += packet[12:20]
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + packet[20:][:length]


def icmp(kind: int, payload: bytes, code: int = 0) -> bytes:
    return struct.pack("!BBHHH", kind, code, 0, 7, 1) + payload


def icmp6(source: str, target: str, kind: int, payload: bytes) -> bytes:
    """An ICMPv6 message in its IPv6 packet; the checksum covers both."""
    body = struct.pack("!BBH", kind, 0, 0) + payload
    pseudo = IPv6Address(source).packed + IPv6Address(target).packed
    pseudo += struct.pack("!II", len(body), ICMP6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    return ip6(source, target, ICMP6, body)


def neighbour(kind: int, source: str, target: str, about: str, option: str | None) -> bytes:
    """A solicitation (135) or advertisement (136) about an address, with a MAC in its option."""
    payload = struct.pack("!I", 0x20000000 if kind == 136 else 0) + IPv6Address(about).packed
    if option is not None:
        payload += bytes([kind - 134, 1]) + mac(option)
    return icmp6(source, target, kind, payload)


class Pair(NamedTuple):
    """A guest that sends, its neighbour, and their gateway."""

    one: str
    one_mac: str
    two: str
    two_mac: str
    gateway: str
    gateway_mac: str
    # Of the network's own IPv6 prefix.
    one_own6: str
    two_own6: str
    gateway_own6: str

    @property
    def one6(self) -> str:
        return link_local(self.one_mac)

    @property
    def two6(self) -> str:
        return link_local(self.two_mac)

    @property
    def gateway6(self) -> str:
        return link_local(self.gateway_mac)

    def own_udp(self, payload: bytes) -> bytes:
        """What is honest, to the neighbour."""
        packet = ip4(self.one, self.two, UDP, udp(7000, 7000, payload))
        return ethernet(self.one_mac, self.two_mac, 0x0800, packet)


def _payload(source: int = 7000, target: int = 7000) -> bytes:
    return udp(source, target, b"")


def harm(pair: Pair) -> dict[str, bytes]:
    """Give what a guest must not send to its neighbour."""
    packet = _payload()
    own_packet = ip4(pair.one, pair.two, UDP, packet)
    in_vlan = ip4(pair.one, pair.two, UDP, _payload(7001))
    answer = arp(2, (pair.one_mac, pair.one), (pair.two_mac, pair.two))
    in_q_in_q = ip4(pair.one, pair.two, UDP, _payload(7002))
    padding = bytes([ICMP6, 0, 1, 4, 0, 0, 0, 0])  # hop-by-hop options, with nothing in them
    echo = icmp6(pair.one6, pair.two6, 128, b"harm")
    all_nodes, all_nodes_mac = "ff02::1", "33:33:00:00:00:01"

    def own(kind: int, payload: bytes, target: str = pair.two_mac) -> bytes:
        return ethernet(pair.one_mac, target, kind, payload)

    def advertised(lifetime: int) -> bytes:
        return icmp6(pair.one6, all_nodes, 134, bytes([64, 0, lifetime]) + bytes(9))

    odd_arp = {
        f"ARP with another {what}": own(0x0806, answer[:at] + bytes([value]) + answer[at + 1 :])
        for what, at, value in (
            ("hardware", 1, 6),
            ("protocol", 3, 1),
            ("length of MACs", 4, 7),
            ("length of addresses", 5, 5),
            ("operation", 7, 3),
        )
    }
    return odd_arp | {
        "source MAC": ethernet(NOBODY_MAC, pair.two_mac, 0x0800, own_packet),
        "source address": own(0x0800, ip4(str(IPv4Address(pair.one) + 70), pair.two, UDP, packet)),
        "gateway's address": own(0x0800, ip4(pair.gateway, pair.two, UDP, packet)),
        "ARP as gateway": own(
            0x0806, arp(2, (pair.one_mac, pair.gateway), (pair.two_mac, pair.two))
        ),
        "ARP as gateway, asking": own(
            0x0806, arp(1, (pair.one_mac, pair.gateway), (pair.two_mac, pair.two)), BROADCAST
        ),
        "ARP inner MAC": own(0x0806, arp(2, (NOBODY_MAC, pair.one), (pair.two_mac, pair.two))),
        "ARP probe of a neighbour's": own(
            0x0806, arp(1, (pair.one_mac, "0.0.0.0"), ("00:00:00:00:00:00", pair.two)), BROADCAST
        ),
        "DHCP server to another port": own(
            0x0800, ip4(pair.one, pair.two, UDP, _payload(67, 7000))
        ),
        "DHCP server": own(0x0800, ip4(pair.one, pair.two, UDP, _payload(67, 68))),
        "DHCP server on another port": own(
            0x0800, ip4(pair.one, pair.two, UDP, _payload(7000, 68))
        ),
        **_harm_by_dhcp(pair),
        "ICMP redirect": own(
            0x0800,
            ip4(pair.one, pair.two, ICMP, icmp(5, ip4(pair.one, pair.two, UDP, _payload(7004)), 1)),
        ),
        "VLAN": tagged(own(0x0800, in_vlan), 0x8100),
        "Q-in-Q": tagged(own(0x0800, in_q_in_q), 0x88A8, 0x8100),
        "another protocol": own(0x88B5, bytes(range(46))),
        "spanning tree": ethernet(pair.one_mac, "01:80:c2:00:00:00", 4, b"\x42\x42\x03\x00"),
        "IPv6 source MAC": ethernet(
            NOBODY_MAC, pair.two_mac, 0x86DD, ip6(pair.one6, pair.two6, UDP, _payload(7003))
        ),
        "IPv6 source address": own(0x86DD, ip6("fe80::77", pair.two6, UDP, packet)),
        "IPv6 gateway's address": own(0x86DD, ip6(pair.gateway6, pair.two6, UDP, packet)),
        "IPv6 of no link": own(0x86DD, ip6("fd00::2", pair.two6, UDP, packet)),
        "router advertisement": own(0x86DD, advertised(1), all_nodes_mac),
        "router advertisement behind a header": own(
            0x86DD,
            ip6(pair.one6, all_nodes, 0, padding + advertised(2)[40:]),
            all_nodes_mac,
        ),
        "router advertisement in a fragment": own(
            0x86DD,
            ip6(pair.one6, all_nodes, 44, bytes([58, 0, 0, 1, 0, 0, 0, 7]) + advertised(3)[40:]),
            all_nodes_mac,
        ),
        "IPv6 redirect": own(0x86DD, icmp6(pair.one6, pair.two6, 137, bytes(range(36)))),
        "advertisement of the gateway": own(
            0x86DD, neighbour(136, pair.one6, pair.two6, pair.gateway6, pair.one_mac)
        ),
        "advertisement with another's MAC": own(
            0x86DD, neighbour(136, pair.one6, pair.two6, pair.one6, NOBODY_MAC)
        ),
        "solicitation with another's MAC": own(
            0x86DD, neighbour(135, pair.one6, pair.two6, pair.two6, NOBODY_MAC)
        ),
        "looking for a neighbour's address": own(
            0x86DD, neighbour(135, "::", pair.two6, pair.two6, None)
        ),
        "multicast query": own(0x86DD, icmp6(pair.one6, all_nodes, 130, bytes(20)), all_nodes_mac),
        "echo behind a header": own(0x86DD, ip6(pair.one6, pair.two6, 0, padding + echo[40:])),
        "DHCPv6 server": own(0x86DD, ip6(pair.one6, pair.two6, UDP, _payload(547, 7000))),
        "DHCPv6 answer": own(0x86DD, ip6(pair.one6, pair.two6, UDP, _payload(7000, 546))),
        **_harm_of_prefix(pair),
    }


def _harm_by_dhcp(pair: Pair) -> dict[str, bytes]:
    """Give messages that would have a DHCP server take something from the neighbour."""
    anywhere = ("0.0.0.0", "255.255.255.255")
    message = ip4(*anywhere, UDP, dhcp(pair.one_mac, 8))
    packets = {
        "DHCP about the neighbour": ip4(pair.one, pair.gateway, UDP, dhcp(pair.two_mac, 1)),
        "DHCP about the neighbour, from no address": ip4(*anywhere, UDP, dhcp(pair.two_mac, 2)),
        "DHCP about nobody": ip4(*anywhere, UDP, dhcp(NOBODY_MAC, 3)),
        "DHCP from the neighbour's address": ip4(
            pair.two, pair.gateway, UDP, dhcp(pair.one_mac, 4)
        ),
        "DHCP from no address to one": ip4("0.0.0.0", pair.gateway, UDP, dhcp(pair.one_mac, 5)),
        "DHCP that does not say about whom": ip4(
            pair.one, pair.gateway, UDP, udp(68, 67, bytes(20))
        ),
        # Fragments carry whole blocks of 8 bytes, and the MAC ends after 42.
        "DHCP in a fragment without a MAC": first_fragment(message, 32),
        "DHCP in a fragment with half a MAC": first_fragment(message, 40),
    }
    return {
        name: ethernet(pair.one_mac, BROADCAST, 0x0800, packet) for name, packet in packets.items()
    }


def _harm_of_prefix(pair: Pair) -> dict[str, bytes]:
    """Give the same with addresses of the network's own IPv6 prefix."""
    one, two, gateway = pair.one_own6, pair.two_own6, pair.gateway_own6
    strange = str(IPv6Address(one) + 70)
    packets = {
        "neighbour's own address": ip6(two, pair.two6, UDP, _payload(7010)),
        "gateway's own address": ip6(gateway, two, UDP, _payload()),
        "nobody's own address": ip6(strange, two, UDP, _payload()),
        "own router advertisement": icmp6(one, two, 134, bytes([64, 0, 4]) + bytes(9)),
        "own redirect": icmp6(one, two, 137, bytes(range(36, 72))),
        "own advertisement of the gateway": neighbour(136, one, two, gateway, pair.one_mac),
        "own advertisement of the neighbour": neighbour(136, one, two, two, pair.one_mac),
        "link-local advertisement of the gateway": neighbour(
            136, pair.one6, pair.gateway6, gateway, None
        ),
        "own advertisement with another's MAC": neighbour(136, one, two, one, NOBODY_MAC),
        "own solicitation with another's MAC": neighbour(135, one, two, two, NOBODY_MAC),
        "solicitation as the gateway": neighbour(135, gateway, two, one, pair.one_mac),
        "looking for a neighbour's own address": neighbour(135, "::", two, two, None),
        "looking for the gateway's own address": neighbour(135, "::", two, gateway, None),
        "own DHCPv6 server": ip6(one, two, UDP, _payload(547, 7001)),
        "own routing header": ip6(one, two, 43, bytes([UDP, 0, 0, 0, 0, 0, 0, 0]) + _payload()),
    }
    sent = {
        name: ethernet(pair.one_mac, pair.two_mac, 0x86DD, packet)
        for name, packet in packets.items()
    }
    packet = ip6(one, two, UDP, _payload(7011))
    return sent | {
        "own address and another's MAC": ethernet(NOBODY_MAC, pair.two_mac, 0x86DD, packet)
    }


def grace(pair: Pair) -> dict[str, bytes]:
    """Give what a guest has to be able to send to its neighbours."""
    nothing = "00:00:00:00:00:00"

    def own(kind: int, payload: bytes, target: str = BROADCAST) -> bytes:
        return ethernet(pair.one_mac, target, kind, payload)

    return {
        "IPv4": pair.own_udp(b""),
        "broadcast": own(0x0800, ip4(pair.one, "255.255.255.255", UDP, _payload())),
        "ARP": own(0x0806, arp(1, (pair.one_mac, pair.one), (nothing, pair.two))),
        "ARP answer": own(
            0x0806, arp(2, (pair.one_mac, pair.one), (pair.two_mac, pair.two)), pair.two_mac
        ),
        "ARP of its own": own(0x0806, arp(1, (pair.one_mac, pair.one), (nothing, pair.one))),
        "ARP probe": own(0x0806, arp(1, (pair.one_mac, "0.0.0.0"), (nothing, pair.one))),
        "DHCP client": own(0x0800, ip4("0.0.0.0", "255.255.255.255", UDP, dhcp(pair.one_mac, 6))),
        "DHCP client that has its address": own(
            0x0800, ip4(pair.one, pair.gateway, UDP, dhcp(pair.one_mac, 7))
        ),
        "IPv6": own(0x86DD, ip6(pair.one6, pair.two6, UDP, _payload()), pair.two_mac),
        "echo": own(0x86DD, icmp6(pair.one6, pair.two6, 128, bytes(4)), pair.two_mac),
        "solicitation": own(0x86DD, neighbour(135, pair.one6, pair.two6, pair.two6, pair.one_mac)),
        "solicitation without a MAC": own(
            0x86DD, neighbour(135, pair.one6, pair.two6, pair.two6, None)
        ),
        "advertisement": own(
            0x86DD, neighbour(136, pair.one6, pair.two6, pair.one6, pair.one_mac), pair.two_mac
        ),
        "advertisement without a MAC": own(
            0x86DD, neighbour(136, pair.one6, pair.two6, pair.one6, None)
        ),
        "looking for its own address": own(
            0x86DD, neighbour(135, "::", pair.two6, pair.one6, None)
        ),
        **_grace_of_prefix(pair),
    }


def _grace_of_prefix(pair: Pair) -> dict[str, bytes]:
    """Give the same with addresses of the network's own IPv6 prefix."""
    one, two = pair.one_own6, pair.two_own6
    packets = {
        "own IPv6": ip6(one, two, UDP, _payload()),
        "own IPv6 to a link-local address": ip6(one, pair.two6, UDP, _payload(7012)),
        "own echo": icmp6(one, two, 128, bytes(4)),
        "own solicitation": neighbour(135, one, two, two, pair.one_mac),
        "own solicitation without a MAC": neighbour(135, one, two, two, None),
        "own advertisement": neighbour(136, one, two, one, pair.one_mac),
        "own advertisement without a MAC": neighbour(136, one, two, one, None),
        "link-local advertisement of its own": neighbour(136, pair.one6, two, one, None),
        "looking for its own other address": neighbour(135, "::", two, one, None),
    }
    return {
        name: ethernet(pair.one_mac, pair.two_mac, 0x86DD, packet)
        for name, packet in packets.items()
    }
