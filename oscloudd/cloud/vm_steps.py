"""The steps that what is done to a vm is made of: each may be run again after a daemon died in it.

Every step looks the vm up anew and does what is still missing. In which order they come is in
`operations`; what begins an operation, and when it is refused, in `vm_create` and `vm_power`.
"""

import asyncio
import logging
from contextlib import nullcontext, suppress

import msgspec

from oscloudd.cloud.data_disks import DataDisks
from oscloudd.cloud.disk_records import detach_disk
from oscloudd.cloud.first_starts import FirstStarts
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.layer_merging import LayerMerger
from oscloudd.cloud.layers import find_unneeded_layers, forget_layers, remove_layers
from oscloudd.cloud.names import Names
from oscloudd.cloud.nic_records import forget_nics
from oscloudd.cloud.nics import Nics
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.rates import Rates
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.states import DOWN_STATES, VmState, WantedState
from oscloudd.cloud.supervisor import Supervisor, scope_of
from oscloudd.cloud.suspension import Suspension
from oscloudd.cloud.vm_paths import VmPaths, vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates, write_gone, write_state
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, InvalidStateError, NotFoundError
from oscloudd.guest.identity import GuestIdentity
from oscloudd.guest.seed import build_seed_files, write_seed
from oscloudd.host.images import durable
from oscloudd.host.processes import find_processes_in, open_process
from oscloudd.host.scopes import rename_scope
from oscloudd.host.sessions import end_session
from oscloudd.machine.console_log import read_log_tail
from oscloudd.machine.hotplug import node_of, unplug_disk
from oscloudd.machine.live_disk import top_node
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.run_directory import RunDirectory
from oscloudd.machine.suspend import let_go_on
from oscloudd.machine.warm import resize_disk
from oscloudd.store.models import Disk, Snapshot, Vm

_log = logging.getLogger(__name__)
_CONSOLE_LINES = 15
SUSPENDED_BY_USER = "suspended by the user"
# STARTING and STOPPING: a clone that took no identity is being started cold.
_NOT_MADE = (VmState.CREATING, VmState.DELETING, VmState.STARTING, VmState.STOPPING)


class VmSteps:
    """What can be done to a vm, piece by piece; a job says to which, and with which parameters."""

    def __init__(
        self,
        config: Config,
        states: VmStates,
        supervisor: Supervisor,
        first_starts: FirstStarts,
        slots: StartSlots,
        suspension: Suspension,
        disks: DataDisks,
        nics: Nics,
        ports: Ports,
        names: Names,
        rates: Rates,
        merger: LayerMerger,
    ) -> None:
        self._config = config
        self._states = states
        self._supervisor = supervisor
        self._first_starts = first_starts
        self._slots = slots
        self._suspension = suspension
        self._disks = disks
        self._nics = nics
        self._ports = ports
        self._names = names
        self._rates = rates
        self._merger = merger

    # Making and starting

    async def disk(self, job: Job) -> None:
        """Make the vm's disk, an overlay on its template; a spare brings its own."""
        await self._first_starts.make_disk(job, await self._get(job))

    async def seed(self, job: Job) -> None:
        """Write the NoCloud seed, for images that have cloud-init."""
        vm = await self._get(job)
        if "identity" in job.params:
            identity = msgspec.convert(job.params["identity"], GuestIdentity)
            hooks = await asyncio.to_thread(self._first_starts.hooks_of, vm)
            files = build_seed_files(identity, vm.uuid, job.params["user_data"], hooks)
            seed = self._paths(vm).seed
            await asyncio.to_thread(write_seed, seed, files)
            await asyncio.to_thread(durable, seed)

    async def network(self, job: Job) -> None:
        """Have the vm's networks in place, its name, and the ports of the host that lead to it."""
        vm = await self._get(job)
        self._names.publish(vm)
        await self._nics.bring_up_networks(vm)
        # A bridge that has just been made knows nothing of them.
        if vm.ports or any(self._ports.awaits(nic.bridge) for nic in vm.nics):
            await self._ports.sync()

    async def starting(self, job: Job) -> None:
        """Start qemu, standing still: before its boot, or where a saved guest stood."""
        vm = await self._get(job)
        if self._supervisor.find(vm.id) is not None:
            return
        # Its last qemu's end may still be being written down, and its directory removed.
        await self._supervisor.released(vm.id)
        await self.end_stray(vm)
        if await self._first_starts.take_spare(job, vm):
            return
        warm = await self._first_starts.choose_warm(job, vm)
        async with self._slots:
            if not await self._first_starts.spawn_clone(job, vm, warm):
                await self._spawn(job, vm)

    async def running(self, job: Job) -> None:
        """Let the guest run."""
        vm = await self._get(job)
        if job.is_resumed and self._supervisor.find(vm.id) is None:
            await self.starting(job)  # what an earlier daemon had started is gone
            vm = await self._get(job)
        if vm.bandwidth:
            await self._rates.sync()
        # From its first step on the guest may write to its disk.
        await self._suspension.drop(vm)
        await self._supervisor.let_run(vm)
        await self._first_starts.see_told(job, vm)

    async def booting(self, job: Job) -> None:
        """Wait until the guest has its identity and can be logged into."""
        vm = await self._get(job)
        job.booting_pid = vm.pid
        # Only a clone's wait is a short one.
        with self._slots.without_turn() if vm.started == "warm" else nullcontext():
            try:
                await self._supervisor.settled(vm.id, job.report)
            finally:
                job.end_turn()
        if job.kind == "vm_create" and vm.started == "cold":
            self._first_starts.keep_warm(vm)
        job.report("done", f"{vm.name} is ready at {vm.ip}", 1.0)

    # Ending

    async def stopping(self, job: Job) -> None:
        """Power the vm off: by its button, then harder; at once with `force`."""
        qemu = self._supervisor.find(job.vm_id)
        if qemu is None:
            return
        if job.params.get("pid") not in (None, qemu.identity.pid):
            raise InvalidStateError(f"vm {job.target!r} runs as another process by now")
        # A guest that was being suspended may have to go on to see its power button.
        vm = await self._states.find(job.vm_id)
        if vm is not None:
            await self._suspension.drop(vm)
        await qemu.stop(timeout_seconds=job.params["timeout"], force=job.params["force"])

    async def stopped(self, job: Job) -> None:
        """Write down that the vm is off; memory it was suspended with is dropped."""
        await self._release(job)
        await self._suspension.drop(await self._get(job))
        reason = job.params.get("reason", "stopped by the user")
        await self._states.see(job.vm_id, VmState.STOPPED, reason)

    async def saving(self, job: Job) -> None:
        """Stop the guest and save its memory, whole or not at all."""
        vm = await self._get(job)
        if job.is_resumed and self._suspension.is_saved(vm):
            return
        qemu = self._supervisor.find(vm.id)
        if qemu is None:
            raise HostError(f"the qemu of vm {vm.name!r} ended before its memory was saved")
        await self._suspension.save(vm, qemu, is_resumed=job.is_resumed)

    async def suspended(self, job: Job) -> None:
        """End qemu, whose guest is on disk by now, and write that down."""
        qemu = self._supervisor.find(job.vm_id)
        if qemu is not None:
            await qemu.stop(force=True)
        await self._release(job)
        await self._states.see(job.vm_id, VmState.SUSPENDED, SUSPENDED_BY_USER)

    async def between(self, job: Job) -> None:
        """Write down that the vm is off, to be on again."""
        await self._release(job)
        await self._states.see(job.vm_id, VmState.STARTING)

    async def files(self, job: Job) -> None:
        """Remove everything of the vm that is not in the database."""
        vm = await self._states.find(job.vm_id)
        if vm is not None:
            await self._release(job)
            await self._remove(vm)

    async def rows(self, job: Job) -> None:
        """Remove the vm from the database."""
        await self._states.change(lambda: _forget(job.vm_id))

    async def name(self, job: Job) -> None:
        """Have the vm's name outside the database, too: the network knows it, systemd shows it."""
        vm = await self._states.find(job.vm_id)
        if vm is not None:
            self._names.publish(vm)
        if vm is not None and vm.is_process_alive():
            await rename_scope(scope_of(vm))

    # Its data disks

    async def plugging(self, job: Job) -> None:
        """Plug a disk into the machine, if there is one."""
        qemu = self._supervisor.find(job.vm_id)
        if qemu is not None:
            await self._disks.plug(job.vm_id, qemu)

    async def unplugging(self, job: Job) -> None:
        """Have the guest let go of a disk, if there is a guest."""
        qemu = self._supervisor.find(job.vm_id)
        if qemu is not None:
            await unplug_disk(qemu, job.params["slot"])

    async def detached(self, job: Job) -> None:
        """Write down that the disk is no vm's."""
        await self._states.change(lambda: detach_disk(job.params["disk"], job.vm_id))

    async def growing(self, job: Job) -> None:
        """Make a disk larger under its guest; one of a vm that is down grows at its next start."""
        qemu, slot = self._supervisor.find(job.vm_id), job.params["slot"]
        if qemu is not None:
            node = await top_node(qemu) if slot is None else node_of(slot)
            await resize_disk(qemu, job.params["size"], node=node)

    # When it does not come to its end

    async def undo_create(self, job: Job, error: BaseException) -> None:
        """Remove a vm that could not be made, unless its creator was told that there is one."""
        await self._first_starts.give_up(job)
        vm = await self._states.find(job.vm_id)
        if vm is None or vm.wanted_state == WantedState.STOPPED:
            return  # its user has stopped it meanwhile, and that stands
        if vm.pid not in (None, job.booting_pid) and job.booting_pid and not job.cancel_requested:
            return  # its user has started it anew meanwhile
        await self._explain(vm, error)
        was_told = job.params["wait"] == "started" and vm.state not in _NOT_MADE
        if not was_told or job.cancel_requested:
            await self.demolish(vm)
        else:
            self._supervisor.on_ended(vm.id)

    async def undo_start(self, job: Job, error: BaseException) -> None:
        """Leave the vm down, and say why; it stays wanted only where a policy will try again."""
        wanted = WantedState.RUNNING if job.params.get("revive") else WantedState.STOPPED
        reason = error.message if isinstance(error, CloudError) else "something unexpected happened"
        vm = await self._states.find(job.vm_id)
        qemu = self._supervisor.find(job.vm_id)
        is_saved = vm is not None and self._suspension.is_saved(vm)
        if qemu is not None and (is_saved or await self._never_ran(qemu)):
            await qemu.stop(force=True)
            await self._supervisor.released(job.vm_id)
            qemu = None
        if vm is not None and qemu is not None:
            await self._supervisor.refresh(vm)
        elif vm is not None and is_saved:
            await self.end_stray(vm)
            stopped = WantedState.STOPPED
            await self._states.see(job.vm_id, VmState.SUSPENDED, reason, wanted=stopped)
        else:
            if vm is not None:
                await self._suspension.drop_unfinished(vm)
            await self._states.see(job.vm_id, VmState.ERROR, reason, wanted=wanted)
            self._supervisor.on_ended(job.vm_id)

    async def undo_stop(self, job: Job, error: BaseException) -> None:
        """Say what the vm is in after all; a cancelled stop leaves it wanted as it was."""
        vm = await self._states.find(job.vm_id)
        if vm is None:
            return
        if vm.state == VmState.STARTING:  # a restart that could not start
            await self.undo_start(job, error)
            return
        if vm.state in DOWN_STATES:
            self._supervisor.on_ended(vm.id)
            return
        is_down = self._supervisor.find(vm.id) is None and not vm.is_process_alive()
        if is_down and self._suspension.is_saved(vm):  # it was to lose its memory, and has it still
            stopped = WantedState.STOPPED
            await self._states.see(vm.id, VmState.SUSPENDED, SUSPENDED_BY_USER, wanted=stopped)
            return
        wanted = WantedState(job.params["wanted"])
        await self._states.change(
            lambda: write_state(vm.id, VmState(vm.state), vm.reason, wanted=wanted)
        )
        qemu = self._supervisor.find(vm.id)
        if qemu is not None and job.params.get("paused"):
            with suppress(CloudError):  # a guest that stands still can't see its power button
                await qemu.pause()
        await self._supervisor.refresh(vm)

    async def undo_suspend(self, job: Job, error: BaseException) -> None:
        """Have the vm as it was before it was to be suspended, if its qemu is still there."""
        vm = await self._states.find(job.vm_id)
        if vm is None:
            return
        wanted = WantedState(job.params["wanted"])
        qemu = self._supervisor.find(vm.id)
        if job.step == 0:  # else it is saved, and only its qemu would not end
            await self._take_back(vm, stays_paused=job.params["paused"])
        if qemu is None and not vm.is_process_alive():
            await self.end_stray(vm)
            reason = error.message if isinstance(error, CloudError) else "saving it went wrong"
            if self._suspension.is_saved(vm):
                await self._states.see(vm.id, VmState.SUSPENDED, reason)
                return
            await self._states.see(vm.id, VmState.CRASHED, reason, wanted=wanted)
            self._supervisor.on_ended(vm.id)
            return
        await self._states.change(
            lambda: write_state(vm.id, VmState(vm.state), vm.reason, wanted=wanted)
        )
        await self._supervisor.refresh(vm)

    async def undo_delete(self, job: Job, error: BaseException) -> None:
        """Keep a vm whose guest would not stop; one whose files are going stays DELETING."""
        if job.step == 0:
            await self.undo_stop(job, error)
            vm = await self._states.find(job.vm_id)
            if vm is not None and vm.state != VmState.DELETING:
                # Whoever looked meanwhile took it for gone: the firewall, the names.
                await self.network(job)

    async def undo_attach(self, job: Job, _error: BaseException) -> None:
        """Take the disk from the vm again; one that its guest does not give back stays its."""
        try:
            await self.unplugging(job)
        except CloudError as error:
            _log.warning("vm %d (%s) keeps a disk: %s", job.vm_id, job.target, error.message)
            return
        await self.detached(job)

    async def undo_detach(self, job: Job, _error: BaseException) -> None:
        """Leave the disk with the vm, also where its guest has let go of it meanwhile."""
        with suppress(CloudError):  # the next start plugs it in
            await self.plugging(job)

    async def undo_resize(self, job: Job, _error: BaseException) -> None:
        """Have in the row how large the disk has become, which is at least what it was."""
        disk_id, size = job.params["disk"], job.params["before"]
        with suppress(CloudError):
            size = max(size, await self._disks.measure(disk_id))
        await self._states.change(
            lambda: Disk.update(size=size).where(Disk.id == disk_id).execute()
        )

    # Suspended

    async def _spawn(self, job: Job, vm: VmRecord) -> None:
        """Start a qemu with the vm's saved memory, if it has any; cold only if it never had."""
        async with self._suspension.opened(vm) as saved:
            if saved is None and job.params.get("resumes"):
                raise HostError(f"the memory that vm {vm.name!r} was suspended with is gone")
            await self._supervisor.spawn(vm, job.timings, saved=saved)

    async def _take_back(self, vm: VmRecord, *, stays_paused: bool) -> None:
        """Drop what was saved of a vm, and only then let its guest go on."""
        qemu = self._supervisor.find(vm.id)
        try:
            await self._suspension.drop(vm)
            if qemu is not None:
                await let_go_on(qemu, stays_paused=stays_paused)
        except CloudError as error:
            _log.warning("vm %d (%s) stands still: %s", vm.id, vm.name, error.message)

    async def forget_saving(self, vm: VmRecord, *, runs: bool) -> None:
        """Remove what no job will go on saving, and all that was saved of a vm that `runs`."""
        if runs:
            await self._suspension.drop(vm)
        else:
            await self._suspension.drop_unfinished(vm)

    # Shared

    async def demolish(self, vm: VmRecord) -> None:
        """Remove everything there is of a vm, its rows last; may be called again at any point."""
        await self._states.see(vm.id, VmState.DELETING, wanted=WantedState.DELETED)
        qemu = self._supervisor.find(vm.id)
        if qemu is not None:
            await qemu.stop(force=True)
        await self._supervisor.released(vm.id)
        await self.end_stray(vm)
        await self._remove(vm)
        await self._states.change(lambda: _forget(vm.id))

    async def _remove(self, vm: VmRecord) -> None:
        """Remove what there is of a vm outside the database, but for its qemu."""
        await asyncio.to_thread(self._paths(vm).remove, keeps_disk=bool(vm.is_disk_kept))
        await self._disks.remove_unkept(vm.id)
        if vm.layer_id is not None:
            freed = await self._states.change(lambda: _leave_layers(vm))
            await asyncio.to_thread(remove_layers, self._config, freed)
        await self._nics.expel(vm)
        await self._ports.forget(vm)
        self._names.forget(vm)
        if vm.bandwidth:  # the kernel would keep the limit for the next tap of that name
            await self._rates.sync()

    async def _release(self, job: Job) -> None:
        """See the end of the vm's qemu, one that nobody has written down included."""
        await self._supervisor.released(job.vm_id)
        vm = await self._states.find(job.vm_id)
        if vm is None or self._supervisor.find(vm.id) is not None:
            return
        if vm.is_process_alive() and not job.params["force"]:
            raise HostError(
                f"the qemu of vm {vm.name!r} (process {vm.pid}) could not be taken hold of",
                hint="add --force to end it all the same",
            )
        await self.end_stray(vm)

    async def end_stray(self, vm: VmRecord) -> None:
        """Kill a qemu an earlier daemon started and did not write down; clear its directory.

        Its working directory, the vm's own run directory, is the proof that it is ours.
        """
        directory = self._paths(vm).run_directory
        if directory.exists():
            for identity in await asyncio.to_thread(find_processes_in, directory):
                with suppress(NotFoundError):
                    await end_session(open_process(identity))
            await asyncio.to_thread(RunDirectory(directory).remove)

    async def _never_ran(self, qemu: Qemu) -> bool:
        try:
            return await qemu.status() == "prelaunch"
        except CloudError:
            return False

    async def _explain(self, vm: VmRecord, error: BaseException) -> None:
        """Put the guest's last words into the error before they are removed."""
        if isinstance(error, CloudError):
            tail = await asyncio.to_thread(read_log_tail, self._paths(vm).console_log)
            lines = tail.decode("utf-8", "replace").splitlines()[-_CONSOLE_LINES:]
            error.details.setdefault("console", "\n".join(lines))

    async def _get(self, job: Job) -> VmRecord:
        vm = await self._states.find(job.vm_id)
        if vm is None:
            raise NotFoundError(f"vm {job.target!r} was deleted meanwhile", object="vm")
        if vm.state == VmState.DELETING:  # an earlier daemon was undoing this
            raise InvalidStateError(f"vm {vm.name!r} is being removed", state=vm.state)
        return vm

    def _paths(self, vm: VmRecord) -> VmPaths:
        return vm_paths(self._config, vm.id, vm.disk_id)


def _leave_layers(vm: VmRecord) -> list[int]:
    """Have a vm that is going stand on no layers any more; forget and give those nobody needs.

    First of all their rows: a clone that is being made looks whether its layer has one.
    """
    Snapshot.delete().where(Snapshot.vm == vm.id).execute()
    Disk.update(layer_id=None).where(Disk.id == vm.disk_id, Disk.is_kept == 0).execute()
    unneeded = find_unneeded_layers()
    forget_layers(unneeded)
    return unneeded


def _forget(vm_id: int) -> None:
    """Remove a vm's rows and say that it is gone, inside a transaction."""
    columns = (Vm.name, Vm.disk, Vm.identified, Vm.seed_document)
    row = Vm.select(*columns).where(Vm.id == vm_id).tuples().first()
    if row is not None:
        name, disk_id, identified, document = row
        write_gone(vm_id, name)
        Snapshot.delete().where(Snapshot.vm == vm_id).execute()
        forget_nics(vm_id)
        Vm.delete().where(Vm.id == vm_id).execute()
        its = (Disk.id == disk_id) | (Disk.vm_id == vm_id)
        Disk.delete().where(its, Disk.is_kept == 0).execute()
        Disk.update(vm_id=None, slot=None).where(Disk.vm_id == vm_id).execute()
        # Without a document it was told by its seed, and may have taken that in at once.
        if identified or not document:
            Disk.update(has_identity=True).where(Disk.id == disk_id).execute()
