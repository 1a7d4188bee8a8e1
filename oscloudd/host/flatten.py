"""One image out of a chain of them: an overlay and all it stands on, written as one file.

What is in an overlay is a guest's, and its tables are a qemu's that a guest may have taken over. So
qemu-img works on it as an unprivileged user, under limits, on descriptors and with every format
told: nothing in a file decides what is opened.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscloudd.errors import ExhaustedError, HostError
from oscloudd.host.commands import CommandLimits, run
from oscloudd.host.image_check import ImageFormat
from oscloudd.host.image_header import HEADER_BYTES, parse_qcow2_header, stands_alone

# A disk of 1 TiB, all of it written to, takes some two hours on a disk of 150 MB/s, and a tenth of
# that on the processor.
_SECONDS = 6 * 3600
# Up to 64 threads of its own, each with a stack of 8 MiB; malloc(3) would add an arena for each.
_LIMITS = CommandLimits(cpu_seconds=2 * 3600, address_space_bytes=2 << 30)
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
_MEASURE_SECONDS = 300
_PERCENT = re.compile(r"\(([0-9.]+)/100%\)")
_NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Layer:
    """One image of a chain and its format; it reads what it lacks from the next one."""

    path: Path
    format: ImageFormat


async def measure(chain: Sequence[Layer], user: str | None) -> int:
    """Give the most bytes that the chain, top first, takes as one qcow2.

    Raises HostError when an image can't be read.
    """
    with ExitStack() as stack:
        fds = _open_chain(stack, chain)
        argv = build_measure_argv(chain, fds)
        answer = await run(
            argv, limits=_LIMITS, user=user, pass_fds=fds, timeout_seconds=_MEASURE_SECONDS
        )
    return int(json.loads(answer)["required"])


async def flatten(
    chain: Sequence[Layer],
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

    def report(line: str) -> None:
        if (match := _PERCENT.search(line)) is not None:
            on_fraction(float(match[1]) / 100)

    # The daemon has no right to give a file away (CAP_CHOWN).
    os.fchmod(target, 0o666)
    with ExitStack() as stack:
        fds = _open_chain(stack, chain)
        argv = build_flatten_argv(chain, fds, target, target_format)
        try:
            await run(
                argv, limits=_LIMITS, user=user, pass_fds=[*fds, target],
                timeout_seconds=_SECONDS, on_line=report, environment=_ENVIRONMENT,
            )  # fmt: skip
        except HostError as error:
            if _NO_SPACE not in error.details.get("output", ""):
                raise
            raise ExhaustedError(
                "the disk is full", hint="free some space", resource="disk"
            ) from error


async def enlarge(
    target: int, target_format: ImageFormat, size_bytes: int, user: str | None
) -> None:
    """Make an image that `flatten` has written larger, to `size_bytes`; raises HostError."""
    if target_format == "raw":
        os.ftruncate(target, size_bytes)
        return
    argv = build_enlarge_argv(target, size_bytes)
    await run(argv, limits=_LIMITS, user=user, pass_fds=[target], timeout_seconds=_MEASURE_SECONDS)


def build_enlarge_argv(target: int, size_bytes: int) -> list[str]:
    """Give the command that makes the qcow2 open as `target` larger."""
    return ["qemu-img", "resize", "-q", "-f", "qcow2", f"/proc/self/fd/{target}", str(size_bytes)]


def build_measure_argv(chain: Sequence[Layer], fds: Sequence[int]) -> list[str]:
    """Give the command that tells how large a qcow2 of the chain becomes."""
    return ["qemu-img", "measure", "-O", "qcow2", "--output=json", _name_chain(chain, fds)]


def build_flatten_argv(
    chain: Sequence[Layer], fds: Sequence[int], target: int, target_format: ImageFormat
) -> list[str]:
    """Give the command that writes the chain, open as `fds`, to the file open as `target`."""
    # Without -t it writes with cache=unsafe and drops the flushes.
    argv = ["qemu-img", "convert", "-p", "-t", "writeback", "-O", target_format]
    return [*argv, _name_chain(chain, fds), f"/proc/self/fd/{target}"]


def _name_chain(chain: Sequence[Layer], fds: Sequence[int]) -> str:
    node: dict[str, Any] | None = None
    for layer, fd in reversed(list(zip(chain, fds, strict=True))):
        file = {"driver": "file", "filename": f"/proc/self/fd/{fd}"}
        # Null, too: else the file's own word for what it stands on would count.
        backing = {} if layer.format == "raw" else {"backing": node}
        node = {"driver": layer.format, "file": file, **backing}
    return "json:" + json.dumps(node, separators=(",", ":"))


def _open_chain(stack: ExitStack, chain: Sequence[Layer]) -> list[int]:
    return [_open(stack, layer) for layer in chain]


def _open(stack: ExitStack, layer: Layer) -> int:
    path = layer.path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if not mode & 0o004:
            # qemu-img opens it anew through its descriptor, as a user without a way to its name.
            path.parent.chmod(0o700)
            os.fchmod(fd, mode & 0o777 | 0o444)
        head = os.pread(fd, HEADER_BYTES, 0)
    except OSError as error:
        raise HostError(f"{path} can't be read: {error.strerror}") from error
    if layer.format == "qcow2" and not stands_alone(parse_qcow2_header(head)):
        raise HostError(f"{path} keeps its data in another file, or is encrypted")
    return fd
