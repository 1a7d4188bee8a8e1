"""Disk images: overlays, conversion, and what an image says of itself.

The header of a stranger's image is judged by its bytes before qemu-img may open it: a qcow2 can
name any file of the host as its backing or data file. `qemu-img` always gets the format told.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.commands import CommandLimits, run

# docs/interop/qcow2.txt: version 2 has 72 bytes, version 3 adds feature bits from byte 72 on.
_HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3_FEATURES = struct.Struct(">QQQ")
_HEADER_BYTES = 112
_MAGIC = b"QFI\xfb"
_INCOMPATIBLE_DIRTY = 1 << 0
_INCOMPATIBLE_CORRUPT = 1 << 1
_INCOMPATIBLE_DATA_FILE = 1 << 2
_KNOWN_INCOMPATIBLE = 0b11111
# Larger than any vendor's cloud image by two orders of magnitude.
_MAX_DOWNLOADED_SIZE_BYTES = 1 << 40
# What OpenStack grants qemu-img for the same job (oslo.utils imageutils, CVE-2015-5162).
_INFO_LIMITS = CommandLimits(cpu_seconds=30, address_space_bytes=1 << 30)
_CONVERT_SECONDS = 1800
_PERCENT = re.compile(r"\(([0-9.]+)/100%\)")


@dataclass(frozen=True)
class ImageInfo:
    """What qemu-img says of an image; `actual_size_bytes` is what it takes on the host's disk."""

    virtual_size_bytes: int
    actual_size_bytes: int
    format: str
    backing: str | None


@dataclass(frozen=True)
class Qcow2Header:
    """The fields of a qcow2 header that decide whether the image may be opened."""

    version: int
    virtual_size_bytes: int
    cluster_bits: int
    backing_offset: int
    crypt_method: int
    incompatible_features: int


async def create_overlay(path: Path, base_path: Path, base_format: str, size_bytes: int) -> None:
    """Make a durable qcow2 of `size_bytes` at `path` that reads what it lacks from the base.

    The size must not be below the base's: the guest would lose the rest. Raises HostError when
    qemu-img fails, and leaves no half-made file.
    """
    try:
        await run(build_overlay_argv(path, base_path, base_format, size_bytes))
        await asyncio.to_thread(durable, path)
    except BaseException:
        _discard(path)
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


def build_overlay_argv(path: Path, base_path: Path, base_format: str, size_bytes: int) -> list[str]:
    """Give the command that makes an overlay."""
    # extended_l2: else a write of 4 KiB takes a whole cluster of 64, read from the base.
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-F", base_format]
    return [*argv, "-b", _name(base_path), _name(path), str(size_bytes)]


def virtual_size_bytes(path: Path, image_format: str) -> int:
    """Give how large a disk with this image is, without starting a program. Blocks, if briefly.

    For images that were judged before. Raises HostError, or InvalidArgumentError for no image.
    """
    try:
        if image_format == "raw":
            return path.stat().st_size
        return parse_qcow2_header(_read_header(path)).virtual_size_bytes
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error


async def image_info(path: Path, image_format: str) -> ImageInfo:
    """Ask qemu-img, under limits on its time and memory; a running vm may be using the image."""
    argv = ["qemu-img", "info", "-U", "-f", image_format, "--output=json", _name(path)]
    return parse_image_info(json.loads(await run(argv, limits=_INFO_LIMITS)))


def parse_image_info(answer: dict[str, Any]) -> ImageInfo:
    """Read what `qemu-img info --output=json` prints."""
    return ImageInfo(
        virtual_size_bytes=int(answer["virtual-size"]),
        actual_size_bytes=int(answer.get("actual-size", 0)),
        format=str(answer["format"]),
        backing=answer.get("full-backing-filename", answer.get("backing-filename")),
    )


async def convert(
    source: Path,
    source_format: str,
    destination: Path,
    destination_format: str = "qcow2",
    *,
    on_fraction: Callable[[float], None] | None = None,
    timeout_seconds: float = _CONVERT_SECONDS,
) -> None:
    """Write the image anew in another format; `destination` appears whole and durable or not."""
    part = destination.with_name(destination.name + ".part")

    def report(line: str) -> None:
        match = _PERCENT.search(line)
        if match is not None and on_fraction is not None:
            on_fraction(float(match[1]) / 100)

    try:
        argv = build_convert_argv(source, source_format, part, destination_format)
        await run(argv, timeout_seconds=timeout_seconds, on_line=report)
        await asyncio.to_thread(publish, part, destination)
    except BaseException:
        _discard(part)
        raise


def build_convert_argv(
    source: Path, source_format: str, destination: Path, destination_format: str
) -> list[str]:
    """Give the command that writes an image anew."""
    # Without -t it writes with cache=unsafe and drops the flushes.
    argv = ["qemu-img", "convert", "-p", "-t", "writeback", "-f", source_format]
    return [*argv, "-O", destination_format, _name(source), _name(destination)]


async def check_downloaded_image(path: Path, image_format: str) -> ImageInfo:
    """Judge a stranger's image: its header's bytes first, then qemu-img's word.

    Raises InvalidArgumentError with the reason when it may not be used.
    """
    if image_format == "qcow2":
        header = parse_qcow2_header(await asyncio.to_thread(_read_header, path))
        reason = find_danger(header)
        if reason is not None:
            raise InvalidArgumentError(f"image {path.name} is refused: {reason}")
    info = await image_info(path, image_format)
    if info.backing is not None or info.virtual_size_bytes > _MAX_DOWNLOADED_SIZE_BYTES:
        raise InvalidArgumentError(
            f"image {path.name} is refused: it is larger than 1 TiB or an overlay"
        )
    return info


def parse_qcow2_header(header: bytes) -> Qcow2Header:
    """Read the first bytes of a qcow2; raise InvalidArgumentError when they are none's."""
    if len(header) < _HEADER_V2.size or header[:4] != _MAGIC:
        raise InvalidArgumentError("this is not a qcow2 image: it does not start like one")
    fields = _HEADER_V2.unpack_from(header)
    version = fields[1]
    if version not in (2, 3) or (version == 3 and len(header) < 104):
        raise InvalidArgumentError(
            f"this qcow2 image has version {version}, not 2 or 3, or is cut off"
        )
    features = 0
    if version == 3:
        features = _HEADER_V3_FEATURES.unpack_from(header, _HEADER_V2.size)[0]
    return Qcow2Header(
        version=version,
        virtual_size_bytes=fields[5],
        cluster_bits=fields[4],
        backing_offset=fields[2],
        crypt_method=fields[6],
        incompatible_features=features,
    )


def find_danger(header: Qcow2Header) -> str | None:
    """Give why a downloaded image with this header may not be opened, or None."""
    features = header.incompatible_features
    dangers = (
        (header.backing_offset != 0, "it names a backing file"),
        (bool(features & _INCOMPATIBLE_DATA_FILE), "it keeps its data in another file"),
        (header.crypt_method != 0, "it is encrypted"),
        (bool(features & _INCOMPATIBLE_CORRUPT), "it is marked as corrupt"),
        (bool(features & _INCOMPATIBLE_DIRTY), "it was not closed properly"),
        (bool(features & ~_KNOWN_INCOMPATIBLE), "it needs features this program does not know"),
        (not 9 <= header.cluster_bits <= 21, "its cluster size is out of range"),
        (
            not 0 < header.virtual_size_bytes <= _MAX_DOWNLOADED_SIZE_BYTES,
            "its size is zero or above 1 TiB",
        ),
    )
    return next((reason for found, reason in dangers if found), None)


def durable(path: Path) -> None:
    """Make a file and its name survive a power cut; blocks for the disk."""
    _sync(path)
    _sync(path.parent)


def publish(part: Path, destination: Path) -> None:
    """Give a finished file its real name, so that a power cut leaves it whole or absent."""
    _sync(part)
    part.replace(destination)
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
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise HostError(f"{path} can't be written to disk: {error.strerror}") from error
    finally:
        os.close(fd)


def _read_header(path: Path) -> bytes:
    with path.open("rb") as image:
        return image.read(_HEADER_BYTES)
