"""A guest's tap as a port of its bridge: the bridge is told who is behind it, and learns nothing.

What it learned from frames a guest could have forged: one to 01:80:c2:00:00:0e teaches it the
sender's address before any rule sees it, and takes a neighbour's frames away.
"""

import errno
import os
import socket
import struct

from oscloudd.errors import HostError
from oscloudd.host.network.interfaces import find_index, parse_mac
from oscloudd.host.network.netlink import (
    ACKNOWLEDGE,
    CREATE,
    REPLACE,
    exchange,
    pack_attribute,
    pack_message,
    pack_nested,
)

_NETLINK_ROUTE = 0
# linux/rtnetlink.h, if_link.h and neighbour.h
_RTM_SETLINK, _RTM_NEWNEIGH = 19, 28
_IFLA_MASTER, _IFLA_PROTINFO = 10, 12
_IFLA_BRPORT_LEARNING, _IFLA_BRPORT_UNICAST_FLOOD = 8, 9
_NDA_LLADDR = 2
_NUD_NOARP, _NTF_MASTER = 0x40, 0x04
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, index, state, flags, type


def join_bridge(tap: str, bridge: str) -> None:
    """Make `tap` a port of `bridge`, and of no other; may be called again. Raises OSError."""
    index, master = socket.if_nametoindex(tap), find_index(bridge)
    if master is None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    body += pack_attribute(_IFLA_MASTER, struct.pack("=I", master))
    exchange(_NETLINK_ROUTE, pack_message(_RTM_SETLINK, ACKNOWLEDGE, body))


def guard_port(tap: str, mac: str) -> None:
    """Have the bridge send frames for `mac`, and for no other guest, to the port `tap`.

    Raises HostError; may be called again.
    """
    try:
        index = socket.if_nametoindex(tap)
        exchange(_NETLINK_ROUTE, _pack_flags(index), _pack_address(index, parse_mac(mac)))
    except OSError as error:
        raise HostError(f"bridge port {tap} can't be set up: {error.strerror}") from error


def _pack_flags(index: int) -> bytes:
    flags = pack_nested(
        _IFLA_PROTINFO,
        pack_attribute(_IFLA_BRPORT_LEARNING, b"\0"),
        pack_attribute(_IFLA_BRPORT_UNICAST_FLOOD, b"\0"),
    )
    body = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0) + flags
    return pack_message(_RTM_SETLINK, ACKNOWLEDGE, body)


def _pack_address(index: int, mac: bytes) -> bytes:
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _NUD_NOARP, _NTF_MASTER, 0)
    body += pack_attribute(_NDA_LLADDR, mac)
    return pack_message(_RTM_NEWNEIGH, ACKNOWLEDGE | CREATE | REPLACE, body)
