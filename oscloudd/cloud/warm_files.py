"""A warm image on the disk: the memory, devices and disk of a template that was booted once.

Made in a directory of its own and given its name in one rename: it is there whole or not at all.
Its key says what a machine must have in common with it; its name is never given again, since disks
of vms stand on its frozen disk.
"""

import asyncio
import hashlib
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oscloudd.config import Config
from oscloudd.errors import HostError
from oscloudd.host.images import (
    copy_overlay,
    create_overlay,
    durable,
    publish,
    sha256_of,
    virtual_size_bytes,
)
from oscloudd.machine.sealed_memory import load_memory

MANIFEST = "warm.json"
MEMORY, STATE, DISK = "memory", "state", "disk.qcow2"
_BLANK = "overlay.qcow2"


def warm_directory(config: Config) -> Path:
    """Give the directory of all warm images."""
    return config.state_path / "warm"


def frozen_disk(config: Config, name: str) -> Path:
    """Give the frozen disk of a warm image, which the disks of its clones stand on."""
    return warm_directory(config) / name / DISK


class Manifest(msgspec.Struct, frozen=True):
    """What `warm.json` says: sizes in bytes, times in seconds since 1970."""

    key: str
    template: str
    mem_size: int
    cpus: int
    disk_size: int
    made_at: float
    memory_sha256: str
    state_bytes: int
    state_sha256: str
    disk_sha256: str


@dataclass(frozen=True)
class WarmImage:
    """A warm image whose files are all there."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """Its name."""
        return self.directory.name

    @property
    def memory(self) -> Path:
        """The guest's memory, sparse; clones get it from `sealed_memory`."""
        return self.directory / MEMORY

    @property
    def state(self) -> Path:
        """The state of its devices."""
        return self.directory / STATE

    @property
    def disk(self) -> Path:
        """Its frozen disk, an overlay on the template's image."""
        return self.directory / DISK

    @property
    def blank_overlay(self) -> Path:
        """An overlay on the frozen disk as large as that; each clone begins with a copy."""
        return self.directory / _BLANK

    @property
    def last_used(self) -> float:
        """When a vm was last made from it, in seconds since 1970."""
        return (self.directory / MANIFEST).stat().st_mtime

    def read_state(self) -> bytes:
        """Give the state of its devices, some 0.4 MB; raises HostError when it is damaged."""
        try:
            state = self.state.read_bytes()
        except OSError as error:
            raise HostError(f"{self.state} can't be read: {error.strerror}") from error
        if hashlib.sha256(state).hexdigest() != self.manifest.state_sha256:
            raise HostError(f"{self.state} is damaged", hint="it will be made anew")
        return state

    def load(self) -> int:
        """Give its memory as `load_memory` does, its other files checked before; blocks.

        Raises HostError when one of them is missing or damaged.
        """
        self.read_state()
        if sha256_of(self.disk) != self.manifest.disk_sha256:
            raise HostError(f"{self.disk} is damaged", hint="it will be made anew")
        return load_memory(self.memory, self.manifest.mem_size, self.manifest.memory_sha256)

    def mark_used(self) -> None:
        """Remember that a vm was made from it now."""
        with suppress(OSError):  # it is just being removed, which its user will be told
            os.utime(self.directory / MANIFEST)

    def disk_usage_bytes(self) -> int:
        """Give what its files really take."""
        return sum(path.stat().st_blocks * 512 for path in self.directory.iterdir())


@dataclass(frozen=True)
class WarmStart:
    """What a clone begins with: its memory as a path for qemu, the state of its devices."""

    memory: Path
    state: bytes


async def make_clone_disk(path: Path, image: WarmImage) -> None:
    """Make a clone's disk, as large as the frozen one; raises HostError, and leaves no half."""
    if not image.blank_overlay.exists():
        await make_blank_overlay(image)
    await asyncio.to_thread(copy_overlay, path, image.blank_overlay)


async def make_blank_overlay(image: WarmImage) -> None:
    """Make what the disks of an image's clones are copies of."""
    size_bytes = virtual_size_bytes(image.disk, "qcow2")
    part = image.blank_overlay.with_suffix(f".{secrets.token_hex(4)}.part")
    await create_overlay(part, image.disk, "qcow2", size_bytes)
    await asyncio.to_thread(publish, part, image.blank_overlay)


def read_warm(directory: Path) -> WarmImage | None:
    """Read a warm image; None where there is none, not all of it, or not of our making."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
        found = [(directory / name).lstat() for name in (MEMORY, STATE, DISK, MANIFEST)]
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    # Whoever else owns a file may write to it after it has been checked.
    ours = all(stat.S_ISREG(each.st_mode) and each.st_uid == os.geteuid() for each in found)
    whole = [each.st_size for each in found[:2]] == [manifest.mem_size, manifest.state_bytes]
    return WarmImage(directory, manifest) if ours and whole else None


def seal(making: Path, manifest: Manifest, final: Path) -> None:
    """Make the files read-only and durable, and give the directory its name."""
    (making / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    for name in (MEMORY, STATE, DISK, MANIFEST):
        (making / name).chmod(0o400)
        durable(making / name)
    making.rename(final)
    durable(final)
