"""Hearing from the kernel when a bridge of guests is removed; idle until then.

Owns a netlink socket in the group that changes of network interfaces are told to.
"""

import socket

from oscloudd.host.network.kernel_events import KernelEvents
from oscloudd.host.network.netlink import Message, find_attribute

# linux/rtnetlink.h and if_link.h
_LINKS_GROUP = 1 << 0  # RTNLGRP_LINK
_DELETED = 17  # RTM_DELLINK
_NAME = 3
_LINK_BYTES = 16  # struct ifinfomsg, whose first byte is a family


class BridgeEvents(KernelEvents):
    """Tells of the removal of interfaces with names that begin with `prefix`, whoever did it."""

    def __init__(self, prefix: str) -> None:
        super().__init__(socket.NETLINK_ROUTE)
        self._prefix = prefix.encode()
        self._socket.bind((0, _LINKS_GROUP))
        self._begin()

    def _lose(self) -> None:
        self.touch()  # what was lost may have been that

    def _hear(self, message: Message) -> None:
        # Of the family of bridges, it is told of a port that leaves one.
        if message.kind == _DELETED and message.body[0] == socket.AF_UNSPEC:
            name = find_attribute(message.body[_LINK_BYTES:], _NAME) or b""
            if name.startswith(self._prefix):
                self.touch()
