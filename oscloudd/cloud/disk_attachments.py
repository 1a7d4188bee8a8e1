"""Disks and vms: attaching, detaching, growing; when that may be, and what it begins with.

What is then done, step by step, is in `operations`. A vm that is down has a disk as soon as the
rows say so.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from oscloudd.cloud.disk_records import DiskRecord, check_is_free, read_disk, tell_disk
from oscloudd.cloud.disk_sizes import check_disk_size
from oscloudd.cloud.disks import DiskInfo, Disks
from oscloudd.cloud.jobs import Order
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.taken import get_free_slot
from oscloudd.cloud.vm_power import check_can_plug
from oscloudd.cloud.vm_records import VmRecord, read_vm
from oscloudd.errors import InvalidArgumentError, InvalidStateError, UnavailableError
from oscloudd.store.database import Database
from oscloudd.store.models import Disk
from oscloudd.units import format_size

Decide = Callable[[VmRecord], dict[str, Any] | None]


class DiskAttachments:
    """What is done to a disk that a vm has or is to have."""

    def __init__(
        self, database: Database, disks: Disks, operations: Operations, supervisor: Supervisor
    ) -> None:
        self._database = database
        self._disks = disks
        self._operations = operations
        self._supervisor = supervisor

    async def attach(self, vm_key: int | str, disk_key: int | str, order: Order) -> DiskInfo:
        """Give a vm a data disk, at once if it runs; one that it has already stays."""
        vm, disk = await self._read(vm_key, disk_key)

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            found = read_disk(disk.id)
            if found.data_vm_id == vm.id:
                return None
            check_is_free(found)
            _check_has_no_layers(found)
            check_can_plug(self._supervisor, vm, "given a disk", "disks", may_be_paused=True)
            slot = get_free_slot(vm.id, vm.name)
            Disk.update(vm_id=vm.id, slot=slot).where(Disk.id == found.id).execute()
            return {"disk": found.id, "slot": slot}

        await self._carry_out("disk_attach", vm.id, order, decide)
        return await self._disks.info(disk.id)

    async def detach(self, vm_key: int | str, disk_key: int | str, order: Order) -> DiskInfo:
        """Take a data disk from a vm; the guest of one that runs has to let go of it."""
        vm, disk = await self._read(vm_key, disk_key)

        def decide(vm: VmRecord) -> dict[str, Any]:
            found = read_disk(disk.id)
            if found.root_vm_id == vm.id:
                raise InvalidStateError(
                    f"disk {found.name!r} is the root disk of vm {vm.name!r}: it can't be detached",
                    hint=f"it goes with its vm: oscloudctl vm-delete {vm.name}",
                )
            if found.data_vm_id != vm.id:
                raise InvalidStateError(
                    f"vm {vm.name!r} does not have disk {found.name!r}",
                    hint=f"see: oscloudctl disk-info {found.name}",
                )
            # A guest that stands still can't let go.
            verb = "deprived of a disk"
            check_can_plug(self._supervisor, vm, verb, "disks", may_be_paused=False)
            return {"disk": found.id, "slot": found.slot}

        await self._carry_out("disk_detach", vm.id, order, decide)
        return await self._disks.info(disk.id)

    async def resize(self, key: int | str, size: int, order: Order) -> DiskInfo:
        """Make a disk larger; the guest of a vm that runs sees it at once."""
        check_disk_size(size)

        def grow() -> DiskRecord:
            disk = read_disk(key)
            _check_grows(disk, size)
            if disk.vm_id is None:
                check_is_free(disk)
                _write_size(disk, size)
            return disk

        disk = await self._database.run(grow)
        if disk.vm_id is not None:
            await self._resize_of_vm(disk, disk.vm_id, size, order)
        return await self._disks.info(disk.id)

    async def _resize_of_vm(self, disk: DiskRecord, vm_id: int, size: int, order: Order) -> None:
        def decide(vm: VmRecord) -> dict[str, Any] | None:
            found = read_disk(disk.id)
            if found.vm_id != vm.id:
                raise UnavailableError(
                    f"disk {found.name!r} has just been detached", hint="try again"
                )
            _check_grows(found, size)
            verb = "given a larger disk"
            check_can_plug(self._supervisor, vm, verb, "disks", may_be_paused=True)
            if size == found.size:
                return None
            _write_size(found, size)
            return {"disk": found.id, "slot": found.slot, "size": size, "before": found.size}

        await self._carry_out("disk_resize", vm_id, order, decide)

    async def _carry_out(self, kind: str, vm_id: int, order: Order, decide: Decide) -> None:
        begun = await self._operations.begin(kind, vm_id, order, decide)
        if begun is not None:
            await asyncio.shield(begun[1])

    async def _read(self, vm_key: int | str, disk_key: int | str) -> tuple[VmRecord, DiskRecord]:
        return await self._database.run(lambda: (read_vm(vm_key), read_disk(disk_key)))


def _check_has_no_layers(disk: DiskRecord) -> None:
    """Refuse a disk that its last vm has made snapshots of: a port takes an overlay alone."""
    if disk.layer_id is not None:
        raise InvalidStateError(
            f"disk {disk.name!r} stands on layers of snapshots: it can't be a data disk",
            hint=f"start a vm on it: oscloudctl vm-create NAME --disk {disk.name}",
        )


def _check_grows(disk: DiskRecord, size: int) -> None:
    if size < disk.size:
        raise InvalidArgumentError(
            f"disk {disk.name!r} has {format_size(disk.size)} and can't become smaller: "
            "what its guest has written at the end would be lost",
            hint=f"give at least {disk.size} bytes, or make a smaller disk and copy the files",
            parameter="size",
        )


def _write_size(disk: DiskRecord, size: int) -> None:
    if size != disk.size:
        Disk.update(size=size).where(Disk.id == disk.id).execute()
        tell_disk(disk, "resized", size=size)
