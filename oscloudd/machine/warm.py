"""Saving a guest that runs, and letting others begin where it stood.

The memory is not part of what is written here: it stays in the machine's memory file, which the
saved guest shares and its clones map privately. Who gets which file is for others to know.
"""

from collections.abc import Mapping

from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.qemu import Qemu

SAVE_SECONDS = 60.0
RESTORE_SECONDS = 30.0


async def save(qemu: Qemu, state_fd: int, *, timeout_seconds: float = SAVE_SECONDS) -> None:
    """Stop the guest and write the state of its devices, some 0.3 MB, to `state_fd`.

    The machine has its memory in a shared file, and only `stop(force=True)` may follow. The caller
    keeps `state_fd` (write-only or read-write, at the start of an empty file), and sees to it that
    it is durable. Raises HostError, also when it takes longer than `timeout_seconds`.
    """
    raise NotImplementedError


async def restore(qemu: Qemu, state_fd: int, *, timeout_seconds: float = RESTORE_SECONDS) -> None:
    """Give an incoming machine the state of a saved one; the guest stands still until `resume`.

    The caller keeps `state_fd`, which is read from where it stands: open it anew for each machine.
    Raises HostError when qemu does not take the state; it has ended then or is good for nothing
    but to be ended.
    """
    raise NotImplementedError


async def resize_disk(qemu: Qemu, size_bytes: int) -> None:
    """Tell qemu and the guest that the disk has `size_bytes`, after `restore`."""
    raise NotImplementedError


def recipe_key(
    spec: MachineSpec,
    *,
    with_tap: bool,
    binary: Mapping[str, str | int],
    contents: Mapping[str, str],
) -> str:
    """Give the SHA-256, in hexadecimal, of all that a saved machine and its clones must share.

    Of `spec`, what makes the virtual hardware counts (accelerator, memory, processors, machine
    type, kernel's command line), and not what each machine has of its own (name, uuid, MAC).
    `binary` is what `identify_binary` says, `contents` digests of the template's files by name.
    """
    raise NotImplementedError


def identify_binary(binary: str, version: str) -> dict[str, str | int]:
    """Say which qemu it is: resolved path, version, size in bytes, time of change in ns."""
    raise NotImplementedError
