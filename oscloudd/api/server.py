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

import msgspec

from oscloudd.api.caller import Caller
from oscloudd.api.dispatch import Dispatcher, error_answer
from oscloudd.cloud.jobs import Progress
from oscloudd.errors import INVALID_REQUEST
from oscloudd.host.processes import PeerCredentials, peer_pid
from oscloudd.machine.console import carry

_log = logging.getLogger(__name__)

# A request holds a few keys and a user_data file; nothing honest comes near.
LINE_LIMIT_BYTES = 1 << 20
# asyncio's default of 100 refused 499 of 1000 connections made at once.
_BACKLOG = 1024
_STOP_SECONDS = 5.0
_encoder = msgspec.json.Encoder()


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

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Begin to take connections."""
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=LINE_LIMIT_BYTES, backlog=_BACKLOG
        )

    async def stop(self) -> None:
        """Take no more connections and end those there are."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            credentials = peer_pid(writer.get_extra_info("socket"))
            _log.debug("connection of uid %d, pid %d", credentials.uid, credentials.pid)
            await self._talk(reader, writer, credentials)
        except (ConnectionError, asyncio.CancelledError):
            return  # the client hung up, or stop() did
        finally:
            self._connections.discard(task)
            writer.close()

    async def _talk(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        credentials: PeerCredentials,
    ) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                message = f"the line is longer than {LINE_LIMIT_BYTES} bytes"
                await _write(writer, error_answer(INVALID_REQUEST, "invalid_request", message))
                await _drain_input(reader)
                return
            if line.strip() and not await self._answer(line, reader, writer, credentials):
                return

    async def _answer(
        self,
        line: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        credentials: PeerCredentials,
    ) -> bool:
        """Answer one request; False when the connection is used up."""

        def tell(progress: Progress) -> None:
            if not writer.is_closing():
                notification = {"jsonrpc": "2.0", "method": "progress", "params": progress}
                writer.write(_encoder.encode(notification) + b"\n")

        caller = Caller(credentials, tell)
        _log.info("uid %d pid %d: %.200r", credentials.uid, credentials.pid, _method_of(line))
        answer = await self._dispatcher.answer(line, caller)
        if answer is not None:
            await _write(writer, answer)
        if caller.attachment is None:
            return True
        await carry(caller.attachment, reader, writer)
        return False


async def _write(writer: asyncio.StreamWriter, answer: bytes) -> None:
    writer.write(answer + b"\n")
    await writer.drain()


async def _drain_input(reader: asyncio.StreamReader) -> None:
    # Closing with input unread resets the connection, and the client would not see the answer.
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while await reader.read(LINE_LIMIT_BYTES):
                pass


def _method_of(line: bytes) -> str:
    """Name the method for the log; parameters hold passwords and are not for it."""
    try:
        return str(msgspec.json.decode(line, type=_Named).method)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError):
        return "?"


class _Named(msgspec.Struct):
    method: str = "?"
