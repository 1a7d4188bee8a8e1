"""How large a disk may be, and whether the host has room for one more."""

from oscloudd.config import Config
from oscloudd.errors import ExhaustedError, InvalidArgumentError
from oscloudd.host.resources import disk_free_bytes
from oscloudd.units import format_size

# The most that qemu 7.2 was seen to take from us; ext4 as guests make it ends at 16 TiB.
_MAX_DISK_BYTES = 64 << 40
_SECTOR_BYTES = 512


def check_disk_size(size_bytes: int) -> int:
    """Give a size that a disk can have; raises InvalidArgumentError."""
    if size_bytes % _SECTOR_BYTES or size_bytes > _MAX_DISK_BYTES:
        raise InvalidArgumentError(
            f"size {size_bytes} is no disk's",
            hint=f"give a multiple of {_SECTOR_BYTES}, at most {format_size(_MAX_DISK_BYTES)}",
            parameter="size",
        )
    return size_bytes


def check_room(config: Config, what: str) -> None:
    """Raise ExhaustedError unless the host has the space that a new disk begins with."""
    free = disk_free_bytes(config.state_path)
    least = config.limits.min_free_disk_bytes()
    if free < least:
        raise ExhaustedError(
            f"{config.state_path} has {format_size(free)} free: a new {what} needs "
            f"{format_size(least)} to begin with",
            hint="free some space, or lower [limits] min_free_disk in oscloud.toml",
            resource="disk",
            free=free,
            wanted=least,
        )
