"""Disk images: overlays, sizes, and files that survive a power cut.

`qemu-img` always gets the format told. Whether a stranger's image may be used is judged in
`image_check`; what is here is for those that were.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.commands import run
from oscloudd.host.image_header import HEADER_BYTES, parse_qcow2_header

# extended_l2: else a write of 4 KiB to an overlay takes a whole cluster of 64, read from the base.
_CREATE_ARGV = ("qemu-img", "create", "-q", "-o", "extended_l2=on", "-f", "qcow2")
# A firmware writes its variables a few times a boot; 0.5 MB are read in a millisecond.
_MOST_READINGS = 100


async def create_overlay(path: Path, base_path: Path, base_format: str, size_bytes: int) -> None:
    """Make a durable qcow2 of `size_bytes` at `path` that reads what it lacks from the base.

    The size must not be below the base's: the guest would lose the rest. Raises HostError when
    there is no base or qemu-img fails, and leaves no half-made file.
    """
    _check_base(base_path)
    await _create(path, lambda part: build_overlay_argv(part, base_path, base_format, size_bytes))


async def create_empty(path: Path, size_bytes: int) -> None:
    """Make a durable qcow2 of `size_bytes` at `path` that reads as zeros.

    Raises HostError when qemu-img fails, and leaves no half-made file.
    """
    await _create(path, lambda part: [*_CREATE_ARGV, _name(part), str(size_bytes)])


async def _create(path: Path, build_argv: Callable[[Path], list[str]]) -> None:
    # A qemu-img that a dead daemon has left behind may be at it still: to each a name of its own.
    for stale in path.parent.glob(f".{path.name}.*.part"):
        _discard(stale)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        await run(build_argv(part))
        await asyncio.to_thread(publish, part, path)
    except BaseException:
        _discard(part)
        raise


def copy_overlay(path: Path, blank: Path) -> None:
    """Make a durable overlay at `path` from one that nothing was ever written to. Blocks.

    It has that one's base and size. `qemu-img` takes ten times as long. Raises HostError, and
    leaves no half-made file.
    """
    try:
        shutil.copyfile(blank, path)
        durable(path)
    except OSError as error:
        _discard(path)
        raise HostError(f"{path} can't be written: {error.strerror}") from error


def copy_steady(source: Path, destination: Path) -> None:
    """Make a durable copy of a small file that a machine may be writing to, as it was at one
    moment. Blocks.

    Two readings in a row that are the same are what was there between them. Raises HostError, and
    leaves no half-made file.
    """
    part = destination.with_name(f".{destination.name}.part")
    try:
        content = source.read_bytes()
        for _ in range(_MOST_READINGS):
            before, content = content, source.read_bytes()
            if content == before:
                break
        else:
            raise HostError(f"{source} is being written to all the time", hint="try again")
        part.write_bytes(content)
    except OSError as error:
        _discard(part)
        raise HostError(f"{source} can't be copied: {error.strerror}") from error
    publish(part, destination)


def build_overlay_argv(path: Path, base_path: Path, base_format: str, size_bytes: int) -> list[str]:
    """Give the command that makes an overlay."""
    # -u: it would open the base, as root, and that may be a stranger's.
    argv = [*_CREATE_ARGV, "-u", "-F", base_format, "-b", _name(base_path)]
    return [*argv, _name(path), str(size_bytes)]


def virtual_size_bytes(path: Path, image_format: str) -> int:
    """Give how large a disk with this image is, without starting a program. Blocks, if briefly.

    For images that were judged before. Raises HostError, or InvalidArgumentError for no image.
    """
    try:
        if image_format == "raw":
            return path.stat().st_size
        with path.open("rb") as image:
            return parse_qcow2_header(image.read(HEADER_BYTES)).virtual_size_bytes
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error


def _check_base(path: Path) -> None:
    if not path.is_file():
        raise HostError(f"there is no {path} for a disk to stand on")


def durable(path: Path) -> None:
    """Make a file and its name survive a power cut; blocks for the disk."""
    _sync(path)
    _sync(path.parent)


def publish(part: Path, destination: Path) -> None:
    """Give a finished file its real name, so that a power cut leaves it whole or absent.

    Raises HostError.
    """
    _sync(part)
    try:
        part.replace(destination)
    except OSError as error:
        raise HostError(f"{destination} can't be written: {error.strerror}") from error
    _sync(destination.parent)


def sha256_of(path: Path) -> str:
    """Give a file's SHA-256, in hexadecimal; blocks. Raises HostError when it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error


def _name(path: Path) -> str:
    # qemu-img takes "word:rest" for a protocol; a name that starts with a slash is always a file.
    return str(path.absolute())


def _discard(path: Path) -> None:
    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"{path} can't be written to disk: {error.strerror}") from error
