"""Disk space kept in reserve, for SQLite can't even DELETE on a full disk."""

import logging
import os
import threading
from pathlib import Path

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
# So much of its size must be free before it is laid in: it must never be what fills the disk.
_ROOM = 4


class Ballast:
    """A file of really allocated blocks beside the database; safe to use from several threads."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._lock = threading.Lock()

    def free(self) -> bool:
        """Give the space back to the disk; False if there is none to give."""
        with self._lock:
            try:
                self._path.unlink()
            except OSError:
                return False
        _log.warning("the disk is full: %s was given up to finish what was begun", self._path)
        return True

    def is_disk_full(self) -> bool:
        """Say whether less is free beside the database than the ballast would take."""
        return self._free_bytes() < self._size_bytes

    def refill(self) -> bool:
        """Lay it in unless it is there; False if there is too little space for that."""
        with self._lock:
            if self._is_whole():
                return True
            if self._free_bytes() < _ROOM * self._size_bytes:
                return False
            try:
                self._write()
            except OSError as error:
                self._path.unlink(missing_ok=True)
                _log.warning("no space could be kept in reserve as %s: %s", self._path, error)
                return False
            return True

    def _is_whole(self) -> bool:
        try:
            found = self._path.stat()
        except OSError:
            return False
        # st_blocks counts 512 bytes, see stat(2).
        return found.st_size >= self._size_bytes and found.st_blocks * 512 >= self._size_bytes

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize

    def _write(self) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, self._size_bytes)
            # A file system that compresses, or only promises blocks, holds random bytes in full.
            for begin in range(0, self._size_bytes, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, self._size_bytes - begin)
                os.pwrite(file, os.urandom(size), begin)
            os.fsync(file)
        finally:
            os.close(file)
