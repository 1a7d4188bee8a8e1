"""Connections that the kernel keeps track of, ended before they end by themselves.

What it has once rewritten goes on to where it went, whatever the rules say by now. Nobody is told:
who goes on sending gets the host's own answer.
"""

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from oscloudd.errors import HostError
from oscloudd.host.network.netlink import (
    ACKNOWLEDGE,
    exchange,
    find_attribute,
    list_messages,
    pack_attribute,
    pack_message,
    pack_nested,
)

NETLINK_NETFILTER = 12
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h
_GET, _DELETE = 1 << 8 | 1, 1 << 8 | 2
_ORIGINAL, _REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_ADDRESSES, _PROTOCOL = 1, 2
_SOURCES, _TARGETS = (1, 3), (2, 4)  # of IPv4, of IPv6
_NUMBER, _SOURCE_PORT, _TARGET_PORT = 1, 2, 3
_IS_REDIRECTED = 1 << 5  # IPS_DST_NAT
_GENERIC = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Flow:
    """One way of a connection; without ports they are 0."""

    protocol: int
    source: Address
    source_port: int
    target: Address
    target_port: int


@dataclass(frozen=True)
class Connection:
    """One connection: as it began, and as its answers come."""

    original: Flow
    reply: Flow
    is_redirected: bool
    key: bytes  # the attributes that name it


def end_forwarded(
    protocol: str, address: IPv4Address, port: int, guest: IPv4Address, guest_port: int
) -> int:
    """End what a forwarded port has led to a guest; give how many connections that were.

    `address` is the host's, and 0.0.0.0 any. Raises HostError.
    """

    def is_meant(each: Connection) -> bool:
        return (
            each.is_redirected
            and each.original.protocol == _PROTOCOLS[protocol]
            and each.original.target_port == port
            and (address.is_unspecified or each.original.target == address)
            and (each.reply.source, each.reply.source_port) == (guest, guest_port)
        )

    return _end(guest.version, is_meant)


def end_connections_of(guest: Address) -> int:
    """End all connections from and to a guest; give how many. Raises HostError."""
    return _end(guest.version, lambda each: guest in (each.original.source, each.reply.source))


def _end(version: int, is_meant: Callable[[Connection], bool]) -> int:
    try:
        meant = list(filter(is_meant, list_connections(version)))
        return sum(_delete(version, connection) for connection in meant)
    except OSError as error:
        raise HostError(f"connections can't be ended: {error.strerror or error}") from error


def list_connections(version: int) -> Iterator[Connection]:
    """Give all that the kernel has of IPv4 or IPv6; raises OSError."""
    request = pack_message(_GET, 0, _header(version))
    for message in list_messages(NETLINK_NETFILTER, request):
        connection = _parse(message.body[_GENERIC.size :])
        if connection is not None:
            yield connection


def _header(version: int) -> bytes:
    return _GENERIC.pack(_FAMILIES[version], 0, 0)


def _delete(version: int, connection: Connection) -> bool:
    body = _header(version) + connection.key
    try:
        exchange(NETLINK_NETFILTER, pack_message(_DELETE, ACKNOWLEDGE, body))
    except OSError as error:
        if error.errno != errno.ENOENT:  # it has ended by itself
            raise
        return False
    return True


def _parse(attributes: bytes) -> Connection | None:
    original, reply = (find_attribute(attributes, kind) for kind in (_ORIGINAL, _REPLY))
    if original is None or reply is None:
        return None
    there, back = _parse_flow(original), _parse_flow(reply)
    if there is None or back is None:
        return None
    (status,) = struct.unpack("!I", find_attribute(attributes, _STATUS) or bytes(4))
    key = pack_nested(_ORIGINAL, original)
    # The number tells it from one that has come since, between the same two.
    for kind in (_ID, _ZONE):
        value = find_attribute(attributes, kind)
        if value is not None:
            key += pack_attribute(kind, value)
    return Connection(there, back, bool(status & _IS_REDIRECTED), key)


def _parse_flow(attributes: bytes) -> Flow | None:
    addresses = find_attribute(attributes, _ADDRESSES) or b""
    protocol = find_attribute(attributes, _PROTOCOL) or b""
    source, target = (_find_either(addresses, kinds) for kinds in (_SOURCES, _TARGETS))
    number = find_attribute(protocol, _NUMBER)
    if source is None or target is None or number is None:
        return None
    ports = [find_attribute(protocol, kind) for kind in (_SOURCE_PORT, _TARGET_PORT)]
    source_port, target_port = (int.from_bytes(port or b"", "big") for port in ports)
    return Flow(number[0], ip_address(source), source_port, ip_address(target), target_port)


def _find_either(attributes: bytes, kinds: tuple[int, int]) -> bytes | None:
    found = (find_attribute(attributes, kind) for kind in kinds)
    return next((value for value in found if value is not None), None)
