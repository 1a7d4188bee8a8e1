"""Who has hung up: told at once, whatever the connection is busy with.

End of input does not tell: a client may close its writing side and still wait for the answer, and
a connection with input nobody wants yet is not read. The kernel reports a peer that is gone
entirely (EPOLLHUP, epoll_ctl(2)) without being asked for any event.
"""

import asyncio
import select
from collections.abc import Callable


class Hangups:
    """One epoll over all connections, itself watched by the event loop; its owner closes it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self._tell)

    def watch(self, descriptor: int, tell: Callable[[], None]) -> None:
        """Call `tell` once when the peer of this socket is gone."""
        self._told[descriptor] = tell
        self._epoll.register(descriptor, 0)

    def forget(self, descriptor: int) -> None:
        """Stop watching; must come before the socket is closed. May be called twice."""
        if self._told.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Watch nobody any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._told.clear()
        self._epoll.close()

    def _tell(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            tell = self._told.get(descriptor)
            self.forget(descriptor)
            if tell is not None:
                tell()
