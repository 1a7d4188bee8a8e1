"""Two images of a chain made one: what the upper one has, written over what the lower one has.

`qemu-img commit` does it, since it alone keeps what lets either of them read as zeros apart from
what they lack. It has the whole chain, for it writes in pieces of 64 KiB, and reads the rest of one
from below. It wants to write to the upper image, too, though it does not; both may be in use
elsewhere, and so are copied first, which takes no room where a file system shares blocks.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.image_chain import OpenLayer, name_chain, write_image
from oscloudd.host.images import publish


async def merge(
    chain: Sequence[OpenLayer],
    destination: Path,
    user: str | None,
    *,
    on_fraction: Callable[[float], None],
) -> None:
    """Write the first two images of the chain as one to `destination`, in one rename.

    What is written says of itself that it stands on what the second did. The directory must be one
    that `user` has no way to. Raises HostError, and ExhaustedError when the disk is full; nothing
    is left then.
    """
    upper, lower, *below = chain
    with _nameless(destination.parent) as above, _nameless(destination.parent) as target:
        for source, copy in ((upper.fd, above), (lower.fd, target)):
            argv = build_copy_argv(source, copy)
            await write_image(argv, [source, copy], user, on_fraction=lambda _done: None)
        work = [replace(upper, fd=above), replace(lower, fd=target), *below]
        fds = [layer.fd for layer in work]
        await write_image(build_merge_argv(work), fds, user, on_fraction=on_fraction)
        part = _give_name(target, destination)
        await asyncio.to_thread(publish, part, destination)


def build_copy_argv(source: int, target: int) -> list[str]:
    """Give the command that copies one open file to another, with its holes."""
    return [
        "cp",
        "--reflink=auto",
        "--sparse=auto",
        *(f"/proc/self/fd/{n}" for n in (source, target)),
    ]


def build_merge_argv(chain: Sequence[OpenLayer]) -> list[str]:
    """Give the command that writes what the first image has to the second; the rest is read."""
    # -d: else it would empty the first. Without -t it drops the flushes.
    return ["qemu-img", "commit", "-d", "-p", "-t", "writeback", name_chain(chain)]


@contextmanager
def _nameless(directory: Path) -> Iterator[int]:
    """Open a new file that is gone with its descriptor, unless it is given a name."""
    try:
        directory.chmod(0o700)
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        # The daemon has no right to give a file away (CAP_CHOWN).
        os.fchmod(fd, 0o666)
    except OSError as error:
        raise HostError(f"{directory} can't be written: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _give_name(fd: int, destination: Path) -> Path:
    part = destination.with_name(f".{destination.name}.merged")
    try:
        os.fchmod(fd, 0o400)
        part.unlink(missing_ok=True)
        # linkat(2) follows the link in /proc only if asked to, which Python does with a descriptor.
        os.link(f"/proc/self/fd/{fd}", part, src_dir_fd=fd)
    except OSError as error:
        raise HostError(f"{part} can't be written: {error.strerror}") from error
    return part
