"""Where the files of a vm are. All of them are named by id, so a rename moves nothing.

Those of a spare, which may become a vm's, are named by its uuid, and elsewhere.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oscloudd.config import Config

_DISK = "disk.qcow2"


@dataclass(frozen=True)
class VmPaths:
    """The files and directories of one vm, or of a spare."""

    run_directory: Path
    disk_directory: Path
    qemu_log: Path
    console_log: Path

    @property
    def disk(self) -> Path:
        """The overlay the vm writes to."""
        return self.disk_directory / _DISK

    @property
    def next_disk(self) -> Path:
        """The overlay that is to be the disk in the next moment."""
        return self.disk_directory / "next.qcow2"

    @property
    def seed(self) -> Path:
        """The NoCloud seed, where the image has cloud-init."""
        return self.disk_directory / "seed.iso"

    @property
    def variables(self) -> Path:
        """The variables of its firmware, where the image boots by UEFI."""
        return self.disk_directory / "variables.fd"

    @property
    def next_variables(self) -> Path:
        """The variables that go with the overlay that is to be the disk."""
        return self.disk_directory / "next.fd"

    @property
    def suspended(self) -> Path:
        """The directory of the saved memory of a vm that is suspended."""
        return self.disk_directory / "suspended"

    def remove(self, *, keeps_disk: bool = False) -> None:
        """Remove all of them, the disk itself perhaps not; those that are gone are no error."""
        left = [self.disk_directory]
        if keeps_disk:
            for path in self.seed, self.variables:
                path.unlink(missing_ok=True)
            left = [self.suspended]
        for directory in (self.run_directory, *left):
            if directory.exists():
                shutil.rmtree(directory)
        for log in self.qemu_log, self.console_log:
            log.unlink(missing_ok=True)


def disk_directory(config: Config, disk_id: int) -> Path:
    """Give the directory of a disk."""
    return config.state_path / "disks" / str(disk_id)


def disk_file(config: Config, disk_id: int) -> Path:
    """Give the image of a disk."""
    return disk_directory(config, disk_id) / _DISK


def layers_directory(config: Config) -> Path:
    """Give the directory of all layers, each of which has one in it, named by its id."""
    return config.state_path / "layers"


def vm_paths(config: Config, vm_id: int, disk_id: int) -> VmPaths:
    """Give the paths of a vm."""
    return VmPaths(
        run_directory=config.runtime_path / "vms" / str(vm_id),
        disk_directory=disk_directory(config, disk_id),
        qemu_log=config.log_path / f"vm-{vm_id}.log",
        console_log=config.log_path / f"vm-{vm_id}.console.log",
    )


def spares_run_directory(config: Config) -> Path:
    """Give the directory that the run directories of all spares are in."""
    return config.runtime_path / "spares"


def spares_disk_directory(config: Config) -> Path:
    """Give the directory that the directories of all spares' disks are in."""
    return config.state_path / "spares"


def spare_logs(config: Config) -> Iterator[Path]:
    """Give the logs there are of spares."""
    return config.log_path.glob("spare-*.log")


def spare_paths(config: Config, uuid: str) -> VmPaths:
    """Give the paths of a spare."""
    return VmPaths(
        run_directory=spares_run_directory(config) / uuid,
        disk_directory=spares_disk_directory(config) / uuid,
        qemu_log=config.log_path / f"spare-{uuid}.log",
        console_log=config.log_path / f"spare-{uuid}.console.log",
    )
