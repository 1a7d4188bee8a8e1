"""One image out of a chain of them: an overlay and all it stands on, written as one file."""

import os
from collections.abc import Callable, Sequence

from oscloudd.host.image_chain import OpenLayer, name_chain, write_image
from oscloudd.host.image_check import ImageFormat


async def flatten(
    chain: Sequence[OpenLayer],
    target: int,
    target_format: ImageFormat,
    user: str | None,
    *,
    on_fraction: Callable[[float], None],
) -> None:
    """Write what the chain, top first, reads as to the file that is open as `target`.

    That file must have no name, or one that `user` has no way to: everybody may write to it then.
    Raises HostError, and ExhaustedError when the disk is full.
    """
    # The daemon has no right to give a file away (CAP_CHOWN).
    os.fchmod(target, 0o666)
    argv = build_flatten_argv(chain, target, target_format)
    fds = [*(layer.fd for layer in chain), target]
    await write_image(argv, fds, user, on_fraction=on_fraction)


async def enlarge(
    target: int, target_format: ImageFormat, size_bytes: int, user: str | None
) -> None:
    """Make an image that `flatten` has written larger, to `size_bytes`; raises HostError."""
    if target_format == "raw":
        os.ftruncate(target, size_bytes)
        return
    argv = build_enlarge_argv(target, size_bytes)
    await write_image(argv, [target], user, on_fraction=lambda _done: None)


def build_enlarge_argv(target: int, size_bytes: int) -> list[str]:
    """Give the command that makes the qcow2 open as `target` larger."""
    return ["qemu-img", "resize", "-q", "-f", "qcow2", f"/proc/self/fd/{target}", str(size_bytes)]


def build_flatten_argv(
    chain: Sequence[OpenLayer], target: int, target_format: ImageFormat
) -> list[str]:
    """Give the command that writes the chain to the file open as `target`."""
    # Without -t it writes with cache=unsafe and drops the flushes.
    argv = ["qemu-img", "convert", "-p", "-t", "writeback", "-O", target_format]
    return [*argv, name_chain(chain), f"/proc/self/fd/{target}"]
