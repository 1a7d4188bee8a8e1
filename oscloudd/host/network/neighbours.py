"""The host's neighbour table: which hardware address a guest's address has.

The daemon knows it before the guest does, so the first packet need not ask.
"""

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from oscloudd.errors import HostError
from oscloudd.host.network.interfaces import find_index, parse_mac
from oscloudd.host.network.netlink import (
    ACKNOWLEDGE,
    CREATE,
    REPLACE,
    exchange,
    pack_attribute,
    pack_message,
)

# linux/rtnetlink.h and neighbour.h
_NEW, _DELETE = 28, 29
_TARGET, _HARDWARE = 1, 2
_PERMANENT = 0x80
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def set_neighbour(interface: str, address: IPv4Address | IPv6Address, mac: str) -> None:
    """Say for good that `address` behind `interface` has the hardware address `mac`.

    Of an IPv6 address nothing is said to a kernel that has none of it (`ipv6.disable=1`).
    """
    hardware = pack_attribute(_HARDWARE, parse_mac(mac))
    try:
        index = socket.if_nametoindex(interface)
        body = _pack(index, address, _PERMANENT) + hardware
        message = pack_message(_NEW, ACKNOWLEDGE | CREATE | REPLACE, body)
        exchange(socket.NETLINK_ROUTE, message)
    except OSError as error:
        if _is_without(error, address):
            return
        raise HostError(
            f"neighbour {address} of {interface} can't be set: {error.strerror or error}"
        ) from error


def delete_neighbour(interface: str, address: IPv4Address | IPv6Address) -> None:
    """Forget what `set_neighbour` said; nothing happens when there is nothing to forget."""
    index = find_index(interface)
    if index is None:
        return
    try:
        message = pack_message(_DELETE, ACKNOWLEDGE, _pack(index, address, 0))
        exchange(socket.NETLINK_ROUTE, message)
    except OSError as error:
        is_gone = error.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT)
        if not is_gone and not _is_without(error, address):
            raise HostError(
                f"neighbour {address} of {interface} can't be deleted: {error.strerror}"
            ) from error


def _is_without(error: OSError, address: IPv4Address | IPv6Address) -> bool:
    """Tell whether the kernel knows no IPv6 at all, which this is about."""
    return address.version == 6 and error.errno == errno.EAFNOSUPPORT


def _pack(index: int, address: IPv4Address | IPv6Address, state: int) -> bytes:
    header = _NEIGHBOUR.pack(_FAMILIES[address.version], index, state, 0, 0)
    return header + pack_attribute(_TARGET, address.packed)
