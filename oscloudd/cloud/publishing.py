"""Publishing a vm: its disk becomes the image of a template, and each vm of that is somebody else.

The identity is not taken out of the image, which can't be done from outside: a vm is told at its
first boot that it has another, and to cloud-init it is a new instance.
"""

import asyncio
import shutil
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from oscloudd.cloud.flattening import Flattener, check_down, read_resting_disk
from oscloudd.cloud.jobs import Job, JobInfo, Order
from oscloudd.cloud.template_files import (
    DECLARATION,
    Boot,
    Declaration,
    Image,
    ReadyTemplate,
    Source,
    format_declaration,
)
from oscloudd.cloud.templates import TemplateInfo, Templates
from oscloudd.cloud.vm_archive import DISK, INITRD, KERNEL
from oscloudd.cloud.vm_records import VmRecord, read_vm
from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.image_check import check_image
from oscloudd.store.database import Database


class Publisher:
    """Makes templates of vms."""

    def __init__(self, database: Database, templates: Templates, flattener: Flattener) -> None:
        self._database = database
        self._templates = templates
        self._flattener = flattener

    async def publish(self, key: int | str, name: str, order: Order) -> TemplateInfo | JobInfo:
        """Make a template `name` of a vm that is down; the vm stays as it is.

        Raises InvalidArgumentError for one whose copies could not be told who they are.
        """
        vm = await self._database.run(lambda: _read_vm(key))
        template = self._templates.get_ready(vm.template)
        told_by = template.declaration.guest.identity
        if told_by != "cloud-init" and (told_by != "serial" or template.kernel is None):
            raise InvalidArgumentError(
                f"vm {vm.name!r} can't become a template: its copies would not ask who they are",
                hint="this is for vms with cloud-init, and for those with a kernel of their "
                "template's, as debian_12's",
                parameter="vm",
            )
        return await self._templates.publish(name, partial(self._fill, vm.id), order)

    async def _fill(self, vm_id: int, making: Path, job: Job) -> None:
        image = making / DISK
        async with self._flattener.hold(vm_id):
            vm = await self._database.run(lambda: _read_vm(vm_id))
            disk = await self._database.run(lambda: read_resting_disk(vm.disk_id))
            with await asyncio.to_thread(_create, image) as target:
                await self._flattener.flatten(disk, target.fileno(), "qcow2", job, directory=making)
            template = self._templates.get_ready(vm.template)
            boot = await asyncio.to_thread(_copy_boot, template, making)
        await asyncio.to_thread(image.chmod, 0o444)
        await check_image(image, "qcow2", self._flattener.user)
        said = template.declaration
        declaration = Declaration(
            description=f"published from vm {vm.name}",
            os=said.os,
            source=Source(kind="publish"),
            # Its hooks have left what they do on the disk.
            guest=msgspec.structs.replace(said.guest, commands=[], files={}),
            boot=boot,
            image=Image(file=DISK),
            min_mem_size=said.min_mem_size,
        )
        (making / DECLARATION).write_text(format_declaration(declaration), encoding="utf-8")


def _read_vm(key: int | str) -> VmRecord:
    vm = read_vm(key)
    check_down(vm)
    return vm


def _create(image: Path) -> IO[bytes]:
    # Closed: for a while everybody may write to the image.
    image.parent.chmod(0o700)
    return image.open("x+b")


def _copy_boot(template: ReadyTemplate, making: Path) -> Boot:
    """Copy what a template's vms boot with; raises HostError."""
    copied: dict[str, str] = {}
    for name, path in ((KERNEL, template.kernel), (INITRD, template.initrd)):
        if path is not None:
            try:
                shutil.copyfile(path, making / name)
            except OSError as error:
                raise HostError(f"{path} can't be copied: {error.strerror}") from error
            copied[name] = name
    boot = template.declaration.boot
    kernel, initrd = copied.get(KERNEL, ""), copied.get(INITRD, "")
    return Boot(kernel, initrd, boot.cmdline, boot.firmware)
