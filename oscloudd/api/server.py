"""The socket: one JSON text a line both ways, each connection a caller known by the kernel's word.

Owns the listening socket's file and every connection. Requests of one connection are answered in
order; `vm_console` turns its connection into the guest's serial line.
"""

import asyncio
import grp
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit

import msgspec

from oscloudd.api.caller import Caller
from oscloudd.api.connection import BadLineError, Commons, Connection, Limits
from oscloudd.api.dispatch import Dispatcher, error_answer
from oscloudd.api.listener import Listener
from oscloudd.errors import UnavailableError
from oscloudd.host.processes import PeerCredentials
from oscloudd.machine.console import Attachment, carry

_log = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
_DISCARD_SECONDS = 1.0


def bind_socket(path: Path, group: str) -> socket.socket:
    """Bind the socket as 0660 from its first instant on, for `group` where the host has it.

    The caller must hold the daemon's lock: a file left by a dead daemon is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    # A chmod after the bind would leave a moment in which anybody could connect.
    before = os.umask(0o117)
    try:
        # An address holds 108 bytes at most (unix(7)); a path through a descriptor always fits.
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.umask(before)
        os.close(directory)
    with suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    return listener


class Server:
    """Serves one dispatcher on one socket; `main` starts and stops it."""

    def __init__(self, dispatcher: Dispatcher, limits: Limits | None = None) -> None:
        self._dispatcher = dispatcher
        self._limits = limits or Limits()
        self._most = self._limits.connections
        self._listener: Listener | None = None
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_full = False

    async def start(self, listener: socket.socket) -> None:
        """Begin to take connections."""
        # The other half is for vms, which take about eight descriptors each.
        self._most = min(self._limits.connections, getrlimit(RLIMIT_NOFILE)[0] // 2)
        self._commons = Commons(self._limits)
        self._listener = Listener(
            listener, lambda: Connection(self._commons, self._begin, self._open.discard)
        )

    async def stop(self) -> None:
        """Take no more connections and end those there are."""
        if self._listener is None:
            return
        await self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()
        self._commons.close()

    def _begin(self, connection: Connection) -> None:
        self._open.add(connection)
        if is_full := len(self._open) > self._most:
            full = UnavailableError(
                f"{self._most} connections are open, which is all there may be",
                hint="close some, or try again later",
            )
            connection.write_line(error_answer(full))
            connection.close()
        else:
            task = asyncio.create_task(self._serve(connection), name="connection")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if is_full and not self._is_full:
            _log.warning("%d connections are open: no more are taken", self._most)
        self._is_full = is_full

    async def _serve(self, connection: Connection) -> None:
        try:
            credentials = connection.credentials()
            _log.debug("connection of uid %d, pid %d", credentials.uid, credentials.pid)
            await self._talk(connection, credentials)
        except (BadLineError, UnavailableError) as error:
            connection.write_line(error_answer(error))
            await connection.discard_input(_DISCARD_SECONDS)
        except ConnectionError:
            return  # the client hung up
        finally:
            connection.close()

    async def _talk(self, connection: Connection, credentials: PeerCredentials) -> None:
        while (line := await connection.read_line()) is not None:
            if line.strip():
                await self._answer(line, connection, credentials)
                if connection.is_last_answer:
                    return
            # Lines that are answered at once would keep everybody else waiting.
            await asyncio.sleep(0)

    async def _answer(
        self, line: bytes, connection: Connection, credentials: PeerCredentials
    ) -> None:
        """Answer one request, and whatever it turns the connection into."""
        caller = Caller(credentials, connection, self._dispatcher.event_stream)
        _log.info("uid %d pid %d: %.200r", credentials.uid, credentials.pid, _method_of(line))
        answer = await self._dispatcher.answer(line, caller)
        if answer is not None:
            connection.write_line(answer)
        if caller.attachment is not None:
            connection.is_last_answer = True
            await _carry_console(caller.attachment, connection)
        elif not connection.is_last_answer:
            await connection.flush()


async def _carry_console(attachment: Attachment, connection: Connection) -> None:
    try:
        reader, writer = await connection.become_streams()
        await carry(attachment, reader, writer)
    finally:
        attachment.close()


def _method_of(line: bytes) -> str:
    """Name the method for the log; parameters hold passwords and are not for it."""
    try:
        return str(msgspec.json.decode(line, type=_Named).method)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError):
        return "?"


class _Named(msgspec.Struct):
    method: str = "?"
