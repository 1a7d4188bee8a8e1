"""The serial line of one guest: one connection to qemu, any number of people at it.

Owns the connection to qemu's serial socket, which serves a single client. What the guest prints is
written to the console log by qemu itself, also while no daemon is there; here it is only kept for
those who attach, and handed to them. Telnet is `telnet.py`,
the log's size `console_log.py`.
"""

import asyncio
import socket
from collections.abc import Callable

from oscloudd.errors import HostError, InvalidStateError

HISTORY_BYTES = 64 << 10

_CHUNK_BYTES = 64 << 10

# Someone this far behind is cut off: neither the guest nor the others wait for him.
BACKLOG_BYTES = 1 << 20

Translate = Callable[[bytes], bytes]


class Attachment:
    """One listener at a serial line; whoever attached closes it."""

    def __init__(self, console: "SerialConsole", history: bytes) -> None:
        self._console = console
        self._pending = bytearray(history)
        self._readable = asyncio.Event()
        self._ended = False
        self.cut_off = False
        if history:
            self._readable.set()

    async def read(self) -> bytes:
        """Give what the guest has printed since the last call; b"" is the end of the line.

        The end comes when qemu is gone, after `close`, or when this listener was too slow
        (`cut_off`); what was pending comes before it.
        """
        await self._readable.wait()
        data = bytes(self._pending)
        self._pending.clear()
        if not self._ended:
            self._readable.clear()
        return data

    async def write(self, data: bytes) -> None:
        """Type `data` at the guest; raise InvalidStateError when the line has ended."""
        await self._console.write(data)

    def close(self) -> None:
        """Stop listening. May be called twice."""
        self._console.forget(self)
        self.end()

    def take(self, data: bytes) -> None:
        """Queue what the guest printed, or end a listener that does not keep up."""
        if len(self._pending) + len(data) > BACKLOG_BYTES:
            self.cut_off = True
            self.close()
            return
        self._pending += data
        self._readable.set()

    def end(self) -> None:
        """Let `read` come to its end."""
        self._ended = True
        self._readable.set()


class SerialConsole:
    """The daemon's one connection to a guest's serial line; whoever opened it closes it.

    `history` is what the guest printed before: the end of the console log when a running qemu is
    adopted.
    """

    def __init__(self, connection: socket.socket, *, history: bytes = b"") -> None:
        self._socket = connection
        self._history = bytearray(history[-HISTORY_BYTES:])
        self._attachments: list[Attachment] = []
        self._carriers: set[asyncio.Task[None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()

    async def open(self) -> None:
        """Begin to read."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        except OSError as error:
            raise HostError("qemu's serial socket can't be used") from error
        self._task = asyncio.create_task(self._read(reader), name="serial console")

    @property
    def history(self) -> bytes:
        """The last 64 KiB the guest has printed."""
        return bytes(self._history)

    def attach(self, *, with_history: bool = False) -> Attachment:
        """Begin to listen; with `with_history` the last 64 KiB come first."""
        attachment = Attachment(self, self.history if with_history else b"")
        if self.closed.is_set():
            attachment.end()
        else:
            self._attachments.append(attachment)
        return attachment

    def attach_socket(self, *, with_history: bool = False) -> socket.socket:
        """Give one end of a socket pair that carries the line, for code that wants a descriptor.

        The caller closes it, and that ends the attachment.
        """
        attachment = self.attach(with_history=with_history)
        ours, theirs = socket.socketpair()
        task = asyncio.create_task(_carry_socket(attachment, ours), name="console socket")
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)
        return theirs

    async def write(self, data: bytes) -> None:
        """Type `data` at the guest; waits while the guest does not take it."""
        if self._writer is None or self.closed.is_set():
            raise InvalidStateError("the serial line has ended: its qemu is gone")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise InvalidStateError("the serial line has ended: its qemu is gone") from error

    def forget(self, attachment: Attachment) -> None:
        """Stop handing output to `attachment`; `Attachment.close` calls it."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)

    async def close(self) -> None:
        """Close the connection and end every attachment. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        self._end()
        for task in list(self._carriers):
            task.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                self._take(data)
        except OSError:
            return
        finally:
            self._end()

    def _take(self, data: bytes) -> None:
        self._history += data
        del self._history[:-HISTORY_BYTES]
        for attachment in list(self._attachments):
            attachment.take(data)

    def _end(self) -> None:
        self.closed.set()
        for attachment in list(self._attachments):
            attachment.close()


def _unchanged(data: bytes) -> bytes:
    return data


async def carry(
    attachment: Attachment,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    from_guest: Translate = _unchanged,
    to_guest: Translate = _unchanged,
) -> None:
    """Carry bytes between an attachment and a stream until either ends; closes the attachment.

    The stream stays open: it is its owner's.
    """
    directions = (
        asyncio.create_task(_carry_out(attachment, writer, from_guest)),
        asyncio.create_task(_carry_in(attachment, reader, to_guest)),
    )
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        attachment.close()
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)


async def _carry_out(
    attachment: Attachment, writer: asyncio.StreamWriter, translate: Translate
) -> None:
    while data := await attachment.read():
        writer.write(translate(data))
        await writer.drain()


async def _carry_in(
    attachment: Attachment, reader: asyncio.StreamReader, translate: Translate
) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        typed = translate(data)
        if typed:
            await attachment.write(typed)


async def _carry_socket(attachment: Attachment, connection: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        await carry(attachment, reader, writer)
    finally:
        writer.close()
