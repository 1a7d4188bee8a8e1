"""A file that comes in pieces from whoever has it: written with its holes, checked at its end.

The host's side of an upload; where the pieces come from is the caller's affair.
"""

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from oscloudd.errors import ExhaustedError, HostError, InvalidArgumentError
from oscloudd.host.checksums import Algorithm, Checksum
from oscloudd.host.resources import disk_free_bytes
from oscloudd.units import format_size

# One turn of a worker thread for so much.
_PIECE_BYTES = 1 << 20
# What is all zero in such a piece becomes a hole.
_HOLE_BYTES = 1 << 16
_REPORT_SECONDS = 0.1
_ZEROS = bytes(_HOLE_BYTES)


async def receive(
    body: AsyncIterator[bytes],
    destination: Path,
    *,
    expected: Checksum | None,
    least_free_bytes: int,
    on_progress: Callable[[int], None],
) -> Checksum:
    """Write what `body` gives to `destination`, and give its checksum; `on_progress` gets the
    bytes there are, ten times a second.

    Raises InvalidArgumentError for another digest than expected, ExhaustedError before less than
    `least_free_bytes` of the disk are free, and whatever `body` does. What is there then is the
    caller's to remove.
    """
    upload = await asyncio.to_thread(_Upload, destination, least_free_bytes, expected)
    try:
        piece, next_report = bytearray(), 0.0
        async for chunk in body:
            piece += chunk
            if len(piece) >= _PIECE_BYTES:
                await asyncio.to_thread(upload.write, bytes(piece))
                piece.clear()
                if time.monotonic() >= next_report:
                    next_report = time.monotonic() + _REPORT_SECONDS
                    on_progress(upload.size_bytes)
        await asyncio.to_thread(upload.write, bytes(piece))
        return upload.finish()
    finally:
        upload.close()


class _Upload:
    """The file being written; its methods block, and `close` lets go of it."""

    def __init__(self, path: Path, least_free_bytes: int, expected: Checksum | None) -> None:
        self.size_bytes = 0
        self._path = path
        self._least_free_bytes = least_free_bytes
        self._expected = expected
        self._algorithm: Algorithm = "sha256" if expected is None else expected.algorithm
        self._digest = hashlib.new(self._algorithm)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, piece: bytes) -> None:
        self._digest.update(piece)
        if disk_free_bytes(self._path) - len(piece) < self._least_free_bytes:
            raise _no_space(self._path, self._least_free_bytes)
        try:
            for start in range(0, len(piece), _HOLE_BYTES):
                self._place(piece[start : start + _HOLE_BYTES])
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(self._path, self._least_free_bytes) from error
            raise HostError(f"{self._path} can't be written: {error.strerror}") from error

    def _place(self, data: bytes) -> None:
        if data != _ZEROS[: len(data)]:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, self.size_bytes)
                self.size_bytes += written
                view = view[written:]
        else:
            self.size_bytes += len(data)

    def finish(self) -> Checksum:
        os.ftruncate(self._fd, self.size_bytes)
        found = Checksum(self._algorithm, self._digest.hexdigest())
        if self._expected is not None and self._expected != found:
            raise InvalidArgumentError(
                f"the file has {found}, but {self._expected.digest} was announced",
                hint="it is damaged, or another one than was meant",
                digest=found.digest,
                expected=self._expected.digest,
            )
        return found

    def close(self) -> None:
        os.close(self._fd)


def _no_space(path: Path, least_free_bytes: int) -> ExhaustedError:
    return ExhaustedError(
        f"there is not enough disk space for {path}: {format_size(least_free_bytes)} are to stay "
        "free",
        hint="free some, or lower [limits] min_free_disk in oscloud.toml",
        resource="disk",
    )
