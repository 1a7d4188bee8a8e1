"""Data disks of a machine: plugged in and out while it stands or runs.

Each is a virtio disk in a port of its own (`arguments.PORTS`), known by its slot, and needs no
argument of the command line: a machine that has just been launched gets its disks here, too.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscloudd.errors import HostError
from oscloudd.host.images import virtual_size_bytes
from oscloudd.machine.arguments import build_file_nodes, build_overlay_options, port_name
from oscloudd.machine.plugging import UNPLUG_SECONDS, check_has_port, list_devices, unplug
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.warm import resize_disk

# What qemu 7.2 keeps of a serial number (VIRTIO_BLK_ID_BYTES).
_SERIAL_LENGTH = 20

# Above the numbers of the sets that a machine is launched with.
_FIRST_SET = 100


@dataclass(frozen=True)
class DataDisk:
    """A qcow2 to be plugged in; it reads what it lacks from `base`, where it has one."""

    slot: int
    name: str
    size_bytes: int
    path: Path
    base: Path | None = None
    base_format: str = "qcow2"


def serial_of(name: str) -> str:
    """Give the serial number of a disk of this name: udev makes /dev/disk/by-id/virtio-NAME."""
    return name[:_SERIAL_LENGTH]


def node_of(slot: int) -> str:
    """Name the block node of the disk in a slot."""
    return f"data{slot}"


def build_disk_nodes(disk: DataDisk) -> list[dict[str, Any]]:
    """Give the block nodes of a disk, each before those that stand on it."""
    node, below, nodes = node_of(disk.slot), None, list[dict[str, Any]]()
    if disk.base is not None:
        below = f"{node}-base"
        nodes += build_file_nodes(below, _base_set(disk.slot), disk.base_format, read_only=True)
    options = build_overlay_options(below)
    nodes += build_file_nodes(node, _disk_set(disk.slot), "qcow2", read_only=False, options=options)
    return nodes


def build_disk_device(disk: DataDisk) -> dict[str, Any]:
    """Give the device that the guest sees."""
    return {
        "driver": "virtio-blk-pci",
        "id": _device_of(disk.slot),
        "drive": node_of(disk.slot),
        "bus": port_name(disk.slot),
        "serial": serial_of(disk.name),
    }


async def plug_disk(qemu: Qemu, disk: DataDisk) -> None:
    """Plug a disk in, larger than its file if it is to be; one that is there already stays.

    Raises HostError, and InvalidStateError when the machine has no such port; nothing is plugged
    in then.
    """
    devices = await list_devices(qemu)
    if _device_of(disk.slot) in devices:
        return
    check_has_port(devices, disk.slot, "a disk")
    await _forget_nodes(qemu, disk.slot)
    try:
        await _add_nodes(qemu, disk)
        await qemu.monitor.execute("device_add", build_disk_device(disk))
    except BaseException:
        await _forget_nodes(qemu, disk.slot)
        raise


async def unplug_disk(qemu: Qemu, slot: int, *, timeout_seconds: float = UNPLUG_SECONDS) -> None:
    """Ask the guest to let go of a disk, wait until it has, and close its files.

    Raises OperationTimeoutError when it does not, which leaves the disk where it is.
    """
    await unplug(qemu, _device_of(slot), "disk", timeout_seconds=timeout_seconds)
    await _forget_nodes(qemu, slot)


async def is_plugged(qemu: Qemu, slot: int) -> bool:
    """Tell whether there is a disk in a slot."""
    return _device_of(slot) in await list_devices(qemu)


def _device_of(slot: int) -> str:
    return f"{node_of(slot)}-device"


def _disk_set(slot: int) -> int:
    return _FIRST_SET + 2 * slot


def _base_set(slot: int) -> int:
    return _FIRST_SET + 2 * slot + 1


async def _add_nodes(qemu: Qemu, disk: DataDisk) -> None:
    with _opened(disk) as descriptors:
        for set_id, descriptor in descriptors.items():
            await qemu.monitor.execute("add-fd", {"fdset-id": set_id}, descriptor=descriptor)
    for node in build_disk_nodes(disk):
        await qemu.monitor.execute("blockdev-add", node)
    if await asyncio.to_thread(virtual_size_bytes, disk.path, "qcow2") < disk.size_bytes:
        await resize_disk(qemu, disk.size_bytes, node=node_of(disk.slot))


@contextmanager
def _opened(disk: DataDisk) -> Iterator[dict[int, int]]:
    """Open the files of a disk; give their descriptors by the number of the set they belong in."""
    wanted = {_disk_set(disk.slot): (disk.path, os.O_RDWR)}
    if disk.base is not None:
        wanted[_base_set(disk.slot)] = (disk.base, os.O_RDONLY)
    with ExitStack() as stack:
        opened = {}
        for set_id, (path, flags) in wanted.items():
            try:
                opened[set_id] = os.open(path, flags | os.O_CLOEXEC)
            except OSError as error:
                raise HostError(f"{path} can't be opened for qemu: {error.strerror}") from error
            stack.callback(os.close, opened[set_id])
        yield opened


async def _forget_nodes(qemu: Qemu, slot: int) -> None:
    """Take a slot's block nodes and descriptors out of qemu, as far as they are there."""
    node, base = node_of(slot), f"{node_of(slot)}-base"
    for name in (node, f"{node}-file", base, f"{base}-file"):
        with suppress(HostError):
            await qemu.monitor.execute("blockdev-del", {"node-name": name})
    for set_id in (_disk_set(slot), _base_set(slot)):
        with suppress(HostError):
            await qemu.monitor.execute("remove-fd", {"fdset-id": set_id})
