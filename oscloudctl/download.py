"""What the daemon sends, taken into a file that has its name only when it is whole.

Until then it is a `.part` file beside it. The daemon opens no file that a client names: who may
write there is the caller, so the caller writes.
"""

import contextlib
import errno
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from oscloudd.errors import AlreadyExistsError, ExhaustedError, HostError

# What is all zero in such a piece becomes a hole.
_HOLE_BYTES = 1 << 16
_ZEROS = bytes(_HOLE_BYTES)


class Download:
    """The file being written, None for standard output; a context manager that removes it
    unless it was kept.

    Raises HostError when it can't be written, and AlreadyExistsError when there is a file of that
    name and `force` is not given.
    """

    def __init__(self, target: str | None, *, force: bool) -> None:
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._shown, self._force = target or "standard output", force
        self._part: Path | None = None
        if target is None:
            self._fd = os.dup(sys.stdout.fileno())
            return
        self._path = Path(target).resolve()
        self._check_is_free()
        with _named(self._shown):
            beginning = f"{self._path.name[:200]}."
            self._fd, part = tempfile.mkstemp(".part", beginning, self._path.parent)
        self._part = Path(part)

    def __enter__(self) -> "Download":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)
        if self._part is not None:
            self._part.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Take one piece; raises HostError or ExhaustedError."""
        self._digest.update(piece)
        with _named(self._shown):
            for start in range(0, len(piece), _HOLE_BYTES):
                self._place(piece[start : start + _HOLE_BYTES])
        self.size_bytes += len(piece)

    def keep(self, size_bytes: int, sha256: str) -> None:
        """Give the file its name, if it is what the daemon says it has sent."""
        if (self.size_bytes, self._digest.hexdigest()) != (size_bytes, sha256):
            raise HostError(
                f"{self._shown} is not what the daemon has sent: {self.size_bytes} of "
                f"{size_bytes} bytes, or others",
                hint="try again",
            )
        if self._part is None:
            return
        self._check_is_free()
        with _named(self._shown):
            os.ftruncate(self._fd, self.size_bytes)
            os.fsync(self._fd)
            self._part.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # not every file system knows how
                os.fsync(directory)
            os.close(directory)

    def _check_is_free(self) -> None:
        if self._path.exists() and not self._path.is_file():
            raise HostError(f"{self._shown} is there already, and is no ordinary file")
        if self._path.exists() and not self._force:
            raise AlreadyExistsError(
                f"{self._shown} is there already", hint="add --force to replace it"
            )

    def _place(self, data: bytes) -> None:
        if self._part is not None and data == _ZEROS[: len(data)]:
            os.lseek(self._fd, len(data), os.SEEK_CUR)
            return
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


@contextlib.contextmanager
def _named(target: str) -> Iterator[None]:
    """Turn what the system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        failed = f"{target} can't be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExhaustedError(failed, hint="free some space", resource="disk") from error
        raise HostError(failed) from error
