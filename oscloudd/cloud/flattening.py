"""Disks at rest, made one image each: what exporting and publishing have in common."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from pathlib import Path

from oscloudd.cloud.disk_chain import check_chain, disk_chain
from oscloudd.cloud.disk_records import DiskRecord, check_is_made, read_disk
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.states import DOWN_STATES, VmState
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_records import VmRecord, find_vm
from oscloudd.config import Config
from oscloudd.errors import ExhaustedError, InvalidStateError
from oscloudd.host.flatten import enlarge, flatten
from oscloudd.host.image_chain import OpenLayer, measure, open_chain
from oscloudd.host.image_check import ImageFormat
from oscloudd.host.images import virtual_size_bytes
from oscloudd.host.resources import disk_free_bytes
from oscloudd.host.users import resolve_qemu_user
from oscloudd.units import format_size


def read_resting_disk(key: int | str) -> DiskRecord:
    """Read a disk in a transaction; raises InvalidStateError while its vm may write to it."""
    disk = read_disk(key)
    check_is_made(disk)
    vm = None if disk.vm_id is None else find_vm(disk.vm_id)
    if vm is not None:
        check_down(vm)
    return disk


def check_down(vm: VmRecord) -> None:
    """Raise InvalidStateError unless a vm's disk is at rest, and is all there is of it."""
    if vm.state == VmState.SUSPENDED:
        hint = f"its memory would be lost: oscloudctl vm-resume {vm.name}, then vm-stop"
    elif vm.state not in DOWN_STATES:
        hint = f"stop it: oscloudctl vm-stop {vm.name}"
    else:
        return
    raise InvalidStateError(
        f"the disk of vm {vm.name!r} can't be read: the vm is {vm.state}",
        hint=hint,
        state=vm.state,
    )


class Flattener:
    """Flattens the disks of one cloud, as qemu's user."""

    def __init__(
        self, config: Config, templates: Templates, operations: Operations, chains: LayerChains
    ) -> None:
        self._config = config
        self._templates = templates
        self._chains = chains
        self._operations = operations
        self.user = resolve_qemu_user(config.qemu.user).name

    def hold(self, vm_id: int | None) -> AbstractAsyncContextManager[None]:
        """See to it that nothing is done to a vm meanwhile; None is of no vm."""
        return nullcontext() if vm_id is None else self._operations.lock(vm_id)

    async def flatten(
        self,
        disk: DiskRecord,
        target: int,
        image_format: ImageFormat,
        job: Job,
        *,
        directory: Path,
    ) -> None:
        """Write all that is in a disk to the file open as `target`, as `host.flatten` does.

        That file is in `directory`. Raises ExhaustedError, too, when it would fill that.
        """
        template = None if disk.template is None else self._templates.get_ready(disk.template)
        with ExitStack() as stack:
            async with self._chains.reading(disk.layer_id) as layers:
                chain = disk_chain(self._config, disk, template, layers)
                await asyncio.to_thread(check_chain, chain, template)
                opened = stack.enter_context(open_chain(chain))
            job.report("flattening", disk.name)
            await self._check_room(opened, directory)
            await flatten(
                opened,
                target,
                image_format,
                self.user,
                on_fraction=lambda done: job.report("flattening", disk.name, done),
            )
        top = chain[0]
        # One that was made larger has its new size in its file when a machine has had it.
        if await asyncio.to_thread(virtual_size_bytes, top.path, top.format) < disk.size:
            await enlarge(target, image_format, disk.size, self.user)

    async def _check_room(self, chain: Sequence[OpenLayer], directory: Path) -> None:
        least = self._config.limits.min_free_disk_bytes()
        wanted, free = await measure(chain, self.user), disk_free_bytes(directory)
        if free - wanted < least:
            raise ExhaustedError(
                f"{directory} has {format_size(free)} free: the disk takes {format_size(wanted)} "
                f"there as one image, and {format_size(least)} are to stay free",
                hint="free some space, or lower [limits] min_free_disk in oscloud.toml",
                resource="disk",
                free=free,
                wanted=wanted,
            )
