"""Being told by the kernel that somebody took a table of ours, or a part of it, away.

Costs nothing while nobody changes nft's rules. How it is put back is the listener's.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

from oscloudd.errors import CloudError

_log = logging.getLogger(__name__)

# linux/netlink.h, linux/netfilter/nfnetlink.h and nf_tables.h
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_NEWTABLE = 0
_NEWGEN = 15  # the end of a transaction
# Tables, chains, rules, sets, elements; the first attribute of each names its table.
_DELETIONS = (2, 5, 8, 11, 14)
_TABLE_NAME = 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# A whole ruleset may be flushed at once; what does not fit is told as ENOBUFS.
_RECEIVE_BYTES = 1 << 20


class TableWatch:
    """Has `put_back` done after each transaction that left less of a table than it found.

    One that makes the table anew at its end, as ours do, is none. `family` is a number of
    linux/netfilter.h.
    """

    def __init__(self, family: int, table: str, put_back: Callable[[], Awaitable[None]]) -> None:
        self._family = family
        self._table = table.encode()
        self._put_back = put_back
        self._putting_back: set[asyncio.Task[None]] = set()
        self._is_lost = False
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen from now on, in the network namespace of the caller; raises OSError."""
        flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, flags, _NETLINK_NETFILTER)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    async def close(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for task in self._putting_back:
            task.cancel()
        await asyncio.gather(*self._putting_back, return_exceptions=True)

    def _on_loss(self) -> None:
        task = asyncio.create_task(self._answer_loss())
        self._putting_back.add(task)
        task.add_done_callback(self._putting_back.discard)

    async def _answer_loss(self) -> None:
        try:
            await self._put_back()
        except CloudError as error:
            _log.warning("table %s can't be put back: %s", self._table.decode(), error.message)

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:  # ENOBUFS: what was told in between is not known
            _log.debug("nft's changes: %s", error)
            self._on_loss()
            return
        self.take(data)

    def take(self, data: bytes) -> None:
        """Read what the kernel has sent."""
        for message, family, table in parse_changes(data):
            if message == _NEWGEN:
                if self._is_lost:
                    self._on_loss()
                self._is_lost = False
            elif (family, table) == (self._family, self._table):
                if message in _DELETIONS:
                    self._is_lost = True
                elif message == _NEWTABLE:
                    self._is_lost = False


def parse_changes(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Give the number, family and table of each message of nf_tables in netlink's bytes."""
    while len(data) >= _HEADER.size + 4:
        length, kind, *_ = _HEADER.unpack_from(data)
        if kind >> 8 == _NFNL_SUBSYS_NFTABLES:
            yield kind & 0xFF, data[_HEADER.size], _table_of(data[_HEADER.size + 4 : length])
        data = data[max(length + 3 & ~3, _HEADER.size) :]


def _table_of(attributes: bytes) -> bytes:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _TABLE_NAME:
            return attributes[_ATTRIBUTE.size : length].rstrip(b"\0")
        attributes = attributes[max(length + 3 & ~3, _ATTRIBUTE.size) :]
    return b""
