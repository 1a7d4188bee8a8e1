"""The memory of a saved guest: open for qemu without a name, on disk with one.

qemu 7.2 opens a memory file read-write even where it maps it privately, and punches holes into it
when a guest gives memory back. A memfd with seals lets it have its way and keeps the bytes: the
kernel refuses to write, to punch and to resize, whoever asks. It also needs no right to any path.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.images import publish

_PIECE_BYTES = 1 << 20
_PAGE_BYTES = 4096
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def make_memory(size_bytes: int) -> int:
    """Give an empty, writable memory of that size for a guest to be saved; the caller closes it.

    `memory_path` of it is what `MachineFiles.memory` takes, with `memory_shared`.
    """
    descriptor = os.memfd_create("guest memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def memory_path(descriptor: int) -> Path:
    """Name an open memory for `MachineFiles.memory`; good while it is open, in this process."""
    return Path(f"/proc/self/fd/{descriptor}")


def seal_memory(descriptor: int) -> None:
    """Make a memory unchangeable for good; raises HostError while a qemu has it shared."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise HostError(f"a guest's memory can't be sealed: {error.strerror}") from error


def write_memory(descriptor: int, path: Path) -> str:
    """Write a memory to a durable, sparse file, mode 0600; give its SHA-256 (see `load_memory`).

    Blocks for as long as that takes (0.2 to 2 s). No qemu may have the memory any more. Raises
    HostError, and leaves no half-written file.
    """
    part = path.with_name(f"{path.name}.part")
    digest = _new_digest(os.fstat(descriptor).st_size)
    try:
        part.unlink(missing_ok=True)
        target = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(target, os.fstat(descriptor).st_size)
            for offset, run in _used_runs(descriptor):
                _write_at(target, run, offset)
                _digest_run(digest, offset, run)
        finally:
            os.close(target)
        publish(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise HostError(f"{path} can't be written: {error.strerror}") from error
    return digest.hexdigest()


def load_memory(path: Path, size_bytes: int, sha256: str) -> int:
    """Read a memory from its file, seal it, and give it; the caller closes it.

    Blocks. Any number of clones may be started from the one descriptor, which holds as much of the
    host's memory as the guest had in use. Raises HostError when the file is missing, has another
    size or another content.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{path} can't be opened: {error.strerror}") from error
    try:
        check_memory_size(source, path, size_bytes)
        return _load(source, path, size_bytes, sha256)
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error
    finally:
        os.close(source)


def check_memory_size(descriptor: int, path: Path, size_bytes: int) -> None:
    """Raise HostError unless a memory file has the size of the machine's memory.

    qemu would take a larger one, and make a smaller one of size 0 larger.
    """
    found = os.fstat(descriptor).st_size
    if found != size_bytes:
        raise HostError(f"{path} has {found} bytes, and the machine's memory {size_bytes}")


def _load(source: int, path: Path, size_bytes: int, sha256: str) -> int:
    digest = _new_digest(size_bytes)
    memory = make_memory(size_bytes)
    try:
        for offset, run in _used_runs(source):
            _write_at(memory, run, offset)
            _digest_run(digest, offset, run)
        if digest.hexdigest() != sha256:
            raise HostError(f"{path} is not what was written: its SHA-256 is another one")
        seal_memory(memory)
    except BaseException:
        os.close(memory)
        raise
    return memory


# The digest is of the pages that are not zero, each run of them with its place: the same for the
# same memory, however the file system has laid out its holes, and not slower for a larger guest.


def _new_digest(size_bytes: int) -> "hashlib._Hash":
    return hashlib.sha256(size_bytes.to_bytes(8, "big"))


def _digest_run(digest: "hashlib._Hash", offset: int, run: memoryview) -> None:
    digest.update(offset.to_bytes(8, "big"))
    digest.update(run)


def _used_runs(descriptor: int) -> Iterator[tuple[int, memoryview]]:
    """Give what is not zero of a file, as runs of whole pages within pieces of 1 MiB."""
    buffer = bytearray(_PIECE_BYTES)
    for piece in _data_pieces(descriptor):
        length = os.preadv(descriptor, [buffer], piece)
        yield from _runs_of(memoryview(buffer)[:length], piece)


def _data_pieces(descriptor: int) -> Iterator[int]:
    """Give the offsets of the pieces with data in them, by the file's holes."""
    end = 0
    while True:
        try:
            data = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # lseek(2): nothing but a hole until the end
                return
            raise
        hole = os.lseek(descriptor, data, os.SEEK_HOLE)
        first = max(end, data // _PIECE_BYTES * _PIECE_BYTES)
        for offset in range(first, hole, _PIECE_BYTES):
            yield offset
            end = offset + _PIECE_BYTES


def _runs_of(piece: memoryview, offset: int) -> Iterator[tuple[int, memoryview]]:
    zeros = bytes(_PAGE_BYTES)
    start = None
    for at in range(0, len(piece) + _PAGE_BYTES, _PAGE_BYTES):
        used = at < len(piece) and piece[at : at + _PAGE_BYTES] != zeros
        if used and start is None:
            start = at
        elif not used and start is not None:
            yield offset + start, piece[start:at]
            start = None


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
