"""A file sent behind a request, once the daemon has asked for it.

The daemon opens no file that a client names: who may read it is the caller, so the caller sends it.
"""

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path
from types import TracebackType

_CHUNK_BYTES = 1 << 20


class NotAFileError(Exception):
    """What was named is no ordinary file, or can't be read; says why."""


class Upload:
    """One open file and the thread that sends it; a context manager that closes both."""

    def __init__(self, path: Path) -> None:
        try:
            # A FIFO would keep us waiting for its other end.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise NotAFileError(f"{path} can't be read: {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            os.close(descriptor)
            raise NotAFileError(f"{path} is empty, or no ordinary file")
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.size_bytes = status.st_size
        self._stream: socket.socket | None = None
        self._thread: threading.Thread | None = None

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
        self._file.close()

    def begin(self, stream: socket.socket) -> None:
        """Send the file on `stream`, in a thread: the answers have to be read meanwhile."""
        # Of its own: the client closes its own as soon as it has the answer.
        self._stream = stream.dup()
        self._stream.settimeout(None)
        self._thread = threading.Thread(target=self._send, args=(self._stream,), daemon=True)
        self._thread.start()

    def _send(self, stream: socket.socket) -> None:
        left = self.size_bytes
        # Where it ends early, or the daemon has hung up, the daemon's answer says so.
        with contextlib.suppress(OSError), stream:
            while left and (chunk := self._file.read(min(left, _CHUNK_BYTES))):
                stream.sendall(chunk)
                left -= len(chunk)
            if left:
                stream.shutdown(socket.SHUT_WR)
