"""Saving a guest that runs, and letting others begin where it stood.

The memory is not part of what is written here: it stays in the machine's memory file, which the
saved guest shares and its clones map privately. Who gets which file is for others to know.
"""

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from oscloudd.errors import CloudError, HostError, OperationTimeoutError
from oscloudd.machine.arguments import Descriptors, MachineSpec, build_arguments
from oscloudd.machine.monitor import ANSWER_SECONDS
from oscloudd.machine.qemu import Heard, Qemu

SAVE_SECONDS = 60.0
RESTORE_SECONDS = 30.0

# Counts up when saved machines of an earlier version of this program are of no use to this one.
RECIPE_VERSION = 4

_STATE_NAME = "oscloud-state"

# How long a qemu that could not take a state is given to print why and end.
_ENDING_SECONDS = 2.0


async def save(qemu: Qemu, state_fd: int, *, timeout_seconds: float = SAVE_SECONDS) -> None:
    """Stop the guest and write the state of its devices, some 0.3 MB, to `state_fd`.

    The machine has its memory in a shared file, and only `stop(force=True)` may follow. The caller
    keeps `state_fd` (write-only or read-write, at the start of an empty file), and sees to it that
    it is durable. Raises HostError, also when it takes longer than `timeout_seconds`.
    """
    await qemu.pause()
    await migrate(qemu, "migrate", state_fd, {}, timeout_seconds)


async def restore(qemu: Qemu, state_fd: int, *, timeout_seconds: float = RESTORE_SECONDS) -> None:
    """Give an incoming machine the state of a saved one; the guest stands still until `resume`.

    The caller keeps `state_fd`, which is read from where it stands: open it anew for each machine.
    Raises HostError when qemu does not take the state; it has ended then or is good for nothing
    but to be ended.
    """
    # A clone would else tell the network the MAC of the guest that was saved.
    quiet = {"announce-rounds": 0}
    await migrate(qemu, "migrate-incoming", state_fd, quiet, timeout_seconds)


async def restore_or_end(qemu: Qemu, state: bytes, disk_bytes: int | None = None) -> None:
    """Give an incoming machine a saved state, and its disk a size if it is to have another one.

    Raises HostError when that fails; qemu has been ended and let go of then.
    """
    async with ended_on_failure(qemu, "the warm image can't be restored"):
        with tempfile.TemporaryFile() as file:
            file.write(state)
            file.seek(0)
            await restore(qemu, file.fileno())
        if disk_bytes is not None:
            await resize_disk(qemu, disk_bytes)


@asynccontextmanager
async def ended_on_failure(qemu: Qemu, what_failed: str) -> AsyncIterator[None]:
    """End a qemu and let go of it if what is done inside fails.

    Raises HostError then, with the details of what was raised inside.
    """
    try:
        yield
    except BaseException as error:
        await qemu.stop(force=True)
        await qemu.close()
        if isinstance(error, CloudError | OSError):
            details = error.details if isinstance(error, CloudError) else {}
            raise HostError(f"{what_failed}: {error}", **details) from error
        raise


async def resize_disk(
    qemu: Qemu,
    size_bytes: int,
    *,
    node: str = "disk",
    timeout_seconds: float = ANSWER_SECONDS,
) -> None:
    """Tell qemu and the guest that a disk, the root disk if not another, has `size_bytes`.

    A disk that is smaller is made larger. Raises HostError or OperationTimeoutError.
    """
    size = {"node-name": node, "size": size_bytes}
    await qemu.monitor.execute("block_resize", size, timeout_seconds=timeout_seconds)


def recipe_key(
    spec: MachineSpec,
    *,
    with_tap: bool,
    with_seed: bool = False,
    binary: Mapping[str, str | int],
    contents: Mapping[str, str],
) -> str:
    """Give the SHA-256, in hexadecimal, of all that a saved machine and its clones must share.

    Of `spec`, what makes the virtual hardware counts (accelerator, memory, processors, machine
    type, kernel's command line), and not what each machine has of its own (name, uuid, MAC).
    `binary` is what `identify_binary` says, `contents` digests of the template's files by name.
    """
    common = replace(spec, name="", uuid="", mac="", binary="", memory_shared=True, incoming=False)
    numbers = iter(range(10, 30))
    names = ["monitor", "serial", "channel", "console_log"]
    names += ["disk", "base", "kernel", "initrd", "memory"]
    names += [*(["tap"] if with_tap else []), *(["seed"] if with_seed else [])]
    given: dict[str, Any] = {name: next(numbers) for name in names}
    descriptors = Descriptors(**given)
    recipe = {
        "version": RECIPE_VERSION,
        "arguments": build_arguments(common, descriptors),
        "binary": dict(binary),
        "contents": dict(contents),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def identify_binary(binary: str, version: str) -> dict[str, str | int]:
    """Say which qemu it is: resolved path, version, size in bytes, time of change in ns.

    Raises HostError when there is none of that name.
    """
    found = shutil.which(binary)
    if found is None:
        raise HostError(f"{binary} is not there, or can't be run")
    path = Path(found).resolve()
    status = path.stat()
    return {
        "path": str(path),
        "version": version,
        "size_bytes": status.st_size,
        "changed_ns": status.st_mtime_ns,
    }


async def migrate(
    qemu: Qemu,
    command: Literal["migrate", "migrate-incoming"],
    state_fd: int,
    parameters: Mapping[str, int],
    timeout_seconds: float,
    *,
    with_memory: bool = False,
) -> None:
    """Run a migration command on `state_fd` and wait for qemu to say that it is completed.

    `with_memory`: the guest's memory goes there, too. Raises HostError.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            await _prepare(qemu, state_fd, parameters, with_memory=with_memory)
            with qemu.hear("MIGRATION") as heard:
                await qemu.monitor.execute(command, {"uri": f"fd:{_STATE_NAME}"})
                await wait_completed(heard)
    except TimeoutError as error:
        raise HostError(f"{command} took qemu longer than {timeout_seconds:g} s") from error
    except (HostError, OperationTimeoutError) as error:
        raise await _explain(qemu, command, error) from error


async def wait_completed(heard: Heard) -> None:
    """Wait for the end of a migration among the events of that name; raises HostError."""
    while (event := await heard.get()) is not None:
        if event.get("status") == "completed":
            return
        if event.get("status") in ("failed", "cancelled"):
            raise _FailedError(f"qemu says that it has {event.get('status')}")
    raise _FailedError("the connection to qemu's monitor is lost")


async def _prepare(
    qemu: Qemu, state_fd: int, parameters: Mapping[str, int], *, with_memory: bool
) -> None:
    monitor = qemu.monitor
    # x-ignore-shared: the memory stays in its file. events: tell when it is over.
    wanted = {"x-ignore-shared": not with_memory, "events": True}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})
    if parameters:
        await monitor.execute("migrate-set-parameters", parameters)
    # "exec:" would need a fork, which the sandbox refuses.
    await monitor.execute("getfd", {"fdname": _STATE_NAME}, descriptor=state_fd)


class _FailedError(HostError):
    """The migration was begun and failed; a qemu that was to take a state ends then by itself."""


async def _explain(qemu: Qemu, command: str, error: HostError | OperationTimeoutError) -> HostError:
    """Make one error of a failed migration, with what qemu printed and how it ended if it did."""
    why = error.message
    if isinstance(error, _FailedError):
        if command == "migrate-incoming":
            await asyncio.wait([qemu.exited], timeout=_ENDING_SECONDS)
        if qemu.exited.done() and not qemu.exited.cancelled():
            why = qemu.exited.result().message
        elif qemu.is_connected:
            why = await _ask_why(qemu) or why
    details = {"output": qemu.read_log(), **error.details}
    return HostError(f"{command} failed: {why}", **details)


async def _ask_why(qemu: Qemu) -> str:
    """Give qemu's own words for a migration that failed; "" where it has none."""
    with suppress(HostError, OperationTimeoutError):
        return str((await qemu.monitor.execute("query-migrate")).get("error-desc", ""))
    return ""
