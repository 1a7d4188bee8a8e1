"""Where the files of a vm are. All of them are named by id, so a rename moves nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from oscloudd.config import Config


@dataclass(frozen=True)
class VmPaths:
    """The files and directories of one vm."""

    run_directory: Path
    disk_directory: Path
    qemu_log: Path
    console_log: Path

    @property
    def disk(self) -> Path:
        """The overlay the vm writes to."""
        return self.disk_directory / "disk.qcow2"

    @property
    def seed(self) -> Path:
        """The NoCloud seed, where the image has cloud-init."""
        return self.disk_directory / "seed.iso"

    @property
    def suspended(self) -> Path:
        """The directory of the saved memory of a vm that is suspended."""
        return self.disk_directory / "suspended"

    def remove(self) -> None:
        """Remove all of them; those that are gone already are no error."""
        for directory in (self.run_directory, self.disk_directory):
            if directory.exists():
                shutil.rmtree(directory)
        for log in self.qemu_log, self.console_log:
            log.unlink(missing_ok=True)


def disk_directory(config: Config, disk_id: int) -> Path:
    """Give the directory of a disk."""
    return config.state_path / "disks" / str(disk_id)


def vm_paths(config: Config, vm_id: int, disk_id: int) -> VmPaths:
    """Give the paths of a vm."""
    return VmPaths(
        run_directory=config.runtime_path / "vms" / str(vm_id),
        disk_directory=disk_directory(config, disk_id),
        qemu_log=config.log_path / f"vm-{vm_id}.log",
        console_log=config.log_path / f"vm-{vm_id}.console.log",
    )
