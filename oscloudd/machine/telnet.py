"""A guest's serial line on a telnet port of the loopback interface.

Owns the listening port and its connections. Speaks as much of telnet (RFC 854, 857, 858) as makes
a client send each key as it is typed and not echo it.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oscloudd.errors import HostError
from oscloudd.machine.console import SerialConsole, carry

_log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"

_IAC, _DONT, _DO, _WONT, _WILL, _SB, _SE = 255, 254, 253, 252, 251, 250, 240
_ECHO, _SUPPRESS_GO_AHEAD = 1, 3
_GREETING = bytes((_IAC, _WILL, _ECHO, _IAC, _WILL, _SUPPRESS_GO_AHEAD))
_CR, _LF, _NUL = 13, 10, 0

IsAllowed = Callable[[int], bool]
_State = Callable[[int, bytearray], Any]  # gives the next state; a type can't name itself


class TelnetInput:
    """Takes telnet's own commands out of what a client sends; keeps state between pieces."""

    def __init__(self) -> None:
        self._state: _State = self._data

    def feed(self, data: bytes) -> bytes:
        """Give what was typed; a line end is CR, as a terminal sends it."""
        typed = bytearray()
        for byte in data:
            self._state = self._state(byte, typed)
        return bytes(typed)

    def _data(self, byte: int, typed: bytearray) -> _State:
        if byte == _IAC:
            return self._command
        typed.append(byte)
        return self._after_cr if byte == _CR else self._data

    def _after_cr(self, byte: int, typed: bytearray) -> _State:
        return self._data if byte in (_NUL, _LF) else self._data(byte, typed)

    def _command(self, byte: int, typed: bytearray) -> _State:
        if byte == _IAC:
            typed.append(_IAC)
            return self._data
        if byte == _SB:
            return self._negotiation
        return self._option if byte in (_WILL, _WONT, _DO, _DONT) else self._data

    def _option(self, _byte: int, _typed: bytearray) -> _State:
        return self._data

    def _negotiation(self, byte: int, _typed: bytearray) -> _State:
        return self._negotiation_command if byte == _IAC else self._negotiation

    def _negotiation_command(self, byte: int, _typed: bytearray) -> _State:
        return self._data if byte == _SE else self._negotiation


class TelnetServer:
    """The telnet port of one serial line; whoever started it closes it.

    `is_allowed` is asked with the uid of whoever connects: a loopback port has no permissions of
    its own, and an open root shell on the line would be everybody's.
    """

    def __init__(self, console: SerialConsole, port: int, is_allowed: IsAllowed) -> None:
        self._console = console
        self._port = port
        self._is_allowed = is_allowed
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to listen; raise HostError when the port can't be had."""
        try:
            self._server = await asyncio.start_server(self._serve, ADDRESS, self._port)
        except OSError as error:
            raise HostError(
                f"serial port {ADDRESS}:{self._port} can't be opened: {error}"
            ) from error

    async def close(self) -> None:
        """Close the port and its connections. May be called twice."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._talk(reader, writer)
        except (OSError, asyncio.CancelledError):
            # Ours alone to cancel, in close(); asyncio's callback on this task logs a cancellation.
            return
        finally:
            self._connections.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = find_peer_uid(writer.get_extra_info("socket"))
        if uid is None or not self._is_allowed(uid):
            _log.warning("uid %s refused at serial port %d", uid, self._port)
            writer.write(b"This serial line is not yours.\r\n")
            return
        writer.write(_GREETING)
        await carry(
            self._console.attach(with_history=True),
            reader,
            writer,
            from_guest=lambda data: data.replace(b"\xff", b"\xff\xff"),
            to_guest=TelnetInput().feed,
        )


def find_peer_uid(connection: socket.socket) -> int | None:
    """Give the uid at the other end of a loopback connection, from /proc/net/tcp (proc(5))."""
    local, remote = (
        _proc_address(connection.getsockname()),
        _proc_address(connection.getpeername()),
    )
    lines = Path("/proc/self/net/tcp").read_text(encoding="ascii").splitlines()
    for fields in (line.split() for line in lines[1:]):
        if (fields[1], fields[2]) == (remote, local):
            return int(fields[7])
    return None


def _proc_address(address: tuple[str, int]) -> str:
    # The address is printed as one number in the processor's own byte order.
    host = int.from_bytes(socket.inet_aton(address[0]), "little")
    return f"{host:08X}:{address[1]:04X}"
