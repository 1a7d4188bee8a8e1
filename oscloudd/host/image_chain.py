"""A chain of images, an overlay and all it stands on, opened for qemu-img.

What is in an overlay is a guest's, and its tables are a qemu's that a guest may have taken over. So
qemu-img works on it as an unprivileged user, under limits, on descriptors and with every format
told: nothing in a file decides what is opened.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


@dataclass(frozen=True)
class OpenLayer:
    """One image of a chain that is open for reading, whatever becomes of its name."""

    fd: int
    format: ImageFormat


@contextmanager
def open_chain(chain: Sequence[Layer]) -> Iterator[list[OpenLayer]]:
    """Open a chain for `qemu-img`; raises HostError when an image can't be read."""
    with ExitStack() as stack:
        yield [OpenLayer(_open(stack, layer), layer.format) for layer in chain]


def name_chain(chain: Sequence[OpenLayer]) -> str:
    """Give the name by which `qemu-img` knows a chain, top first, of which nothing else counts."""
    node: dict[str, Any] | None = None
    for layer in reversed(chain):
        file = {"driver": "file", "filename": f"/proc/self/fd/{layer.fd}"}
        # Null, too: else the file's own word for what it stands on would count.
        backing = {} if layer.format == "raw" else {"backing": node}
        node = {"driver": layer.format, "file": file, **backing}
    return "json:" + json.dumps(node, separators=(",", ":"))


async def measure(chain: Sequence[OpenLayer], user: str | None) -> int:
    """Give the most bytes that the chain, top first, takes as one qcow2.

    Raises HostError when an image can't be read, or is being written to.
    """
    answer = await run(
        build_measure_argv(chain),
        limits=_LIMITS,
        user=user,
        pass_fds=[layer.fd for layer in chain],
        timeout_seconds=_MEASURE_SECONDS,
    )
    return int(json.loads(answer)["required"])


def build_measure_argv(chain: Sequence[OpenLayer]) -> list[str]:
    """Give the command that tells how large a qcow2 of the chain becomes."""
    return ["qemu-img", "measure", "-O", "qcow2", "--output=json", name_chain(chain)]


async def write_image(
    argv: Sequence[str],
    pass_fds: Sequence[int],
    user: str | None,
    *,
    on_fraction: Callable[[float], None],
) -> None:
    """Run a command that writes an image, which may take hours; `on_fraction` hears from 0 to 1.

    Raises HostError, and ExhaustedError when the disk is full.
    """

    def report(line: str) -> None:
        if (match := _PERCENT.search(line)) is not None:
            on_fraction(float(match[1]) / 100)

    try:
        await run(
            argv, limits=_LIMITS, user=user, pass_fds=pass_fds, timeout_seconds=_SECONDS,
            on_line=report, environment=_ENVIRONMENT,
        )  # fmt: skip
    except HostError as error:
        if _NO_SPACE not in error.details.get("output", ""):
            raise
        raise ExhaustedError("the disk is full", hint="free some space", resource="disk") from error


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
