"""The files of one vm that is suspended: its memory and devices, and what must be like it was.

Made in a directory of its own and given its name in one rename: it is there whole or not at all.
While it is there the vm's disk is as it was then: it is removed before a guest may run.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oscloudd.errors import HostError
from oscloudd.host.images import durable, sha256_of

MANIFEST, STATE = "suspended.json", "state"


class Manifest(msgspec.Struct, frozen=True):
    """What `suspended.json` says: sizes in bytes, times in seconds since 1970.

    `key` is of the machine without its qemu, `has_memory_object` as `machine.suspend` tells.
    """

    key: str
    qemu_version: str
    accelerator: str
    has_memory_object: bool
    made_at: float
    state_bytes: int
    state_sha256: str


@dataclass(frozen=True)
class SavedState:
    """What a machine is to take up: a descriptor, which its opener closes, and its kind."""

    descriptor: int
    has_memory_object: bool


@dataclass(frozen=True)
class SuspendedFiles:
    """The saved memory of one vm, in `directory`; all methods block."""

    directory: Path

    @property
    def part(self) -> Path:
        """Where it is made."""
        return self.directory.with_name(f"{self.directory.name}.part")

    def exists(self) -> bool:
        """Tell whether a vm has saved memory, whole or damaged."""
        return self.directory.is_dir()

    def read_manifest(self) -> Manifest:
        """Read what it says of itself; raises HostError when it is missing or damaged."""
        path = self.directory / MANIFEST
        try:
            return msgspec.json.decode(path.read_bytes(), type=Manifest)
        except OSError as error:
            raise HostError(f"{path} can't be read: {error.strerror}") from error
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise HostError(f"{path} is damaged") from error

    def open_state(self, manifest: Manifest) -> int:
        """Open the saved state, checked, for a qemu to read; the caller closes the descriptor.

        Raises HostError when it is missing or damaged.
        """
        path = self.directory / STATE
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise HostError(f"{path} can't be read: {error.strerror}") from error
        if digest != manifest.state_sha256:
            os.close(descriptor)
            raise HostError(f"{path} is damaged: it is not what was saved")
        return descriptor

    def begin(self) -> int:
        """Give the descriptor that a qemu writes the state to; the caller closes it.

        Nothing may be there. Raises HostError.
        """
        try:
            self.part.mkdir(mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            return os.open(self.part / STATE, flags, 0o600)
        except OSError as error:
            raise HostError(f"{self.part} can't be written: {error.strerror}") from error

    def measure(self) -> tuple[int, str]:
        """Give size and SHA-256 of the state that was written."""
        path = self.part / STATE
        digest = sha256_of(path)
        return path.stat().st_size, digest

    def publish(self, manifest: Manifest) -> None:
        """Make what was written durable and give it its name."""
        path = self.part / MANIFEST
        try:
            path.write_bytes(msgspec.json.encode(manifest))
            path.chmod(0o600)
            for written in (self.part / STATE, path):
                durable(written)
            self.part.rename(self.directory)
        except OSError as error:
            raise HostError(f"{self.part} can't be written: {error.strerror}") from error
        durable(self.directory)

    def take(self, source: "SuspendedFiles") -> None:
        """Have the same files as `source`, which keeps them; may be called again.

        Raises HostError.
        """
        if self.exists():
            return
        try:
            shutil.rmtree(self.part, ignore_errors=True)
            self.part.mkdir(mode=0o700)
            for name in MANIFEST, STATE:
                (self.part / name).hardlink_to(source.directory / name)
            durable(self.part)
            self.part.rename(self.directory)
        except OSError as error:
            raise HostError(f"{self.directory} can't be written: {error.strerror}") from error
        durable(self.directory)

    def drop(self) -> None:
        """Remove what there is, whole or not; it does not come back after a power cut.

        Raises HostError. A guest must not run before.
        """
        try:
            if self.directory.exists():
                shutil.rmtree(self.part, ignore_errors=True)
                self.directory.rename(self.part)
                durable(self.part)
            if self.part.exists():
                shutil.rmtree(self.part)
        except OSError as error:
            raise HostError(f"{self.directory} can't be removed: {error.strerror}") from error

    def drop_part(self) -> None:
        """Remove what was begun and not finished."""
        shutil.rmtree(self.part, ignore_errors=True)
