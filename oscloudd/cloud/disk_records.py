"""A disk as the database has it, with the vm that has it; and who may have it next.

Everything here is for inside a transaction.
"""

import msgspec
from peewee import JOIN, Expression

from oscloudd.cloud.events import EventKind, insert_event
from oscloudd.cloud.job_rows import JobState
from oscloudd.cloud.missing import missing
from oscloudd.errors import InUseError, InvalidStateError
from oscloudd.store.models import Disk, Vm
from oscloudd.store.models import Job as JobRow
from oscloudd.units import is_possible_id, parse_key


class DiskRecord(msgspec.Struct, frozen=True):
    """One disk; `slot` is None for the root disk of a vm, which boots from it."""

    id: int
    name: str
    size: int
    template: str | None
    slot: int | None
    is_kept: int  # 0 or 1, as SQLite has it; so is `has_identity`
    has_identity: int
    created_at: float
    data_vm_id: int | None
    data_vm: str | None
    root_vm_id: int | None
    root_vm: str | None
    layer_id: int | None
    warm_image: str | None

    @property
    def vm_id(self) -> int | None:
        """The id of the vm that has it."""
        return self.data_vm_id if self.root_vm_id is None else self.root_vm_id

    @property
    def vm(self) -> str | None:
        """The name of the vm that has it."""
        return self.data_vm if self.root_vm_id is None else self.root_vm

    @property
    def role(self) -> str | None:
        """What it is to that vm: root or data."""
        if self.root_vm_id is not None:
            return "root"
        return None if self.data_vm_id is None else "data"


def read_disks(condition: Expression | None = None) -> list[DiskRecord]:
    """Read the disks, by id; all of them, or those that a condition holds for."""
    data_vm, root_vm = Vm.alias(), Vm.alias()
    query = (
        Disk.select(
            Disk.id, Disk.name, Disk.size, Disk.template_name, Disk.slot, Disk.is_kept,
            Disk.has_identity, Disk.created_at, data_vm.id, data_vm.name, root_vm.id, root_vm.name,
            Disk.layer_id, Disk.warm_image,
        )
        .join(data_vm, JOIN.LEFT_OUTER, on=(data_vm.id == Disk.vm_id))
        .switch(Disk)
        .join(root_vm, JOIN.LEFT_OUTER, on=(root_vm.disk == Disk.id))
        .order_by(Disk.id)
    )  # fmt: skip
    if condition is not None:
        query = query.where(condition)
    return [DiskRecord(*row) for row in query.tuples()]


def read_disk(key: int | str) -> DiskRecord:
    """Read a disk by id or name; raises NotFoundError."""
    key = parse_key(key)
    is_possible = isinstance(key, str) or is_possible_id(key)
    condition = Disk.id == key if isinstance(key, int) else Disk.name == key
    found = read_disks(condition) if is_possible else []
    if not found:
        raise missing("disk", key)
    return found[0]


def check_is_free(disk: DiskRecord) -> None:
    """Raise InUseError while a vm has a disk, or while it is being made."""
    if disk.vm is not None:
        hints = {
            "root": f"it goes with its vm: oscloudctl vm-delete {disk.vm}",
            "data": f"detach it first: oscloudctl disk-detach {disk.vm} {disk.name}",
        }
        raise InUseError(
            f"disk {disk.name!r} is in use: it is the {disk.role} disk of vm {disk.vm!r}",
            hint=hints[disk.role or "data"],
            vm=disk.vm,
        )
    check_is_made(disk)


def check_is_made(disk: DiskRecord) -> None:
    """Raise InUseError while a disk is being made."""
    making = JobRow.select(JobRow.id).where(
        JobRow.kind == "disk_create", JobRow.state == JobState.RUNNING, JobRow.target == disk.name
    )
    job = making.tuples().first()
    if job is not None:
        raise InUseError(
            f"disk {disk.name!r} is being made",
            hint=f"wait for it: oscloudctl job-wait {job[0]}",
            job=job[0],
        )


def check_can_boot(disk: DiskRecord, *, takes_identity_once: bool) -> None:
    """Raise InUseError or InvalidStateError unless a new vm can begin on a disk."""
    check_is_free(disk)
    if disk.has_identity and takes_identity_once:
        raise InvalidStateError(
            f"disk {disk.name!r} has the identity of a vm that was deleted",
            hint="attach it to another vm to get at its files, or make a new one: oscloudctl "
            f"disk-create NAME --template {disk.template}",
        )


def detach_disk(disk_id: int, vm_id: int) -> None:
    """Take a data disk from the vm that has it."""
    has_it = Disk.vm_id == vm_id
    Disk.update(vm_id=None, slot=None).where(Disk.id == disk_id, has_it).execute()


def tell_disk(disk: DiskRecord, change: str, *, size: int | None = None) -> None:
    """Write the event of a change that no job tells of."""
    data = {"change": change, "size": disk.size if size is None else size}
    insert_event(EventKind.DISK, disk.name, data, vm_id=disk.vm_id)
