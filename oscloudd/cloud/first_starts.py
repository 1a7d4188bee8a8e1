"""How a new vm begins: with a spare, as a clone of a warm image, or by booting its template.

Each falls back to the next where it fails. Which of them is tried is written in the vm's row and
its job when it is made, in `vm_create`; the steps that call this are in `vm_steps`.
"""

import asyncio
import logging
import shutil
import time
from pathlib import Path

from oscloudd.cloud.events import Events
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.layers import layer_disk, layer_variables
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.states import VmState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.template_hooks import hooks_of
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates
from oscloudd.cloud.warm_files import WarmImage, frozen_disk, make_clone_disk
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.cloud.warm_making import Shape
from oscloudd.cloud.warm_pool import WarmPool
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError
from oscloudd.guest.hooks import Hooks
from oscloudd.host.firmware import UEFI_VARIABLES
from oscloudd.host.images import create_overlay, durable

_log = logging.getLogger(__name__)


class FirstStarts:
    """What is done at a vm's first start only; it may be done again after a daemon died in it."""

    def __init__(
        self,
        config: Config,
        states: VmStates,
        templates: Templates,
        supervisor: Supervisor,
        warm_images: WarmImages,
        pool: WarmPool,
        slots: StartSlots,
        events: Events,
    ) -> None:
        self._config = config
        self._states = states
        self._templates = templates
        self._supervisor = supervisor
        self._warm_images = warm_images
        self._pool = pool
        self._slots = slots
        self._events = events

    async def make_disk(self, job: Job, vm: VmRecord) -> None:
        """Make the disk of a new vm, unless a spare brings its own."""
        if self._pool.find_claimed(job.params.get("spare")) is not None:
            return
        async with self._slots:
            began = time.monotonic()
            await self._make_overlay(vm, await self._warm_image_of(job, vm))
            job.timings["overlay"] = time.monotonic() - began

    def hooks_of(self, vm: VmRecord) -> Hooks:
        """Give what the vm's template does in each of its guests. Blocking."""
        return hooks_of(self._templates.get_ready(vm.template))

    async def take_spare(self, job: Job, vm: VmRecord) -> bool:
        """Make the spare that was claimed for a vm its qemu; False where it has none that works."""
        spare = self._pool.find_claimed(job.params.get("spare"))
        if spare is None:
            return False
        try:
            with self._slots.without_turn():
                await self._supervisor.take(vm, spare, job.timings)
        except CloudError as error:
            await self._pool.end_claimed(spare.uuid)
            await self._warn(vm, "its spare clone can't be used, and another is restored", error)
            return False
        self._pool.taken(spare)
        return True

    async def choose_warm(self, job: Job, vm: VmRecord) -> WarmImage | None:
        """Give the warm image a vm begins with, when its turn has come; None for one that boots."""
        warm = await self._warm_image_of(job, vm)
        if warm is not None:
            job.end_turn()
            job.clone_turn = await self._slots.begin_clone()
        return warm

    async def spawn_clone(self, job: Job, vm: VmRecord, warm: WarmImage | None) -> bool:
        """Start a vm that is to begin warm; False for one that boots, whose disk is there then."""
        if _lacks_disk(job, vm, warm):
            await self._make_overlay(vm, warm)
        if warm is None:
            return False
        try:
            start = await self._warm_images.open(warm)
            await self._supervisor.spawn(vm, job.timings, start)
        except HostError as error:
            await self._tell_fallback(job, vm, error)
            await self._spawn_cold(job, vm)
        return True

    async def see_told(self, job: Job, vm: VmRecord) -> None:
        """See that a clone takes its identity in; one that does not is started cold, once."""
        if vm.started != "warm" or vm.identified:
            return
        with self._slots.without_turn():
            try:
                await self._supervisor.identified(vm.id)
            except CloudError as error:
                await self._tell_fallback(job, vm, error)
                await self._states.see(vm.id, VmState.STOPPING)
                qemu = self._supervisor.find(vm.id)
                if qemu is not None:
                    await qemu.stop(force=True)
                await self._supervisor.released(vm.id)
                await self._states.see(vm.id, VmState.STARTING)
                await self._spawn_cold(job, vm)
                await self._supervisor.let_run(vm)

    def keep_warm(self, vm: VmRecord) -> None:
        """A vm of this shape has booted: the next one need not."""
        self._warm_images.consider(vm.template, vm.mem_size, vm.cpus, vm.disk_size)

    async def give_up(self, job: Job) -> None:
        """End the spare and the turn of a vm that is not to be."""
        job.end_turn()
        await self._pool.end_claimed(job.params.get("spare"))

    async def _warm_image_of(self, job: Job, vm: VmRecord) -> WarmImage | None:
        """Give what a new vm begins with; None for one that has its identity, or begins cold."""
        if vm.warm_image is None or not _is_to_begin_warm(job, vm):
            return None
        if not job.is_resumed:
            return self._warm_images.get(vm.warm_image)
        # Another qemu may have been installed since it was chosen.
        shape = Shape(self._templates.get_ready(vm.template), vm.mem_size, vm.cpus, vm.disk_size)
        return await self._warm_images.get_fitting(vm.warm_image, shape)

    async def _spawn_cold(self, job: Job, vm: VmRecord) -> None:
        await self._make_overlay(vm)
        await self._supervisor.spawn(vm, job.timings)

    async def _make_overlay(self, vm: VmRecord, warm: WarmImage | None = None) -> None:
        """Make a fresh overlay on what the vm's disk stands on.

        One to begin warm with is as large as the frozen disk; the clone's machine makes it larger.
        """
        template = self._templates.get_ready(vm.template)
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        for directory in (paths.disk_directory, paths.qemu_log.parent):
            directory.mkdir(parents=True, exist_ok=True)
        if template.is_uefi:
            await asyncio.to_thread(shutil.copyfile, self._variables_of(vm), paths.variables)
            await asyncio.to_thread(durable, paths.variables)
        if vm.is_disk_kept:  # it was there before
            return
        if warm is not None:
            await make_clone_disk(paths.disk, warm)
            return
        base, base_format = template.image, template.declaration.image.format
        if vm.layer_id is not None:
            base, base_format = layer_disk(self._config, vm.layer_id), "qcow2"
        elif vm.warm_image is not None:
            base, base_format = frozen_disk(self._config, vm.warm_image), "qcow2"
        await create_overlay(paths.disk, base, base_format, vm.disk_size)

    def _variables_of(self, vm: VmRecord) -> Path:
        """Give what a firmware's variables begin as: a clone's, as its original's were."""
        if vm.layer_id is not None:
            kept = layer_variables(self._config, vm.layer_id)
            if kept.exists():
                return kept
        return UEFI_VARIABLES

    async def _tell_fallback(self, job: Job, vm: VmRecord, error: CloudError) -> None:
        job.end_turn()
        message = "it is started cold, since its warm start failed"
        job.report("starting", f"{message}: {error.message}")
        await self._warn(vm, message, error)

    async def _warn(self, vm: VmRecord, what: str, error: CloudError) -> None:
        message = f"{what}: {error.message}"
        _log.warning("vm %d (%s): %s", vm.id, vm.name, message)
        await self._events.warn(vm.name, message, vm_id=vm.id)


def _is_to_begin_warm(job: Job, vm: VmRecord) -> bool:
    return job.kind == "vm_create" and vm.warm_image is not None and not vm.identified


def _lacks_disk(job: Job, vm: VmRecord, warm: WarmImage | None) -> bool:
    """Tell whether a vm made to begin warm has no disk yet, or none for what it begins with now.

    What a clone that ran has written does not go with the memory it began with.
    """
    is_other = warm is None or job.is_resumed or "spare" in job.params
    return is_other and _is_to_begin_warm(job, vm)
