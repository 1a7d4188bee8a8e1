"""The disks of a machine that runs or is about to: judged, plugged in, and grown.

A disk that was made larger has the new size in its row at once, and in its file as soon as a qemu
has it: no tool of ours opens an image that a guest has written to.
"""

import asyncio
import shutil

from oscloudd.cloud.disk_chain import check_chain, disk_chain
from oscloudd.cloud.disk_records import DiskRecord, read_disks
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import disk_directory, disk_file
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.config import Config
from oscloudd.host.images import virtual_size_bytes
from oscloudd.machine.hotplug import DataDisk, plug_disk
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.warm import ended_on_failure, resize_disk
from oscloudd.store.database import Database
from oscloudd.store.models import Disk


class DataDisks:
    """What qemus are given of disks beside what they are launched with."""

    def __init__(
        self, config: Config, database: Database, templates: Templates, chains: LayerChains
    ) -> None:
        self._config = config
        self._database = database
        self._templates = templates
        self._chains = chains

    async def equip(self, vm: VmRecord, qemu: Qemu) -> None:
        """Give a qemu that has just been launched the disks of its vm, and the root disk its size.

        Raises HostError; qemu has been ended and let go of then.
        """
        async with ended_on_failure(qemu, "its disks can't be plugged in"):
            await self.plug(vm.id, qemu)
            if await self.measure(vm.disk_id) < vm.disk_size:
                await resize_disk(qemu, vm.disk_size)

    async def plug(self, vm_id: int, qemu: Qemu) -> None:
        """Plug in what is not yet; raises HostError or InvalidStateError."""
        for disk in await self._database.run(lambda: read_disks(Disk.vm_id == vm_id)):
            await self.check(disk)
            await plug_disk(qemu, self._data_disk(disk))

    async def check(self, disk: DiskRecord | VmRecord) -> None:
        """Raise HostError unless a disk, or a vm's root disk, stands on what the rows say."""
        template = None if disk.template is None else self._templates.get_ready(disk.template)
        async with self._chains.reading(disk.layer_id) as layers:
            chain = disk_chain(self._config, disk, template, layers)
            await asyncio.to_thread(check_chain, chain, template)

    async def measure(self, disk_id: int) -> int:
        """Give how large the file of a disk says that it is, in bytes; raises HostError."""
        path = disk_file(self._config, disk_id)
        return await asyncio.to_thread(virtual_size_bytes, path, "qcow2")

    async def remove_unkept(self, vm_id: int) -> None:
        """Remove the files of the data disks that go with their vm: of an import cut short."""
        unkept = (Disk.vm_id == vm_id) & (Disk.is_kept == 0)
        for disk in await self._database.run_when_available(lambda: read_disks(unkept)):
            directory = disk_directory(self._config, disk.id)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    def _data_disk(self, disk: DiskRecord) -> DataDisk:
        assert disk.slot is not None
        path = disk_file(self._config, disk.id)
        if disk.template is None:
            return DataDisk(disk.slot, disk.name, disk.size, path)
        template = self._templates.get_ready(disk.template)
        base_format = template.declaration.image.format
        return DataDisk(disk.slot, disk.name, disk.size, path, template.image, base_format)
