"""Saving a guest with all its memory, so that its qemu may end, and taking it up again.

The guest stands still from the save on. Where the saved state is kept, and for how long it goes
with the disk, is for others to know.
"""

import asyncio
from enum import StrEnum

from oscloudd.errors import HostError
from oscloudd.machine.arguments import MEMORY_OBJECT
from oscloudd.machine.qemu import Heard, Qemu
from oscloudd.machine.warm import migrate, wait_completed

# A limit is qemu's to have: 7.2 keeps to 128 MiB/s unless it is told otherwise.
_BANDWIDTH_BYTES = 1 << 40

# What a slow disk writes or reads in a second, for the limits of waiting.
_SLOWEST_BYTES = 20 << 20
_SHORTEST_SECONDS = 60.0

_CANCEL_SECONDS = 30.0
_SETTLING_LOOKS, _SETTLING_SECONDS = 100, 0.05
_UNDER_WAY = frozenset({"setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling"})


class Saving(StrEnum):
    """How far a qemu is with writing out its guest, as it says itself."""

    NONE = "none"
    UNDER_WAY = "under way"
    WHOLE = "whole"  # and the guest has not run since


def transfer_seconds(memory_bytes: int) -> float:
    """Give how long the memory of a guest may take to be written or read."""
    return _SHORTEST_SECONDS + memory_bytes / _SLOWEST_BYTES


async def save_whole(qemu: Qemu, state_fd: int, *, timeout_seconds: float) -> None:
    """Stop the guest and write its memory and the state of its devices to `state_fd`.

    Its disk is flushed and given up by then: `let_go_on` or `stop(force=True)` may follow. The
    caller keeps `state_fd`, at the start of an empty file. Raises HostError.
    """
    await qemu.pause()
    parameters = {"max-bandwidth": _BANDWIDTH_BYTES}
    await migrate(qemu, "migrate", state_fd, parameters, timeout_seconds, with_memory=True)


async def restore_whole(qemu: Qemu, state_fd: int, *, timeout_seconds: float) -> None:
    """Give an incoming machine what `save_whole` has written; it stands still until `resume`.

    Raises HostError when qemu does not take it; it has ended then or is only to be ended.
    """
    # The host knows the guest's MAC and address all along.
    parameters = {"announce-rounds": 0, "max-bandwidth": _BANDWIDTH_BYTES}
    await migrate(qemu, "migrate-incoming", state_fd, parameters, timeout_seconds, with_memory=True)


async def ask_saving(qemu: Qemu) -> Saving:
    """Ask a qemu how far it is, one that an earlier daemon has told to save its guest."""
    migration = await _migration_status(qemu)
    # A guest that was restored says "completed" for ever; its machine has other states, though.
    if migration == "completed" and await qemu.status() in ("postmigrate", "finish-migrate"):
        return Saving.WHOLE
    return Saving.UNDER_WAY if migration in _UNDER_WAY else Saving.NONE


async def wait_saved(qemu: Qemu, *, timeout_seconds: float) -> None:
    """Wait until a save that is under way is whole; raises HostError when it fails."""
    with qemu.hear("MIGRATION") as heard:
        if await ask_saving(qemu) == Saving.UNDER_WAY:
            await _wait_in_time(heard, timeout_seconds)
    if await ask_saving(qemu) != Saving.WHOLE:
        raise HostError("qemu has not written its guest out")


async def let_go_on(qemu: Qemu, *, stays_paused: bool) -> None:
    """Have a guest run again that was to be saved, or only stand still again.

    What was written of it must be gone by now. Raises HostError and OperationTimeoutError.
    """
    await _end_saving(qemu)
    status = await _settled_status(qemu)
    if status == "postmigrate" or (status == "paused" and not stays_paused):
        # qemu has given the disk up after a save, and takes it back only when the guest runs.
        await qemu.resume()
    if stays_paused and status in ("postmigrate", "running"):
        await qemu.pause()


async def has_memory_object(qemu: Qemu) -> bool:
    """Tell whether the machine has its memory as an object, as one that began warm does."""
    objects = await qemu.monitor.execute("query-memdev")
    return any(each.get("id") == MEMORY_OBJECT for each in objects)


async def running_version(qemu: Qemu) -> str:
    """Give the version of the very qemu that runs, as `plain_version` gives an installed one's."""
    answer = await qemu.monitor.execute("query-version")
    number = ".".join(str(answer["qemu"][part]) for part in ("major", "minor", "micro"))
    package = str(answer.get("package", "")).strip()
    return f"{number} ({package})" if package else number


def plain_version(words: str) -> str:
    """Give "7.2.22 (Debian …)" of the line that `qemu -version` prints."""
    return words.removeprefix("QEMU emulator version ").strip()


async def _settled_status(qemu: Qemu) -> str:
    # A migration tells of its end a moment before the machine leaves this state, which no event
    # tells of.
    for _ in range(_SETTLING_LOOKS):
        if (status := await qemu.status()) != "finish-migrate":
            return status
        await asyncio.sleep(_SETTLING_SECONDS)
    raise HostError("qemu does not come to the end of saving its guest")


async def _end_saving(qemu: Qemu) -> None:
    with qemu.hear("MIGRATION") as heard:
        if await _migration_status(qemu) not in _UNDER_WAY:
            return
        await qemu.monitor.execute("migrate_cancel")
        if await _migration_status(qemu) in _UNDER_WAY:
            await _wait_ended(heard)


async def _wait_ended(heard: Heard) -> None:
    try:
        async with asyncio.timeout(_CANCEL_SECONDS):
            while (event := await heard.get()) is not None:
                if event.get("status") not in _UNDER_WAY:
                    return
    except TimeoutError as error:
        raise HostError(f"qemu has not stopped saving after {_CANCEL_SECONDS:g} s") from error


async def _wait_in_time(heard: Heard, timeout_seconds: float) -> None:
    try:
        async with asyncio.timeout(timeout_seconds):
            await wait_completed(heard)
    except TimeoutError as error:
        raise HostError(f"saving the guest took longer than {timeout_seconds:g} s") from error


async def _migration_status(qemu: Qemu) -> str:
    return str((await qemu.monitor.execute("query-migrate")).get("status", "none"))
