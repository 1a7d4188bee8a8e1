"""A file sent behind a request, once the daemon has asked for it.

The daemon opens no file that a client names: who may read it is the caller, so the caller sends it.
What comes through a pipe has no size before its end: it goes in pieces, and the last one is empty.
"""

import contextlib
import os
import select
import socket
import stat
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

STANDARD_INPUT = "-"
_CHUNK_BYTES = 1 << 20
# As much as a pipe holds; the daemon takes pieces of up to 1 MiB.
_PIECE_BYTES = 1 << 16


class NotAFileError(Exception):
    """What was named is no ordinary file, or can't be read; says why."""


class Upload:
    """What is sent, open, and the thread that sends it; a context manager that closes both.

    `size_bytes` is None where nobody knows it: `source` is "-" then, and a pipe. Waits for the
    first byte of that, so that the daemon does not have to. Raises NotAFileError.
    """

    def __init__(self, source: str) -> None:
        self._descriptor, self.name = _open(source)
        self._first = b""
        self._stream: socket.socket | None = None
        self._thread: threading.Thread | None = None
        status = os.fstat(self._descriptor)
        self.size_bytes: int | None = None
        try:
            if stat.S_ISREG(status.st_mode):
                # What is before it, a shell's `read` has taken.
                position = os.lseek(self._descriptor, 0, os.SEEK_CUR)
                self.size_bytes = max(0, status.st_size - position)
            elif source == STANDARD_INPUT:
                self._first = _read_when_there(self._descriptor, None)
            if not self._first and not self.size_bytes:
                raise NotAFileError(f"{self.name} is empty, or no ordinary file")
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, OSError):
                raise NotAFileError(f"{self.name} can't be read: {error.strerror}") from error
            raise

    def __enter__(self) -> "Upload":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None and self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._stream.close()
        os.close(self._descriptor)

    @property
    def params(self) -> dict[str, Any]:
        """What the daemon is told of it."""
        how = {"pieces": True} if self.size_bytes is None else {"size": self.size_bytes}
        return {**how, "file_name": Path(self.name).name}

    def begin(self, stream: socket.socket) -> None:
        """Send the file on `stream`, in a thread: the answers have to be read meanwhile."""
        # Of its own: the client closes its own as soon as it has the answer.
        self._stream = stream.dup()
        self._stream.settimeout(None)
        self._thread = threading.Thread(target=self._send, args=(self._stream,), daemon=True)
        self._thread.start()

    def _send(self, stream: socket.socket) -> None:
        # Where it ends early, or the daemon has hung up, the daemon's answer says so.
        with contextlib.suppress(OSError):
            try:
                left = self._send_pieces(stream) if self.size_bytes is None else self._copy(stream)
            except OSError:
                left = 1
            if left:
                stream.shutdown(socket.SHUT_WR)

    def _copy(self, stream: socket.socket) -> int:
        """Send a file of known size; give how much of it was not there any more."""
        left = self.size_bytes or 0
        while left and (chunk := os.read(self._descriptor, min(left, _CHUNK_BYTES))):
            stream.sendall(chunk)
            left -= len(chunk)
        return left

    def _send_pieces(self, stream: socket.socket) -> int:
        piece = self._first
        while True:
            line = b'{"jsonrpc":"2.0","method":"piece","params":{"size":%d}}\n' % len(piece)
            stream.sendall(line + piece)
            if not piece:
                return 0
            piece = _read_when_there(self._descriptor, stream)


def _open(source: str) -> tuple[int, str]:
    """Open what is to be sent; give its descriptor and what to call it."""
    if source == STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.isatty():
            raise NotAFileError(
                "standard input is a terminal: send a file into it (… - < FILE), or name one"
            )
        return os.dup(sys.stdin.fileno()), "standard input"
    try:
        # A FIFO would keep us waiting for its other end.
        return os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), source
    except OSError as error:
        raise NotAFileError(f"{source} can't be read: {error.strerror}") from error


def _read_when_there(descriptor: int, stream: socket.socket | None) -> bytes:
    """Read from a pipe; raises ConnectionResetError when the daemon hangs up before."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if stream is not None:
        poll.register(stream, 0)
    ready = [number for number, _events in poll.poll()]
    if descriptor not in ready:
        raise ConnectionResetError
    return os.read(descriptor, _PIECE_BYTES)
