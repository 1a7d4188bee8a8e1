"""One run of the accelerator probe: the firmware under a qemu, and a clock beside it.

Owns the process and its pipe for the time of the run. What the result means is `accelerator.py`'s.
"""

import asyncio
import os
import signal
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import NotFoundError, OperationTimeoutError
from oscloudd.host.processes import ProcessHandle, start_process
from oscloudd.host.users import QemuUser
from oscloudd.machine.arguments import SANDBOX, accelerator_argument, cpu_model

FIRMWARE_BYTES = 64 << 10

# A far jump to 0xF000:0x0000, sixteen bytes below the end, where a processor begins.
_RESET_VECTOR = bytes.fromhex("ea000000f0").ljust(16, b"\0")

# isa-debug-exit ends qemu with 2 * value + 1; the firmware's GOOD is 42.
_GOOD_STATUS = 85

# qemu itself may be slow to start on a busy machine; the guest, once it is seen, may not.
_START_SECONDS = 30.0
GUEST_SECONDS = 2.0
_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class ProbeResult:
    """What a run showed; times in seconds, None where the guest never came that far.

    `ring_ratio` is ring 0's time for the same work in units of ring 3's.
    """

    is_correct: bool
    timed_out: bool
    first_sign_seconds: float | None
    seconds: float
    ring_ratio: float
    output: str


def build_firmware() -> bytes:
    """Give the probe as an image for `-bios`: the assembled code, and the jump to it at the end."""
    code = Path(__file__).with_name("accelerator_probe.bin").read_bytes()
    return code.ljust(FIRMWARE_BYTES - len(_RESET_VECTOR), b"\0") + _RESET_VECTOR


def build_probe_arguments(binary: str, accelerator: str, firmware_fd: int) -> list[str]:
    """Build the argument vector of the probe's qemu."""
    return [
        binary,
        "-no-user-config",
        "-nodefaults",
        "-no-reboot",
        *("-display", "none"),
        *("-sandbox", SANDBOX),
        *("-machine", "pc"),
        *("-m", "size=16M"),
        *("-accel", accelerator_argument(accelerator)),
        *("-cpu", cpu_model(accelerator)),
        *("-bios", f"/proc/self/fd/{firmware_fd}"),
        *("-debugcon", "stdio"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
    ]


async def run_probe(accelerator: str, binary: str, user: QemuUser | None) -> ProbeResult:
    """Run the probe once, as `user` (None: as ourselves), and give what came of it.

    Raises HostError when the binary can't be started at all.
    """
    with ExitStack() as stack:
        firmware, errors = os.memfd_create("probe"), os.memfd_create("probe-errors")
        stack.callback(os.close, firmware)
        stack.callback(os.close, errors)
        os.write(firmware, build_firmware())
        reading, writing = os.pipe2(os.O_CLOEXEC)
        pipe = stack.enter_context(os.fdopen(reading, "rb", buffering=0))
        try:
            process = start_process(
                build_probe_arguments(binary, accelerator, firmware),
                user=None if user is None else user.name,
                extra_groups=() if user is None else user.extra_groups,
                pass_fds=(firmware,),
                stdout_fd=writing,
                stderr_fd=errors,
            )
        finally:
            os.close(writing)
        stack.callback(process.close)
        signs = await _Signs.watch(pipe.fileno(), process)
        os.lseek(errors, 0, os.SEEK_SET)
        return signs.result(os.read(errors, 1 << 16).decode("utf-8", "replace"))


class _Signs:
    """The guest's signs of life, `0`, `1` and `2`, with the time each came."""

    def __init__(self) -> None:
        self._start = asyncio.get_running_loop().time()
        self._times: dict[str, float] = {}
        self._status: int | None = None
        self._timed_out = False

    @classmethod
    async def watch(cls, descriptor: int, process: ProcessHandle) -> "_Signs":
        """Follow the guest to its end, or end it when its time is over."""
        signs = cls()
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()
        loop.add_reader(descriptor, signs._take, descriptor, begun)
        try:
            # The pipe also becomes readable, at its end, when qemu ends without a word.
            await asyncio.wait_for(begun.wait(), _START_SECONDS)
            signs._status = (await process.wait_exit(GUEST_SECONDS)).code
        except (TimeoutError, OperationTimeoutError):
            signs._timed_out = True
        finally:
            with suppress(NotFoundError):
                process.send_signal(signal.SIGKILL)
            await asyncio.shield(process.wait_exit(_KILL_SECONDS))
            signs._take(descriptor, begun)
            loop.remove_reader(descriptor)
        return signs

    def _take(self, descriptor: int, begun: asyncio.Event) -> None:
        now = asyncio.get_running_loop().time()
        data = os.read(descriptor, 4096)
        for sign in data.decode("ascii", "replace"):
            self._times.setdefault(sign, now)
        begun.set()
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)

    def result(self, output: str) -> ProbeResult:
        """Sum up."""
        first, middle, last = (self._times.get(sign) for sign in "012")
        ratio = 0.0
        if first is not None and middle is not None and last is not None:
            # Both come in one read where the guest is very fast; the clock's grain is no ratio.
            ratio = (middle - first) / max(last - middle, 0.001)
        return ProbeResult(
            is_correct=self._status == _GOOD_STATUS,
            timed_out=self._timed_out,
            first_sign_seconds=None if first is None else first - self._start,
            seconds=0.0 if first is None or last is None else last - first,
            ring_ratio=ratio,
            output=output,
        )
