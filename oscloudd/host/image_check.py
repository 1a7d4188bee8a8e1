"""Whether a stranger's image may be used: its own bytes first, then qemu-img's word.

qemu-img is asked only about what our own reading let pass; as an unprivileged user, under limits,
on a descriptor and with the format told, so that nothing in the file decides what is opened.
"""

import asyncio
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.commands import CommandLimits, run
from oscloudd.host.image_formats import HEAD_BYTES, TAIL_BYTES, Kind, find_kind, has_boot_sector
from oscloudd.host.image_header import MAX_SIZE_BYTES, judge_qcow2

ImageFormat = Literal["qcow2", "raw"]

# It needs 0.02 s and 200 MiB for an honest image. The memory is what OpenStack grants it for the
# same job (oslo.utils imageutils, CVE-2015-5162).
_LIMITS = CommandLimits(cpu_seconds=2, address_space_bytes=1 << 30)


@dataclass(frozen=True)
class Judged:
    """What an image that passed is."""

    format: ImageFormat
    virtual_size_bytes: int


async def check_image(
    path: Path, said: ImageFormat | None, user: str | None, *, called: str = ""
) -> Judged:
    """Judge a stranger's image, said to be of a format, or None to have it recognised.

    `user` is who asks qemu-img about it, and must be allowed to read the file if not its directory;
    `called` is its name for people. Raises InvalidArgumentError with the reason when it may not be
    used.
    """
    try:
        judged = await asyncio.to_thread(judge_image, path, said)
        await _ask_qemu_img(path, judged, user)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"image {called or path.name} is refused: {error.message}",
            hint=error.hint,
            parameter="image",
        ) from error
    return judged


def judge_image(path: Path, said: ImageFormat | None) -> Judged:
    """Judge an image by its bytes alone, starting no program. Blocks.

    Raises InvalidArgumentError with the reason, and HostError when it can't be read.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                raise InvalidArgumentError("it is empty, or no ordinary file")
            return _judge(file, status.st_size, said)
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error


def _judge(file: IO[bytes], file_bytes: int, said: ImageFormat | None) -> Judged:
    head = file.read(HEAD_BYTES)
    file.seek(max(0, file_bytes - TAIL_BYTES))
    image_format = _decide(said, find_kind(head, file.read(TAIL_BYTES)), head)
    if file_bytes > MAX_SIZE_BYTES:
        raise InvalidArgumentError("the file itself is longer than 1 TiB")
    if image_format == "raw":
        return Judged("raw", file_bytes)
    return Judged("qcow2", judge_qcow2(file, file_bytes).virtual_size_bytes)


def _decide(said: ImageFormat | None, found: Kind | None, head: bytes) -> ImageFormat:
    """Give the format that a file is taken as: what it was said to be, if it can be that."""
    if found is not None and found.name == "qcow2" and said != "raw":
        return "qcow2"
    if found is not None:
        what = f"it was said to be {said}, and is {found.words}" if said else f"it is {found.words}"
        raise InvalidArgumentError(what, hint=found.advice)
    if said == "qcow2":
        raise InvalidArgumentError("this is not a qcow2 image: it does not start like one")
    if said is None and not has_boot_sector(head):
        raise InvalidArgumentError(
            "nothing in it tells what it is", hint="say --format raw if it is a bare disk"
        )
    return "raw"


async def _ask_qemu_img(path: Path, judged: Judged, user: str | None) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = build_info_argv(fd, judged.format)
        answer = await run(argv, limits=_LIMITS, user=user, pass_fds=[fd], timeout_seconds=30)
    except HostError as error:
        if error.details.get("status") is None:  # it could not be asked
            raise
        raise InvalidArgumentError(f"qemu-img does not take it: {error.message}") from error
    finally:
        os.close(fd)
    info = json.loads(answer)
    is_overlay = bool(info.keys() & {"backing-filename", "full-backing-filename"})
    if is_overlay or int(info["virtual-size"]) != judged.virtual_size_bytes:
        raise InvalidArgumentError("qemu-img finds it an overlay, or of another size")


def build_info_argv(fd: int, image_format: ImageFormat) -> list[str]:
    """Give the command that describes the image that is open as `fd`."""
    # -U: whoever writes to it can't be one of ours, and a lock of theirs must not stop us.
    return ["qemu-img", "info", "-U", "-f", image_format, "--output=json", f"/proc/self/fd/{fd}"]
