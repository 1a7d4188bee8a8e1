"""What this box has left: memory, disk space; and which qemu it runs."""

import os
import re
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.commands import run

_MEMINFO = Path("/proc/meminfo")
_VERSION = re.compile(r"QEMU emulator version (\S+)")


def memory_available_bytes(meminfo: Path = _MEMINFO) -> int:
    """Give the memory that can be had without swapping, as the kernel reckons it."""
    return _read_meminfo(meminfo, "MemAvailable")


def memory_total_bytes(meminfo: Path = _MEMINFO) -> int:
    """Give the memory of the box."""
    return _read_meminfo(meminfo, "MemTotal")


def disk_free_bytes(path: Path) -> int:
    """Give the space left for ordinary users where `path` is, or will be."""
    for candidate in (path, *path.absolute().parents):
        try:
            status = os.statvfs(candidate)
        except FileNotFoundError:
            continue
        return status.f_bavail * status.f_frsize
    raise HostError(f"the filesystem of {path} can't be found")


async def qemu_version(binary: str) -> str:
    """Give the version of a qemu binary, such as "7.2.22"."""
    answer = await run([binary, "--version"], timeout_seconds=10)
    match = _VERSION.search(answer)
    if match is None:
        raise HostError(
            f"{binary} does not answer --version like qemu", output=answer.strip()[:500]
        )
    return match[1]


def _read_meminfo(meminfo: Path, key: str) -> int:
    for line in meminfo.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise HostError(f"{meminfo} has no {key}")
