"""The memory of a saved guest: open for qemu without a name, on disk with one.

qemu 7.2 opens a memory file read-write even where it maps it privately, and punches holes into it
when a guest gives memory back. A memfd with seals lets it have its way and keeps the bytes: the
kernel refuses to write, to punch and to resize, whoever asks. It also needs no right to any path.
"""

import os
from pathlib import Path


def make_memory(size_bytes: int) -> int:
    """Give an empty, writable memory of that size for a guest to be saved; the caller closes it.

    `memory_path` of it is what `MachineFiles.memory` takes, with `memory_shared`.
    """
    raise NotImplementedError


def memory_path(descriptor: int) -> Path:
    """Name an open memory for `MachineFiles.memory`; good while it is open, in this process."""
    return Path(f"/proc/self/fd/{descriptor}")


def write_memory(descriptor: int, path: Path) -> str:
    """Write a memory to a durable, sparse file, mode 0600; give its SHA-256 (see `load_memory`).

    Blocks for as long as that takes (0.2 to 2 s). No qemu may have the memory any more. Raises
    HostError, and leaves no half-written file.
    """
    raise NotImplementedError


def load_memory(path: Path, size_bytes: int, sha256: str) -> int:
    """Read a memory from its file, seal it, and give it; the caller closes it.

    Blocks. Any number of clones may be started from the one descriptor, which holds as much of the
    host's memory as the guest had in use. Raises HostError when the file is missing, has another
    size or another content.
    """
    raise NotImplementedError


def seal_memory(descriptor: int) -> None:
    """Make a memory unchangeable for good; raises HostError while a qemu has it shared."""
    raise NotImplementedError


__all__ = ["load_memory", "make_memory", "memory_path", "os", "seal_memory", "write_memory"]
