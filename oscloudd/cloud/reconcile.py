"""What the database says against what really runs, compared when a daemon starts.

First, before anybody can ask, what needs no qemu's word: ends that the kernel tells of, a reboot.
Then, with the daemon serving and each vm held back until its turn has come, what does: qemus are
taken hold of, jobs go on where they were. One vm that can't be judged stops nobody else, and is
never killed for it.
"""

import asyncio
import logging

import msgspec

from oscloudd.cloud.disk_records import detach_disk
from oscloudd.cloud.disks import forget_interrupted
from oscloudd.cloud.job_rows import JobState, finish_job, insert_job, running_jobs
from oscloudd.cloud.keeper import Keeper
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.nic_records import forget_nic
from oscloudd.cloud.operations import OPERATIONS, Operations, count_steps
from oscloudd.cloud.states import DOWN_STATES, LIVE_STATES, VmState, WantedState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.cloud.vm_states import VmStates, write_state
from oscloudd.cloud.vm_steps import VmSteps
from oscloudd.config import Config
from oscloudd.errors import ExhaustedError, NotFoundError
from oscloudd.host.processes import boot_id
from oscloudd.store.database import Database
from oscloudd.store.models import Job as JobRow
from oscloudd.store.models import Meta

_log = logging.getLogger(__name__)

# Taking hold of a qemu takes milliseconds, and has limits of its own for one that hangs; beyond
# this something else does.
_JUDGING_SECONDS = 15.0
_BOOT = "boot_id"


class Reconciler:
    """Runs once, in two parts."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        supervisor: Supervisor,
        steps: VmSteps,
        operations: Operations,
        keeper: Keeper,
    ) -> None:
        self._overcommit = config.limits.overcommit
        self._database = database
        self._states = states
        self._supervisor = supervisor
        self._steps = steps
        self._operations = operations
        self._keeper = keeper
        self._jobs: dict[int, list[JobRow]] = {}
        self._ids: list[int] = []

    async def prepare(self) -> None:
        """Hold every vm back, and write down what is known without asking any qemu."""
        boot = boot_id()
        self._ids, self._jobs = await self._database.run(lambda: self._look(boot))
        for vm_id in self._ids:
            await self._operations.lock(vm_id).acquire()
            self._supervisor.expect(vm_id)

    async def run(self) -> None:
        """Judge all vms side by side, and go on with what was being done to them."""
        gone = [vm_id for vm_id in self._jobs if vm_id not in self._ids]
        for vm_id in gone:
            await self._operations.lock(vm_id).acquire()
        await asyncio.gather(*(self._one(vm_id) for vm_id in (*self._ids, *gone)))

    def _look(self, boot: str) -> tuple[list[int], dict[int, list[JobRow]]]:
        """Give the ids of all vms and, by vm, the jobs to go on with, inside a transaction."""
        jobs: dict[int, list[JobRow]] = {}
        for row in running_jobs():
            # A new name is there with the job's row.
            if row.kind == "vm_rename" or row.step >= count_steps(row.kind):
                finish_job(row.id, JobState.DONE)
            elif row.kind in OPERATIONS:
                jobs.setdefault(row.vm_id, []).append(row)
            else:
                forget_interrupted(row)
                finish_job(row.id, JobState.FAILED, "the daemon ended before it", "unavailable")
        vms = read_vms()
        _end_without_qemus(vms, jobs)
        last = Meta.get_or_none(Meta.name == _BOOT)
        is_new_boot = (last is not None and last.value != boot) or any(
            vm.boot_id not in (None, boot) for vm in vms
        )
        for vm in vms:
            if vm.process is not None and not vm.is_process_alive():
                self._see_dead(vm, boot, jobs)
        if is_new_boot:
            for vm in read_vms():
                is_minded = any(map(self._operations.minds_vm, jobs.get(vm.id, [])))
                start = None if is_minded else self._after_boot(vm)
                if start is not None:
                    jobs.setdefault(vm.id, []).append(start)
        Meta.replace(name=_BOOT, value=boot).execute()
        return [vm.id for vm in vms], jobs

    def _see_dead(self, vm: VmRecord, boot: str, jobs: dict[int, list[JobRow]]) -> None:
        """Write down that a vm's qemu is gone, unless a job is at it that will."""
        rows = jobs.get(vm.id, [])
        if vm.state not in LIVE_STATES or any(self._operations.holds_vm(row) for row in rows):
            return
        _write_ended(vm, boot)
        for row in rows:
            # Its creator was told that it runs: then it is a vm like others, and this is no news.
            if msgspec.json.decode(row.params).get("wait") == "started":
                message = "the vm ended before it was ready"
                finish_job(row.id, JobState.FAILED, message, "host_failure")
                del jobs[vm.id]

    def _after_boot(self, vm: VmRecord) -> JobRow | None:
        """Order the start of a vm that should run after a boot of the host."""
        if vm.state not in DOWN_STATES:
            return None
        ran = vm.wanted_state == WantedState.RUNNING
        if vm.autostart == "yes" or (vm.autostart == "last-state" and ran):
            try:
                check_memory(vm.mem_size, self._overcommit)
            except ExhaustedError as error:
                reason = f"it was not started with the host: {error.message}"
                write_state(vm.id, VmState.ERROR, reason, wanted=WantedState.RUNNING)
                return None
            write_state(vm.id, VmState.STARTING, "starts with the host", wanted=WantedState.RUNNING)
            params = {"revive": True, "resumes": vm.state == VmState.SUSPENDED}
            return insert_job("vm_start", vm.name, 0, vm_id=vm.id, params=params)
        write_state(vm.id, VmState(vm.state), vm.reason, wanted=WantedState.STOPPED)
        return None

    async def _one(self, vm_id: int) -> None:
        """Judge one vm and begin what follows; its lock is ours until then."""
        lock = self._operations.lock(vm_id)
        jobs = self._jobs.get(vm_id, [])
        holding = [row for row in jobs if self._operations.holds_vm(row)]
        owning = [row for row in holding if OPERATIONS[row.kind].owns_state]
        is_lock_ours = True
        try:
            vm = await self._states.find(vm_id)
            if vm is not None:
                await self._judge_in_time(vm, is_busy=bool(owning))
            for row in jobs:
                if row in holding[:1]:
                    is_lock_ours = False
                    await self._operations.resume(row, lock)
                elif row not in holding:
                    await self._operations.resume(row, lock, is_held=False)
        finally:
            if is_lock_ours:
                lock.release()
        minding = [row for row in jobs if self._operations.minds_vm(row)]
        if not any(OPERATIONS[row.kind].owns_state for row in minding):
            self._keeper.consider(vm_id)

    async def _judge_in_time(self, vm: VmRecord, *, is_busy: bool) -> None:
        try:
            async with asyncio.timeout(_JUDGING_SECONDS):
                await self._judge(vm, is_busy=is_busy)
        except Exception as error:
            # Whatever it is, the others are judged, and this one is left as it is.
            _log.exception("vm %d (%s) can't be judged", vm.id, vm.name)
            reason = f"it could not be judged: {str(error) or 'it took too long'}"
            await self._states.see(vm.id, VmState.UNRESPONSIVE, reason)
        finally:
            self._supervisor.judged(vm.id)

    async def _judge(self, vm: VmRecord, *, is_busy: bool) -> None:
        if not is_busy:
            await self._steps.forget_saving(vm, runs=vm.is_process_alive())
        if vm.state in (VmState.CREATING, VmState.DELETING) and not is_busy:
            _log.warning("vm %d (%s) was left %s and is removed", vm.id, vm.name, vm.state)
            await self._steps.demolish(vm)
        elif vm.process is not None and await self._adopt(vm, is_busy=is_busy):
            _log.info("vm %d (%s) adopted: its qemu is process %d", vm.id, vm.name, vm.pid)
        elif is_busy:
            await self._states.forget_process(vm.id)  # the rest is for its job to do
        elif await self._supervisor.adopt_unrecorded(vm):
            _log.warning("vm %d (%s) runs, and the database did not say so", vm.id, vm.name)
            await self._steps.forget_saving(vm, runs=True)
        else:
            # The directory of one that ended unseen, and perhaps a qemu that nobody wrote down.
            await self._steps.end_stray(vm)
            if vm.state not in DOWN_STATES:
                await self._states.change(lambda: _write_ended(vm, boot_id()))

    async def _adopt(self, vm: VmRecord, *, is_busy: bool) -> bool:
        try:
            await self._supervisor.adopt(vm, see=not is_busy)
        except NotFoundError:
            return False
        return True


def _end_without_qemus(vms: list[VmRecord], jobs: dict[int, list[JobRow]]) -> None:
    """End plugging in and out of machines that are no more; take it out of `jobs`."""
    for vm in vms:
        if vm.id in jobs and not vm.is_process_alive():
            rows = jobs.pop(vm.id)
            for row in rows:
                if not OPERATIONS[row.kind].owns_state:
                    _end_plug_job(row)
            if left := [row for row in rows if OPERATIONS[row.kind].owns_state]:
                jobs[vm.id] = left


def _end_plug_job(row: JobRow) -> None:
    # The rows say what the next machine gets, but for what the guest was to let go of.
    params = msgspec.json.decode(row.params)
    undoing = params.get("undoing")
    if row.kind == ("disk_detach" if undoing is None else "disk_attach"):
        detach_disk(params["disk"], row.vm_id)
    if row.kind == ("nic_delete" if undoing is None else "nic_add"):
        forget_nic(params["nic"])
    if undoing is None:
        finish_job(row.id, JobState.DONE)
    else:
        finish_job(row.id, JobState.FAILED, undoing["message"], undoing["kind"])


def _write_ended(vm: VmRecord, boot: str) -> None:
    if vm.boot_id not in (None, boot):
        write_state(vm.id, VmState.STOPPED, "the host was rebooted")
    elif vm.process is None or vm.state in (VmState.STOPPING, VmState.STARTING):
        write_state(vm.id, VmState.STOPPED, "it ended while the daemon was away")
    else:
        write_state(vm.id, VmState.CRASHED, "qemu ended while the daemon was away")
