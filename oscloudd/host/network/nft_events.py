"""Hearing from the kernel when somebody else changes our tables; idle until then.

Owns a netlink socket in the group that every change of nftables is told to.
"""

import contextlib
import socket
from collections.abc import Iterator

from oscloudd.host.network.kernel_events import KernelEvents
from oscloudd.host.network.netlink import Message, find_attribute
from oscloudd.host.network.set_elements import NETLINK_NETFILTER, SUBSYSTEM

# linux/netlink.h, asm-generic/socket.h and linux/netfilter/nfnetlink.h
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_NFTABLES_GROUP = 7
_NEW_GENERATION = SUBSYSTEM << 8 | 15  # closes the messages of one transaction
_GENERIC_BYTES = 4  # struct nfgenmsg
# The first attribute of tables, chains, rules, sets and lists of elements is the table's name.
_TABLE_ATTRIBUTE = 1

# The tables for ten thousand guests are told of in some 5 MB.
_BUFFER_BYTES = 16 << 20


class TableEvents(KernelEvents):
    """Tells of changes to our tables of one name that were not announced with `own_change`."""

    def __init__(self, table: str) -> None:
        super().__init__(NETLINK_NETFILTER)
        self._table = table.encode()
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES_GROUP)
        self._ours_to_come = 0
        self._is_ours = False
        self._begin()

    @contextlib.contextmanager
    def own_change(self) -> Iterator[None]:
        """Take the first transaction on our tables meanwhile for one of our own.

        Where another's came first, ours counts as another's: it is looked at once too often.
        """
        self._read()
        self._ours_to_come = 1
        try:
            yield
        finally:
            # The kernel has told of it before whoever asked for it had an answer.
            self._read()
            self._ours_to_come = 0

    def _lose(self) -> None:
        self._close_transaction()  # what was lost may have been about our tables

    def _hear(self, message: Message) -> None:
        if message.kind == _NEW_GENERATION and self._is_ours:
            self._close_transaction()
        elif message.kind != _NEW_GENERATION:
            attributes = message.body[_GENERIC_BYTES:]
            name = find_attribute(attributes, _TABLE_ATTRIBUTE) or b""
            self._is_ours = self._is_ours or name.rstrip(b"\0") == self._table

    def _close_transaction(self) -> None:
        self._is_ours = False
        if self._ours_to_come:
            self._ours_to_come -= 1
        else:
            self.touch()
