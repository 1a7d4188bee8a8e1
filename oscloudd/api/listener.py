"""Taking connections: many in one turn of the loop, and a pause where descriptors have run out.

Asyncio's own accepts as many in one go as the backlog is long, and where there are no descriptors
it fails, and complains with a traceback, as often.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

_log = logging.getLogger(__name__)

# asyncio's default of 100 refused 499 of 1000 connections made at once.
_BACKLOG = 1024
_AT_ONCE = 128
_PAUSE_SECONDS = 1.0


class Listener:
    """Makes a protocol of each connection to a bound socket, which it closes at its end."""

    def __init__(
        self, bound: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._socket = bound
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        bound.settimeout(0)
        bound.listen(_BACKLOG)
        self._resume()

    async def close(self) -> None:
        """Take no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("no connections are taken for %g s: %s", _PAUSE_SECONDS, error)
                self._loop.remove_reader(self._socket)
                self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)
                return
            client.settimeout(0)
            begin = self._loop.connect_accepted_socket(self._make_protocol, client)
            task: asyncio.Task[object] = asyncio.create_task(begin, name="new connection")
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)
