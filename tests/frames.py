"""Frames as a guest that means harm would send them, and as an honest one does; pure functions."""

import struct
from ipaddress import IPv4Address, IPv6Address

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
