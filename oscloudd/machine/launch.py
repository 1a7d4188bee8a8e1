"""Starting one qemu: opening what it needs, handing it over, and undoing all of it on failure."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import CloudError, HostError, NotFoundError, OperationTimeoutError
from oscloudd.host.processes import ExitStatus, ProcessHandle, start_process
from oscloudd.host.users import QemuUser
from oscloudd.machine.arguments import Descriptors, MachineSpec, build_arguments
from oscloudd.machine.console_log import read_last_lines
from oscloudd.machine.monitor import OnEvent
from oscloudd.machine.qemu import KILL_SECONDS, Qemu
from oscloudd.machine.run_directory import CHANNEL, MONITOR, SERIAL, RunDirectory
from oscloudd.machine.sealed_memory import check_memory_size

# Spawn to first answer takes 28 to 54 ms on an idle machine; a busy one may take very much longer.
LAUNCH_SECONDS = 30.0


@dataclass(frozen=True)
class MachineFiles:
    """The files a machine stands on; only kernel and initrd must be readable by qemu's own user.

    The disk reads what it lacks from `layers`, the lowest of which comes first, they from `frozen`,
    and that from `base`. `memory` holds the guest's
    memory and must have its size; /proc/self/fd/N names one that is open (`sealed_memory`).
    `firmware` and `variables` are for UEFI, both or none.
    """

    run_directory: Path
    qemu_log: Path
    console_log: Path
    disk: Path
    base: Path | None = None
    frozen: Path | None = None
    layers: tuple[Path, ...] = ()
    seed: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    memory: Path | None = None
    firmware: Path | None = None
    variables: Path | None = None


async def launch(
    spec: MachineSpec,
    files: MachineFiles,
    user: QemuUser,
    on_event: OnEvent,
    *,
    tap_fd: int | None = None,
    timeout_seconds: float = LAUNCH_SECONDS,
) -> Qemu:
    """Start a qemu and connect to it; the guest stands still until `resume`.

    The caller keeps `tap_fd` and may close it afterwards. Raises HostError with argv, exit status
    and the end of qemu's log; nothing is left running then.
    """
    directory = RunDirectory(files.run_directory)
    directory.prepare()
    log_start = files.qemu_log.stat().st_size if files.qemu_log.exists() else 0
    try:
        with _open_descriptors(directory, files, spec.memory_bytes, tap_fd) as (
            descriptors,
            log_fd,
        ):
            argv = build_arguments(spec, descriptors)
            process = start_process(
                argv,
                cwd=files.run_directory,
                user=user.name,
                extra_groups=user.extra_groups,
                pass_fds=descriptors.numbers(),
                stdout_fd=log_fd,
            )
    except BaseException:
        directory.remove()
        raise
    qemu = Qemu(process, directory, spec.uuid, on_event, log=files.qemu_log)
    try:
        directory.write_pid(process.identity.pid)
        await qemu.connect(timeout_seconds=timeout_seconds)
    except BaseException as error:
        status = await _end(process)
        await qemu.close()
        directory.remove()
        if isinstance(error, OSError):
            error = HostError(f"{files.run_directory} can't be written: {error.strerror}")
        if isinstance(error, CloudError):
            raise _launch_failure(argv, status, error, files.qemu_log, log_start) from error
        raise
    return qemu


@contextmanager
def _open_descriptors(
    directory: RunDirectory, files: MachineFiles, memory_bytes: int, tap_fd: int | None
) -> Iterator[tuple[Descriptors, int]]:
    """Open everything for the moment of the start, and the log for qemu's own words."""
    with ExitStack() as stack:

        def opened(path: Path | None, flags: int) -> int | None:
            return None if path is None else _open(stack, path, flags)

        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log_fd = _open(stack, files.qemu_log, append)
        yield (
            Descriptors(
                monitor=stack.enter_context(directory.listen(MONITOR)).fileno(),
                serial=stack.enter_context(directory.listen(SERIAL)).fileno(),
                channel=stack.enter_context(directory.listen(CHANNEL)).fileno(),
                console_log=_open(stack, files.console_log, append),
                disk=_open(stack, files.disk, os.O_RDWR),
                base=opened(files.base, os.O_RDONLY),
                frozen=opened(files.frozen, os.O_RDONLY),
                layers=tuple(_open(stack, path, os.O_RDONLY) for path in files.layers),
                seed=opened(files.seed, os.O_RDONLY),
                kernel=opened(files.kernel, os.O_RDONLY),
                initrd=opened(files.initrd, os.O_RDONLY),
                memory=_open_memory(stack, files.memory, memory_bytes),
                firmware=opened(files.firmware, os.O_RDONLY),
                variables=opened(files.variables, os.O_RDWR),
                tap=tap_fd,
            ),
            log_fd,
        )


def _open_memory(stack: ExitStack, path: Path | None, size_bytes: int) -> int | None:
    if path is None:
        return None
    descriptor = _open(stack, path, os.O_RDWR)
    check_memory_size(descriptor, path, size_bytes)
    return descriptor


def _open(stack: ExitStack, path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise HostError(f"{path} can't be opened for qemu: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return descriptor


async def _end(process: ProcessHandle) -> ExitStatus | None:
    """Kill a qemu that was never more than an attempt; give its own status if it had ended."""
    with suppress(NotFoundError):
        process.send_signal(signal.SIGKILL)
    try:
        return await process.wait_exit(KILL_SECONDS)
    except OperationTimeoutError:
        return None


def _launch_failure(
    argv: list[str], status: ExitStatus | None, error: CloudError, log: Path, log_start: int
) -> HostError:
    output = read_last_lines(log, since=log_start)
    ended = status is not None and status.signal != signal.SIGKILL
    why = output.splitlines()[-1] if output and ended else error.message
    return HostError(
        f"qemu did not start: {why:.500}",
        hint=f"its log is {log}",
        argv=argv,
        status=status.code if status is not None and ended else None,
        signal=status.signal if status is not None and ended else None,
        output=output,
    )
