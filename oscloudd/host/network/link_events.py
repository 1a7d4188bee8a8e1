"""Hearing from the kernel when a bridge of guests is removed; idle until then.

Owns a netlink socket in the group that changes of network interfaces are told to.
"""

import asyncio
import errno
import socket

from oscloudd.host.network.netlink import find_attribute, parse_messages

# linux/rtnetlink.h and if_link.h
_LINKS_GROUP = 1 << 0  # RTNLGRP_LINK
_DELETED = 17  # RTM_DELLINK
_NAME = 3
_LINK_BYTES = 16  # struct ifinfomsg, whose first byte is a family
_RECEIVE_BYTES = 1 << 20


class BridgeEvents:
    """Tells of the removal of interfaces with names that begin with `prefix`, whoever did it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.bind((0, _LINKS_GROUP))
        self._touched = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        """Hear no more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    async def touched(self) -> None:
        """Wait until one has been removed, since the last time."""
        await self._touched.wait()
        self._touched.clear()

    def touch(self) -> None:
        """Take one for removed."""
        self._touched.set()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.touch()  # what was lost may have been that
                continue
            for message in parse_messages(data):
                # Of the family of bridges, it is told of a port that leaves one.
                if message.kind == _DELETED and message.body[0] == socket.AF_UNSPEC:
                    name = find_attribute(message.body[_LINK_BYTES:], _NAME) or b""
                    if name.startswith(self._prefix):
                        self.touch()
