"""Disks as things of their own: made, looked at, deleted.

What vms do with them, and how they grow, is in `disk_attachments`.
"""

import asyncio
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oscloudd.cloud.disk_records import (
    DiskRecord,
    check_is_free,
    read_disk,
    read_disks,
    tell_disk,
)
from oscloudd.cloud.disk_sizes import check_disk_size, check_room
from oscloudd.cloud.job_rows import insert_job
from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import disk_directory, disk_file
from oscloudd.config import Config
from oscloudd.errors import AlreadyExistsError, InvalidArgumentError, UnavailableError
from oscloudd.host.images import create_empty, create_overlay, durable, virtual_size_bytes
from oscloudd.machine.hotplug import serial_of
from oscloudd.store.database import Database
from oscloudd.store.models import Disk
from oscloudd.store.models import Job as JobRow


class DiskInfo(msgspec.Struct, frozen=True):
    """The answer of `disk_info`: `allocated` is what it takes on the host, in bytes.

    `role` is what it is to its vm, root or data; a data disk is in one of the vm's slots, and
    `serial` is what its guest knows it by. One that is `kept` stays when its vm is deleted.
    """

    id: int
    name: str
    size: int
    format: str
    template: str | None
    vm: str | None
    role: str | None
    slot: int | None
    serial: str | None
    kept: bool
    path: str
    allocated: int
    created_at: float


class DiskDeleted(msgspec.Struct, frozen=True):
    """The answer of `disk_delete`."""

    deleted: int
    name: str


@dataclass(frozen=True)
class DiskRequest:
    """A disk that somebody wants: of `size` bytes, on a template, or both."""

    name: str
    size: int | None
    template: str | None


class Disks:
    """All disks of this cloud."""

    def __init__(
        self, config: Config, database: Database, templates: Templates, jobs: Jobs
    ) -> None:
        self._config = config
        self._database = database
        self._templates = templates
        self._jobs = jobs

    async def list(self) -> list[DiskInfo]:
        """Describe every disk, by id."""
        return await self._database.run(lambda: [self._describe(disk) for disk in read_disks()])

    async def info(self, key: int | str) -> DiskInfo:
        """Describe one disk; raises NotFoundError."""
        return self._describe(await self._database.run(lambda: read_disk(key)))

    async def create(self, request: DiskRequest, order: Order) -> DiskInfo:
        """Make an empty disk, or one that begins as a template does."""
        template = None
        if request.template is not None:
            template = await self._templates.ensure(request.template, order)
        size = _choose_size(request, template)
        check_room(self._config, "disk")
        row = await self._database.run(
            lambda: _insert(request.name, size, template, order.owner_uid)
        )
        job = self._jobs.take(row, order.listener)
        await asyncio.shield(self._jobs.run(job, self._make(job, size, template)))
        return await self.info(job.params["disk"])

    async def delete(self, key: int | str) -> DiskDeleted:
        """Remove a disk that no vm has: there is no way back."""

        def forget() -> DiskRecord:
            disk = read_disk(key)
            check_is_free(disk)
            Disk.delete().where(Disk.id == disk.id).execute()
            tell_disk(disk, "deleted")
            return disk

        disk = await self._database.run(forget)
        # A daemon that dies here leaves a directory without a row, which the next one sweeps out.
        await asyncio.to_thread(_remove, disk_directory(self._config, disk.id))
        return DiskDeleted(disk.id, disk.name)

    async def _make(self, job: Job, size: int, template: ReadyTemplate | None) -> None:
        disk_id = job.params["disk"]
        directory = disk_directory(self._config, disk_id)
        job.report("disk", "making a disk")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path = disk_file(self._config, disk_id)
            if template is None:
                await create_empty(path, size)
            else:
                image_format = template.declaration.image.format
                await create_overlay(path, template.image, image_format, size)
            await asyncio.to_thread(durable, directory)
        except asyncio.CancelledError:
            raise  # the daemon stops, and the next one forgets the disk
        except BaseException:
            await self._database.run_when_available(lambda: _forget_unmade(disk_id))
            await asyncio.to_thread(_remove, directory)
            raise

    def _describe(self, disk: DiskRecord) -> DiskInfo:
        path = disk_file(self._config, disk.id)
        return DiskInfo(
            id=disk.id,
            name=disk.name,
            size=disk.size,
            format="qcow2",
            template=disk.template,
            vm=disk.vm,
            role=disk.role,
            slot=disk.slot,
            serial=None if disk.role == "root" else serial_of(disk.name),
            kept=bool(disk.is_kept),
            path=str(path),
            allocated=path.stat().st_blocks * 512 if path.exists() else 0,
            created_at=disk.created_at,
        )


def forget_interrupted(row: JobRow) -> None:
    """Forget the disk that a daemon died in making, inside a transaction; its file is swept out."""
    if row.kind == "disk_create":
        _forget_unmade(msgspec.json.decode(row.params)["disk"])


def _forget_unmade(disk_id: int) -> None:
    Disk.delete().where(Disk.id == disk_id).execute()


def _choose_size(request: DiskRequest, template: ReadyTemplate | None) -> int:
    least = 0
    if template is not None:
        least = virtual_size_bytes(template.image, template.declaration.image.format)
    size = request.size or least
    if not size:
        raise InvalidArgumentError(
            "a disk needs a size or a template",
            hint='give size, such as "10G", or the name of a template',
            parameter="size",
        )
    if size < least:
        raise InvalidArgumentError(
            f"size {size} is smaller than the template {request.template}",
            hint=f"give it at least {least} bytes",
            parameter="size",
        )
    return check_disk_size(size)


def _insert(name: str, size: int, template: ReadyTemplate | None, owner_uid: int) -> JobRow:
    if Disk.select().where(Disk.name == name).exists():
        raise AlreadyExistsError(
            f"disk {name!r} already exists",
            hint="choose another name, or delete it: oscloudctl disk-delete " + name,
            object="disk",
            name=name,
        )
    if template is not None and not template.image.exists():
        raise UnavailableError(
            f"template {template.name} has just been deleted", hint="choose another"
        )
    disk = Disk.create(
        name=name,
        size=size,
        template_name=None if template is None else template.name,
        is_kept=True,
        created_at=time.time(),
    )
    return insert_job("disk_create", name, owner_uid, stage="disk", params={"disk": disk.id})


def _remove(directory: Path) -> None:
    # The sweep may be at it, too.
    shutil.rmtree(directory, ignore_errors=True)
