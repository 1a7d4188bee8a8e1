"""The steps that snapshots of a vm and clones of it are made of, beside those of `vm_steps`.

To freeze a disk, its file gets a second name, as a layer, and an overlay on that takes the first
one in one rename. From then on a start finds the layer and the overlay, whatever a qemu that still
runs writes to: told to switch it writes to the overlay, and until then to the layer, below an
overlay that is empty. So no end of anything, at any moment, loses what a guest has written.
"""

import asyncio
import logging
from pathlib import Path

import msgspec

from oscloudd.cloud.jobs import Job
from oscloudd.cloud.layers import (
    find_unneeded_layers,
    forget_layers,
    layer_disk,
    layer_memory,
    layer_variables,
    remove_layers,
)
from oscloudd.cloud.nic_steps import NicSteps
from oscloudd.cloud.states import LIVE_STATES, VmState, WantedState
from oscloudd.cloud.suspended_files import SuspendedFiles
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import write_state
from oscloudd.errors import CloudError, HostError
from oscloudd.host.images import copy_steady, create_overlay, durable, publish
from oscloudd.machine.live_disk import overlay_node, switch_disk, top_node
from oscloudd.machine.suspend import let_go_on
from oscloudd.store.models import Disk, Layer, Snapshot

_log = logging.getLogger(__name__)


class SnapshotSteps(NicSteps):
    """What can be done to a vm, and to what its disk stands on."""

    # Freezing

    async def freezing(self, job: Job) -> None:
        """Give the disk's file its second name, and make the overlay that is to take the first."""
        vm, layer_id = await self._get(job), job.params["layer"]
        await self._disks.check(vm)
        await asyncio.to_thread(_link, self._paths(vm).disk, layer_disk(self._config, layer_id))
        await self._make_next(vm, layer_id, vm.disk_size)

    async def holding(self, job: Job) -> None:
        """Stop the guest, for its memory to go with its disk."""
        await self._supervisor.get(await self._get(job)).pause()

    async def switching(self, job: Job) -> None:
        """Keep what its firmware remembers, and have the overlay for the disk, in its qemu too if
        the vm has one.
        """
        vm, layer_id = await self._get(job), job.params["layer"]
        kept = layer_variables(self._config, layer_id)
        await asyncio.to_thread(_keep_variables, self._paths(vm).variables, kept)
        await asyncio.to_thread(_put_in_place, self._paths(vm).next_disk, self._paths(vm).disk)
        qemu = self._supervisor.find(vm.id)
        if qemu is not None:
            await switch_disk(qemu, self._paths(vm).disk, layer_id)

    async def remembering(self, job: Job) -> None:
        """Save the guest's memory beside the layer that it goes with."""
        vm, layer_id = await self._get(job), job.params["layer"]
        files = SuspendedFiles(layer_memory(self._config, layer_id))
        if job.is_resumed and files.exists():
            return
        qemu = self._supervisor.get(vm)
        then = msgspec.structs.replace(vm, layer_id=layer_id)
        await self._suspension.save(then, qemu, is_resumed=job.is_resumed, files=files)

    async def recording(self, job: Job) -> None:
        """Write down what the disk stands on now."""
        vm = await self._get(job)
        await self._record_frozen(vm, job.params["layer"])

    async def going_on(self, job: Job) -> None:
        """Let the guest go on whose memory was saved, if it is still there."""
        vm = await self._get(job)
        if job.params["memory"]:
            await self._let_go_on(job, vm)
        await self._see_again(job, vm)

    async def undo_freeze(self, job: Job, error: BaseException) -> None:
        """Have the disk as it was, or, where its guest may write to the overlay, a nameless layer.

        What the guest has written is there in both cases.
        """
        vm, layer_id = await self._states.find(job.vm_id), job.params["layer"]
        if vm is None:
            return
        if await self._can_go_back(vm, layer_id):
            await asyncio.to_thread(self._go_back, vm, layer_id)
            await self._states.change(lambda: _forget_frozen(layer_id))
        else:
            await self._states.change(lambda: _forget_name(layer_id))
            await self._record_frozen(vm, layer_id)
            memory = SuspendedFiles(layer_memory(self._config, layer_id))
            await asyncio.to_thread(memory.drop)
        if job.params["memory"]:
            await self._let_go_on(job, vm)
        await self._see_again(job, vm)

    async def _let_go_on(self, job: Job, vm: VmRecord) -> None:
        qemu = self._supervisor.find(vm.id)
        if qemu is None:
            return
        try:
            await let_go_on(qemu, stays_paused=job.params["paused"])
        except CloudError as error:
            _log.warning("vm %d (%s) stands still: %s", vm.id, vm.name, error.message)
        await self._supervisor.refresh(vm)

    async def _can_go_back(self, vm: VmRecord, layer_id: int) -> bool:
        paths, layer = self._paths(vm), layer_disk(self._config, layer_id)
        if not await asyncio.to_thread(_is_in_place, paths.disk, layer):
            return True
        qemu = self._supervisor.find(vm.id)
        try:
            return qemu is not None and await top_node(qemu) != overlay_node(layer_id)
        except CloudError:
            return False

    def _go_back(self, vm: VmRecord, layer_id: int) -> None:
        paths, layer = self._paths(vm), layer_disk(self._config, layer_id)
        if _is_in_place(paths.disk, layer):
            layer.replace(paths.disk)
            durable(paths.disk)
        paths.next_disk.unlink(missing_ok=True)
        remove_layers(self._config, [layer_id])

    async def _record_frozen(self, vm: VmRecord, layer_id: int) -> None:
        await asyncio.to_thread(layer_disk(self._config, layer_id).chmod, 0o400)
        await self._states.change(lambda: _record_layer(vm.disk_id, layer_id))

    async def _see_again(self, job: Job, vm: VmRecord) -> None:
        """Write down what has become of a qemu that ended while no daemon was there to see it."""
        if not job.is_resumed or vm.state not in LIVE_STATES or self._supervisor.find(vm.id):
            return
        if vm.is_process_alive():
            await self._supervisor.refresh(vm)
            return
        await self.end_stray(vm)
        reason = "qemu ended while the daemon was away"
        await self._states.see(vm.id, VmState.CRASHED, reason)
        self._supervisor.on_ended(vm.id)

    # Restoring

    async def overlay(self, job: Job) -> None:
        """Make the overlay on a snapshot's layer that is to be the disk, and what goes with it."""
        vm, layer_id = await self._get(job), job.params["layer"]
        # A power cut may have brought back what an undone restore had made. It is gone for good
        # with the overlay's name, which is made durable in the same directory.
        await asyncio.to_thread(self._paths(vm).next_variables.unlink, missing_ok=True)
        await self._make_next(vm, layer_id, job.params["size"])
        kept = layer_variables(self._config, layer_id)
        if kept.exists():
            await asyncio.to_thread(copy_steady, kept, self._paths(vm).next_variables)

    async def parting(self, job: Job) -> None:
        """See the end of the vm's qemu, and drop what it was suspended with."""
        await self._release(job)
        await self._suspension.drop(await self._get(job))

    async def swapping(self, job: Job) -> None:
        """Put the overlay in the disk's place, and what the snapshot has besides with it: the
        firmware's variables, the memory.

        The overlay is there since an earlier step: where it is missing, it is in its place.
        """
        vm, layer_id = await self._get(job), job.params["layer"]
        paths = self._paths(vm)
        await asyncio.to_thread(_put_in_place, paths.next_disk, paths.disk)
        await asyncio.to_thread(_put_in_place, paths.next_variables, paths.variables)
        if job.params["resumes"]:
            saved = SuspendedFiles(layer_memory(self._config, layer_id))
            await asyncio.to_thread(SuspendedFiles(paths.suspended).take, saved)
        await self._record_restored(vm, job)

    async def undo_restore(self, job: Job, error: BaseException) -> None:
        """Keep the disk there was, before it was given up; then the vm is down, with the other.

        What could not be put in its place is the memory then, and its next start is a cold one.
        """
        vm = await self._states.find(job.vm_id)
        if vm is None:
            return
        if job.step > _SWAPPED:
            await self.undo_start(job, error)
        elif job.step == _SWAPPED and not self._paths(vm).next_disk.exists():
            paths = self._paths(vm)
            await asyncio.to_thread(_put_in_place, paths.next_variables, paths.variables)
            await self._record_restored(vm, job)
            await self.undo_start(job, error)
        else:
            for following in self._paths(vm).next_disk, self._paths(vm).next_variables:
                await asyncio.to_thread(following.unlink, missing_ok=True)
            if job.params["stops"]:
                await self.undo_stop(job, error)

    async def _record_restored(self, vm: VmRecord, job: Job) -> None:
        freed = await self._states.change(lambda: _record_restored(vm, job))
        await asyncio.to_thread(remove_layers, self._config, freed)

    # Deleting

    async def dropping(self, job: Job) -> None:
        """Remove layers that have no row any more, and the memory of one that stays."""
        memory = SuspendedFiles(layer_memory(self._config, job.params["layer"]))
        await asyncio.to_thread(memory.drop)
        await asyncio.to_thread(remove_layers, self._config, job.params["layers"])
        await self._see_again(job, await self._get(job))

    async def merging(self, job: Job) -> None:
        """Have layers that have no name any more be parts of those that stand on them."""
        vm = await self._states.find(job.vm_id)
        if vm is not None:  # it is not held, and may have been deleted
            await self._merger.merge_all(vm, job)

    async def _make_next(self, vm: VmRecord, layer_id: int, size_bytes: int) -> None:
        layer = layer_disk(self._config, layer_id)
        await create_overlay(self._paths(vm).next_disk, layer, "qcow2", size_bytes)


# How many steps of a restore are done when the disk that was is to go.
_SWAPPED = 3


def _link(disk: Path, layer: Path) -> None:
    """Give a disk's file a second name; what an earlier daemon came to is left as it is."""
    try:
        layer.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not layer.exists():
            layer.hardlink_to(disk)
    except OSError as error:
        raise HostError(f"{layer} can't be made: {error.strerror}") from error
    durable(layer)
    durable(layer.parent)


def _keep_variables(variables: Path, kept: Path) -> None:
    """Keep a firmware's variables, if it has any, as they were when this was first asked for."""
    if variables.exists() and not kept.exists():
        copy_steady(variables, kept)


def _put_in_place(following: Path, file: Path) -> None:
    """Have `following` for a file; where it is gone, an earlier daemon has."""
    if following.exists():
        publish(following, file)


def _is_in_place(disk: Path, layer: Path) -> bool:
    """Tell whether the disk is another file than the layer by now."""
    return layer.exists() and not disk.samefile(layer)


def _record_layer(disk_id: int, layer_id: int) -> None:
    Layer.update(whole=True).where(Layer.id == layer_id).execute()
    Disk.update(layer_id=layer_id).where(Disk.id == disk_id).execute()


def _forget_name(layer_id: int) -> None:
    Snapshot.delete().where(Snapshot.layer == layer_id).execute()


def _forget_frozen(layer_id: int) -> None:
    _forget_name(layer_id)
    forget_layers([layer_id])


def _record_restored(vm: VmRecord, job: Job) -> list[int]:
    """Write down what a disk stands on after a restore; give the layers that nobody needs now."""
    size, layer_id = job.params["size"], job.params["layer"]
    Disk.update(layer_id=layer_id, size=size).where(Disk.id == vm.disk_id).execute()
    unneeded = find_unneeded_layers()
    forget_layers(unneeded)
    if not job.params["runs_on"]:
        reason = f"restored to snapshot {job.params['name']!r}"
        write_state(vm.id, VmState.STOPPED, reason, wanted=WantedState.STOPPED)
    else:
        write_state(vm.id, VmState.STARTING, wanted=WantedState.RUNNING)
    return unneeded
