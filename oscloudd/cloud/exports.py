"""Giving disks and vms away: flattened into one file, sent piece by piece to whoever asked.

The file has no name, so that nothing is left of it however this ends. How a piece gets to the
client is the caller's affair.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from oscloudd.cloud.disk_records import DiskRecord, read_disks
from oscloudd.cloud.flattening import Flattener, check_down, read_resting_disk
from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.outgoing import (
    Outgoing,
    Sink,
    describe_disk,
    describe_vm,
    open_others,
    send_archive,
    size_of,
)
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_archive import DISK, MAX_DISK_BYTES, VARIABLES
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord, read_vm
from oscloudd.config import Config
from oscloudd.errors import HostError, InvalidStateError
from oscloudd.host.image_check import ImageFormat
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Vm
from oscloudd.units import format_size

T = TypeVar("T")


class DiskExported(msgspec.Struct, frozen=True):
    """The answer of `disk_export`: what was sent, its size in bytes, its SHA-256 in hexadecimal."""

    disk: int
    name: str
    format: str
    size: int
    sha256: str


class VmExported(msgspec.Struct, frozen=True):
    """The answer of `vm_export`: what was sent, its size in bytes, its SHA-256 in hexadecimal."""

    vm: int
    name: str
    size: int
    sha256: str


class Exports:
    """Exports disks and vms, a job each, which ends when nobody waits for it any more."""

    def __init__(
        self,
        config: Config,
        database: Database,
        templates: Templates,
        jobs: Jobs,
        flattener: Flattener,
    ) -> None:
        self._config = config
        self._database = database
        self._templates = templates
        self._jobs = jobs
        self._flattener = flattener
        self._directory = config.state_path / "exports"

    def prepare(self) -> None:
        """Have a place for what is flattened, without what an earlier daemon may have left."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            path.unlink()

    async def disk(
        self, key: int | str, image_format: ImageFormat, sink: Sink, order: Order
    ) -> DiskExported:
        """Send a disk as one image that stands on nothing; the vm it is of has to be down."""
        disk = await self._database.run(lambda: read_resting_disk(key))
        job = await self._jobs.begin("disk_export", disk.name, order)

        async def export() -> DiskExported:
            with self._nameless() as image:
                async with self._flattener.hold(disk.vm_id):
                    found = await self._database.run(lambda: read_resting_disk(disk.id))
                    await self._flatten(found, image, image_format, job)
                outgoing = Outgoing(job, disk.name, sink, size_of(image))
                await outgoing.send_file(image)
            sha256 = outgoing.digest.hexdigest()
            return DiskExported(disk.id, disk.name, image_format, outgoing.sent_bytes, sha256)

        return await self._carry_out(job, export())

    async def vm(self, key: int | str, sink: Sink, order: Order) -> VmExported:
        """Send a vm that is down, with all that another cloud needs to run it."""
        vm = (await self._database.run(lambda: _read_resting_vm(key))).vm
        self._templates.get_ready(vm.template)
        job = await self._jobs.begin("vm_export", vm.name, order)

        async def export() -> VmExported:
            with ExitStack() as stack:
                async with self._flattener.hold(vm.id):
                    # It may be deleted, or started, while it is sent.
                    found = await self._database.run(lambda: _read_resting_vm(vm.id))
                    template = self._templates.get_ready(found.vm.template)
                    members = await self._gather(stack, found, template, job)
                disks = [describe_disk(disk) for disk in found.data]
                manifest = describe_vm(
                    found.vm, found.document, template.declaration, members, disks
                )
                outgoing = await send_archive(job, manifest, members, sink)
            sha256 = outgoing.digest.hexdigest()
            return VmExported(vm.id, vm.name, outgoing.sent_bytes, sha256)

        return await self._carry_out(job, export())

    async def _carry_out(self, job: Job, work: Coroutine[Any, Any, T]) -> T:
        """Do a job for as long as its caller is there."""
        job.cancellable = True
        task = self._jobs.run(job, job.interruptible(work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            job.interrupt()
            raise

    async def _gather(
        self, stack: ExitStack, found: "_RestingVm", template: ReadyTemplate, job: Job
    ) -> dict[str, IO[bytes]]:
        """Give all files of a vm, open, in the order in which they are sent."""
        paths = vm_paths(self._config, found.vm.id, found.vm.disk_id)
        members = open_others(stack, template, paths)
        if template.is_uefi:
            members[VARIABLES] = copy = stack.enter_context(self._nameless())
            await asyncio.to_thread(_copy, paths.variables, copy)
        for disk in (found.root, *found.data):
            image = stack.enter_context(self._nameless())
            await self._flatten(disk, image, "qcow2", job)
            members[DISK if disk is found.root else describe_disk(disk).member] = image
        return members

    def _nameless(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._directory, buffering=0)

    async def _flatten(
        self, disk: DiskRecord, image: IO[bytes], image_format: ImageFormat, job: Job
    ) -> None:
        directory = self._directory
        await self._flattener.flatten(disk, image.fileno(), image_format, job, directory=directory)


@dataclass(frozen=True)
class _RestingVm:
    """A vm that is down, what its guest is still to be told, and its disks, data disks by slot."""

    vm: VmRecord
    document: str
    root: DiskRecord
    data: list[DiskRecord]


def _read_resting_vm(key: int | str) -> _RestingVm:
    """Read a vm in a transaction; raises InvalidStateError unless all of it can be exported."""
    vm = read_vm(key)
    check_down(vm)
    document: str = Vm.select(Vm.seed_document).where(Vm.id == vm.id).tuples().first()[0]
    data = sorted(read_disks(Disk.vm_id == vm.id), key=lambda disk: disk.slot or 0)
    root = read_resting_disk(vm.disk_id)
    for disk in (root, *data):
        if disk.size > MAX_DISK_BYTES:
            raise InvalidStateError(
                f"vm {vm.name!r} can't be exported: its disk {disk.name!r} has "
                f"{format_size(disk.size)}, and no vm_import takes more than "
                f"{format_size(MAX_DISK_BYTES)}",
                hint="disk-export takes disks of any size, one by one",
                state=vm.state,
            )
    return _RestingVm(vm, document, root, data)


def _copy(source: Path, target: IO[bytes]) -> None:
    try:
        with source.open("rb", buffering=0) as file:
            shutil.copyfileobj(file, target)
    except OSError as error:
        raise HostError(f"{source} can't be copied: {error.strerror}") from error
