"""One client's connection: whole lines in, lines out, and never more in memory than is bounded.

Owns the transport, the input not yet asked for and the wait for a client that does not read. What
a line means is the server's affair. Asyncio's own streams read up to 384 KiB ahead a connection and
keep what a client does not read for as long as it likes.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from oscloudd.api.hangups import Hangups
from oscloudd.errors import EXIT_SOFTWARE, INVALID_REQUEST, CloudError, UnavailableError
from oscloudd.host.processes import PeerCredentials, peer_pid


@dataclass(frozen=True)
class Limits:
    """What clients may take of us: bytes, seconds, and how many at once."""

    # A request holds a few keys and a user_data file; nothing honest comes near.
    line_bytes: int = 1 << 20
    # What every connection may have sent ahead; a line beyond it waits for one of `long_lines`.
    short_line_bytes: int = 64 << 10
    long_lines: int = 16
    # From its first byte to its last; a client writes a request in one go.
    line_seconds: float = 60.0
    # Between two pieces of a file that a client sends; its disk may be slow.
    body_seconds: float = 300.0
    # Without the client taking a single byte of what waits for it.
    stalled_seconds: float = 60.0
    # A connection that has more than this to take is not told of progress.
    notification_bytes: int = 64 << 10
    # What all that do not read have waiting for them, together.
    unsent_bytes: int = 64 << 20
    connections: int = 4000


# Above it a connection counts as not reading: the kernel holds some 200 KiB more for it.
_HIGH_WATER_BYTES = 32 << 10


class Commons:
    """What the connections of one server share; the server closes it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.long_lines = asyncio.Semaphore(limits.long_lines)
        # Filled by the kernel and emptied at once, within one turn of the loop: one is enough.
        self.scratch = memoryview(bytearray(limits.short_line_bytes))
        self.hangups = Hangups()
        self._stalled: dict[Connection, None] = {}

    def enter_stall(self, connection: "Connection") -> None:
        """Count a client that does not read; those that have not for longest make room."""
        self._stalled[connection] = None
        total = sum(one.unsent_bytes for one in self._stalled)
        for one in list(self._stalled):
            if total <= self.limits.unsent_bytes:
                return
            total -= one.unsent_bytes
            one.abort()

    def leave_stall(self, connection: "Connection") -> None:
        """Count it no more. May be called twice."""
        self._stalled.pop(connection, None)

    def close(self) -> None:
        """Let go of what the kernel keeps for us."""
        self.hangups.close()


class BadLineError(CloudError):
    """A line that is not taken; `code` and `kind` are those of a request that is none."""

    kind, code, exit_status, http_status = "invalid_request", INVALID_REQUEST, EXIT_SOFTWARE, 400


class Connection(asyncio.BufferedProtocol):
    """One client; `on_made` and `on_lost` are its server's."""

    def __init__(
        self,
        commons: Commons,
        on_made: "Callable[[Connection], None]",
        on_lost: "Callable[[Connection], None]",
    ) -> None:
        self.limits = commons.limits
        # Set where an error leaves the client nothing to go on with.
        self.is_last_answer = False
        self._commons = commons
        self._on_made = on_made
        self._on_lost = on_lost
        self._input = bytearray()
        self._searched = 0
        self._capacity = commons.limits.short_line_bytes
        self._arrived = asyncio.Event()
        self._input_ended = False
        self._loop = asyncio.get_running_loop()
        self._writable: asyncio.Future[None] = self._loop.create_future()
        self._writable.set_result(None)
        self.gone: asyncio.Future[None] = self._loop.create_future()

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        self._socket = transport.get_extra_info("socket")
        self._descriptor = self._socket.fileno()
        self._commons.hangups.watch(self._descriptor, self._hang_up)
        self._on_made(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Give room for input: the common buffer, as much of it as this connection may fill."""
        return self._commons.scratch[: self._capacity - len(self._input)]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come in."""
        self._input += self._commons.scratch[:nbytes]
        self._arrived.set()
        self._adjust_reading()

    def eof_received(self) -> bool:
        """Note the end of input; the answer may still be waited for."""
        self._input_ended = True
        self._arrived.set()
        return True

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        self._writable = self._loop.create_future()
        self._commons.enter_stall(self)

    def resume_writing(self) -> None:
        """Note that it does again."""
        self._commons.leave_stall(self)
        if not self._writable.done():
            self._writable.set_result(None)

    def connection_lost(self, _error: Exception | None) -> None:
        """End whatever waits for this client."""
        self._commons.hangups.forget(self._descriptor)
        self._input_ended = True
        self._arrived.set()
        self.resume_writing()
        self._hang_up()
        self._on_lost(self)

    def _hang_up(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    # Input

    def credentials(self) -> PeerCredentials:
        """Tell who is there, as the kernel recorded it."""
        return peer_pid(self._socket)

    async def read_line(self) -> bytes | None:
        """Give the next line without its end, or None when there is none any more.

        Raises BadLineError or UnavailableError; the connection is of no use then.
        """
        while not self._input and not self._input_ended:
            await self._wait_for_input(None)
        limits = self.limits
        end = self._loop.time() + limits.line_seconds
        while (line := self._take_line()) is None and not self._input_ended:
            if len(self._input) >= limits.short_line_bytes:
                return await self._read_long_line(end)
            await self._wait_for_input(end)
        return line

    def begin_body(self) -> None:
        """Take nothing that comes from now on for a request.

        What a client has still to send when the work fails is none.
        """
        self.is_last_answer = True

    async def read_some(self, most_bytes: int) -> bytes:
        """Give what there is, at least one byte; b"" at the end of input.

        Raises UnavailableError when the client says nothing for long.
        """
        while not self._input and not self._input_ended:
            seconds = self.limits.body_seconds
            try:
                await self._wait_for_input(self._loop.time() + seconds)
            except BadLineError as error:
                raise UnavailableError(f"the client sent nothing for {seconds:g} s") from error
        chunk = bytes(self._input[:most_bytes])
        del self._input[: len(chunk)]
        self._adjust_reading()
        return chunk

    async def discard_input(self, seconds: float) -> None:
        """Read on without looking, so that a client in the middle of a line sees our answer."""
        end = self._loop.time() + seconds
        with suppress(BadLineError):
            while not self._input_ended:
                self._input.clear()
                self._searched = 0
                await self._wait_for_input(end)

    async def _read_long_line(self, end: float) -> bytes | None:
        await self._wait_for_turn(end)
        # One byte too many, and the line's end.
        self._capacity = self.limits.line_bytes + 2
        try:
            while (line := self._take_line()) is None and not self._input_ended:
                await self._wait_for_input(end)
            return line
        finally:
            self._commons.long_lines.release()
            self._capacity = self.limits.short_line_bytes
            self._adjust_reading()

    async def _wait_for_turn(self, end: float) -> None:
        limits = self.limits
        turn = asyncio.ensure_future(self._commons.long_lines.acquire())
        either: set[asyncio.Future[Any]] = {turn, self.gone}
        try:
            await asyncio.wait(
                either,
                timeout=end - self._loop.time(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if turn.done():
                return
        finally:
            turn.cancel()
        if self.gone.done():
            raise ConnectionResetError
        raise UnavailableError(
            f"{limits.long_lines} other requests of more than {limits.short_line_bytes} bytes are "
            f"still coming in, after {limits.line_seconds:g} s",
            hint="try again",
        )

    async def _wait_for_input(self, end: float | None) -> None:
        self._arrived.clear()
        self._adjust_reading()
        try:
            async with asyncio.timeout_at(end):
                await self._arrived.wait()
        except TimeoutError as error:
            raise BadLineError(
                f"the request is not complete {self.limits.line_seconds:g} s after its first byte"
            ) from error

    def _take_line(self) -> bytes | None:
        end = self._input.find(b"\n", self._searched)
        limit = self.limits.line_bytes
        if max(end, self._searched) > limit or (end < 0 and len(self._input) > limit):
            raise BadLineError(f"the line is longer than {limit} bytes")
        if end < 0:
            self._searched = len(self._input)
            return None
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        self._searched = 0
        self._adjust_reading()
        return line

    def _adjust_reading(self) -> None:
        if self._transport.is_closing() or self._input_ended:
            return
        if len(self._input) < self._capacity:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    # Output

    @property
    def unsent_bytes(self) -> int:
        """How much the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    @property
    def writable(self) -> "asyncio.Future[None]":
        """Done while the client reads, or is gone."""
        return self._writable

    def write_line(self, text: bytes) -> None:
        """Hand over one line for sending; `flush` is to follow."""
        if not self._transport.is_closing():
            self._transport.write(text + b"\n")

    def write_piece(self, piece: bytes) -> None:
        """Hand over bytes to be sent as they are, behind a line with their size; see `flush`."""
        if not self._transport.is_closing():
            line = b'{"jsonrpc":"2.0","method":"piece","params":{"size":%d}}\n' % len(piece)
            self._transport.writelines((line, piece))

    def notify(self, text: bytes) -> None:
        """Send a line that may be left out when the client does not read."""
        if self.unsent_bytes < self.limits.notification_bytes:
            self.write_line(text)

    async def flush(self) -> None:
        """Wait until the client has read nearly all; one that takes nothing at all is cut off.

        Raises ConnectionError when it is gone.
        """
        while not self._writable.done():
            before = self.unsent_bytes
            await asyncio.wait({self._writable}, timeout=self.limits.stalled_seconds)
            if not self._writable.done() and self.unsent_bytes >= before:
                self.abort()
        if self._transport.is_closing():
            raise ConnectionResetError

    # The end

    def close(self) -> None:
        """Close once the client has read everything, for which it has a while."""
        self._transport.close()
        if self.unsent_bytes:
            self._loop.call_later(self.limits.stalled_seconds, self._transport.abort)

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    async def become_streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Hand the bytes of this connection over, what has come in already among them."""
        self._transport.set_write_buffer_limits(high=0)
        await self.flush()
        self._commons.hangups.forget(self._descriptor)
        reader = asyncio.StreamReader()
        protocol = _Streams(reader, self)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        self._transport.set_write_buffer_limits()
        reader.feed_data(self._input)
        if self._input_ended:
            reader.feed_eof()
        else:
            self._transport.resume_reading()
        return reader, asyncio.StreamWriter(self._transport, protocol, reader, self._loop)


class _Streams(asyncio.StreamReaderProtocol):
    """Asyncio's own, whose end is the connection's."""

    def __init__(self, reader: asyncio.StreamReader, connection: Connection) -> None:
        super().__init__(reader)
        self._connection = connection

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell both."""
        super().connection_lost(exc)
        self._connection.connection_lost(exc)
