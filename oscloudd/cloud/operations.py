"""What is done to a vm as a whole, as lists of steps, and the engine that runs them.

An operation's job row says how many steps are done and which is next, written before that one
begins; a daemon that dies leaves the row, and the next one goes on from there. One operation at a
time holds a vm. A step added to a list here is journalled, shown and killed in tests like the rest.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from oscloudd.cloud.job_rows import insert_job, taken_up_again
from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.nic_steps import NicSteps
from oscloudd.cloud.snapshot_steps import SnapshotSteps
from oscloudd.cloud.vm_records import VmRecord, read_vm
from oscloudd.cloud.vm_steps import VmSteps
from oscloudd.errors import ERRORS_BY_KIND, HostError
from oscloudd.store.database import Database
from oscloudd.store.models import Job as JobRow

_log = logging.getLogger(__name__)

# A job that this many daemons have died in is perhaps why they died.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Step:
    """One step: its name is the stage users see.

    `cancellable`: `job_cancel` may cut it short. `holds_vm`: nothing else is done to the vm
    meanwhile; once a step gives the vm free, those after it do, too. `minds_vm`: what becomes of
    the vm itself meanwhile is the step's to see to. `only_if` names a parameter of the job: there
    is nothing to do unless it is true.
    """

    do: Callable[[SnapshotSteps, Job], Awaitable[None]]
    says: str
    cancellable: bool = False
    holds_vm: bool = True
    minds_vm: bool = True
    only_if: str = ""

    @property
    def name(self) -> str:
        """The stage users see."""
        return self.do.__name__


@dataclass(frozen=True)
class Operation:
    """Steps in their order, and what is done when one fails or is cancelled.

    `owns_state`: they write down what becomes of the vm's qemu, and nobody else does meanwhile.
    """

    steps: tuple[Step, ...]
    undo: Callable[[SnapshotSteps, Job, BaseException], Awaitable[None]]
    owns_state: bool = True


async def _leave(_steps: SnapshotSteps, _job: Job, _error: BaseException) -> None:
    pass


_DISK = Step(VmSteps.disk, "making a disk", cancellable=True)
_SEED = Step(VmSteps.seed, "writing what the guest is told", cancellable=True)
_NETWORK = Step(VmSteps.network, "bringing up its network")
_STARTING = Step(VmSteps.starting, "starting qemu")
_RUNNING = Step(VmSteps.running, "letting the guest run")
_BOOTING = Step(VmSteps.booting, "waiting for the guest", cancellable=True, holds_vm=False)
_STOPPING = Step(VmSteps.stopping, "powering off", cancellable=True)
_STOPPED = Step(VmSteps.stopped, "clearing up")
_SAVING = Step(VmSteps.saving, "saving its memory", cancellable=True)
_SUSPENDED = Step(VmSteps.suspended, "ending qemu")
_BETWEEN = Step(VmSteps.between, "clearing up")
_FILES = Step(VmSteps.files, "removing disk and logs")
_ROWS = Step(VmSteps.rows, "forgetting it")
_NAME = Step(VmSteps.name, "renaming")
_PLUGGING = Step(VmSteps.plugging, "plugging the disk in")
_UNPLUGGING = Step(VmSteps.unplugging, "waiting for the guest to let go", cancellable=True)
_DETACHED = Step(VmSteps.detached, "forgetting that it had the disk")
_GROWING = Step(VmSteps.growing, "making the disk larger")
_PLUGGING_NIC = Step(NicSteps.plugging_nic, "plugging the network card in")
_UNPLUGGING_NIC = Step(NicSteps.unplugging_nic, "waiting for the guest to let go", cancellable=True)
_DISMISSING = Step(NicSteps.dismissing, "forgetting that it had the card")
_FREEZING = Step(SnapshotSteps.freezing, "making an overlay")
_SWITCHING = Step(SnapshotSteps.switching, "freezing the disk")
_RECORDING = Step(SnapshotSteps.recording, "writing that down")
_HOLDING = Step(SnapshotSteps.holding, "stopping the guest", only_if="memory")
_REMEMBERING = Step(
    SnapshotSteps.remembering, "saving its memory", cancellable=True, only_if="memory"
)
_GOING_ON = Step(SnapshotSteps.going_on, "letting the guest go on")
_OVERLAY = Step(SnapshotSteps.overlay, "making an overlay")
_PARTING = Step(SnapshotSteps.parting, "clearing up")
_SWAPPING = Step(SnapshotSteps.swapping, "putting the disk in its place")
_DROPPING = Step(SnapshotSteps.dropping, "removing what nothing stands on")
_MERGING = Step(SnapshotSteps.merging, "merging layers", holds_vm=False, minds_vm=False)
_ON_AGAIN = tuple(replace(step, only_if="runs_on") for step in (_NETWORK, _STARTING, _RUNNING))

_MAKING = Operation((_DISK, _SEED, _NETWORK, _STARTING, _RUNNING, _BOOTING), VmSteps.undo_create)
_KEEPING = Operation(
    (_FREEZING, _HOLDING, _SWITCHING, _REMEMBERING, _RECORDING, _GOING_ON),
    SnapshotSteps.undo_freeze,
)

OPERATIONS: dict[str, Operation] = {
    "vm_create": _MAKING,
    "vm_start": Operation((_NETWORK, _STARTING, _RUNNING), VmSteps.undo_start),
    "vm_stop": Operation((_STOPPING, _STOPPED), VmSteps.undo_stop),
    "vm_suspend": Operation((_SAVING, _SUSPENDED), VmSteps.undo_suspend),
    "vm_restart": Operation(
        (_STOPPING, _BETWEEN, _NETWORK, _STARTING, _RUNNING), VmSteps.undo_stop
    ),
    "vm_delete": Operation((_STOPPING, _FILES, _ROWS), VmSteps.undo_delete),
    "vm_rename": Operation((_NAME,), _leave),
    "disk_attach": Operation((_PLUGGING,), VmSteps.undo_attach, owns_state=False),
    "disk_detach": Operation((_UNPLUGGING, _DETACHED), VmSteps.undo_detach, owns_state=False),
    "disk_resize": Operation((_GROWING,), VmSteps.undo_resize, owns_state=False),
    "nic_add": Operation((_PLUGGING_NIC,), NicSteps.undo_add_nic, owns_state=False),
    "nic_delete": Operation(
        (_UNPLUGGING_NIC, _DISMISSING), NicSteps.undo_delete_nic, owns_state=False
    ),
    "vm_clone": _MAKING,
    "disk_freeze": _KEEPING,
    "snapshot_create": _KEEPING,
    "snapshot_restore": Operation(
        (_OVERLAY, replace(_STOPPING, cancellable=False), _PARTING, _SWAPPING, *_ON_AGAIN),
        SnapshotSteps.undo_restore,
    ),
    "snapshot_delete": Operation((_DROPPING, _MERGING), _leave),
    "layers_merge": Operation((_MERGING,), _leave),
}


def count_steps(kind: str) -> int:
    """Give how many steps a kind of job has; one for those that are no operation on a vm."""
    return len(OPERATIONS[kind].steps) if kind in OPERATIONS else 1


# Decides, inside the transaction that reads the vm, whether and with which parameters; None where
# nothing is to be done. Raises InvalidStateError and others.
Decide = Callable[[VmRecord], dict[str, Any] | None]

# Runs what it is given inside one transaction, as `Database.run` does.
Transact = Callable[[Callable[[], JobRow | None]], Awaitable[JobRow | None]]


class Operations:
    """Begins operations, one at a time for each vm, and takes up those a dead daemon has left."""

    def __init__(self, database: Database, jobs: Jobs, steps: SnapshotSteps) -> None:
        self._database = database
        self._jobs = jobs
        self._steps = steps
        self._locks: dict[int, asyncio.Lock] = {}

    def lock(self, vm_id: int) -> asyncio.Lock:
        """Give the lock that whoever does something to this vm holds."""
        return self._locks.setdefault(vm_id, asyncio.Lock())

    async def begin(
        self,
        kind: str,
        vm_id: int,
        order: Order,
        decide: Decide,
        *,
        transact: Transact | None = None,
    ) -> "tuple[Job, asyncio.Task[None]] | None":
        """Wait for the vm's turn, decide and write the job in one transaction, and begin.

        `transact` runs that transaction where there is more to it. Gives None when `decide` found
        nothing to do.
        """
        lock, transact = self.lock(vm_id), transact or self._database.run
        await lock.acquire()
        try:
            row = await transact(lambda: self._insert(kind, vm_id, order, decide))
        except BaseException:
            lock.release()
            raise
        if row is None:
            lock.release()
            return None
        return self._begin(row, order, lock)

    def _insert(self, kind: str, vm_id: int, order: Order, decide: Decide) -> JobRow | None:
        vm = read_vm(vm_id)
        params = decide(vm)
        if params is None:
            return None
        stage, name = OPERATIONS[kind].steps[0].name, read_vm(vm_id).name
        return insert_job(kind, name, order.owner_uid, stage=stage, vm_id=vm.id, params=params)

    async def begin_made(self, row: JobRow, order: Order) -> "tuple[Job, asyncio.Task[None]]":
        """Begin the job of a vm that was made in the same transaction."""
        lock = self.lock(row.vm_id)
        await lock.acquire()
        return self._begin(row, order, lock)

    def holds_vm(self, row: JobRow) -> bool:
        """Tell whether the step that an unfinished job is at holds its vm."""
        return OPERATIONS[row.kind].steps[int(row.step)].holds_vm

    def minds_vm(self, row: JobRow) -> bool:
        """Tell whether what becomes of its vm is for an unfinished job to see to."""
        operation = OPERATIONS.get(row.kind)
        following = () if operation is None else operation.steps[int(row.step) :]
        return operation is None or any(step.minds_vm for step in following)

    async def resume(
        self, row: JobRow, lock: asyncio.Lock, *, is_held: bool = True
    ) -> "asyncio.Task[None]":
        """Go on with a job of a daemon that died.

        With `is_held` the caller has `lock`, and gives it away.
        """
        row = await self._database.run_when_available(lambda: taken_up_again(row))
        job = self._jobs.take(row)
        job.is_resumed = True
        names = [step.name for step in OPERATIONS[job.kind].steps]
        _log.info("job %d (%s %s) goes on at %s", job.id, job.kind, job.target, names[job.step :])
        return self._jobs.run(job, self._carry_out(job, lock, held=is_held))

    def _begin(
        self, row: JobRow, order: Order, lock: asyncio.Lock
    ) -> "tuple[Job, asyncio.Task[None]]":
        job = self._jobs.take(row, order.listener)
        return job, self._jobs.run(job, self._carry_out(job, lock))

    async def _carry_out(self, job: Job, lock: asyncio.Lock, *, held: bool = True) -> None:
        try:
            _check_undoing(job)
            for step in OPERATIONS[job.kind].steps[job.step :]:
                if held and not step.holds_vm:
                    lock.release()
                    held = False
                await self._do(job, step)
        except asyncio.CancelledError:
            raise  # the daemon stops, and the next one goes on
        except BaseException as error:
            if not held:
                await lock.acquire()
                held = True
            await self._jobs.undoing(job, error)
            await OPERATIONS[job.kind].undo(self._steps, job, error)
            raise
        finally:
            if held:
                lock.release()
            if job.kind == "vm_delete" and job.step == len(OPERATIONS[job.kind].steps):
                self._locks.pop(job.vm_id, None)

    async def _do(self, job: Job, step: Step) -> None:
        steps = OPERATIONS[job.kind].steps
        if job.attempts > MAX_ATTEMPTS:
            raise HostError(f"given up: {job.attempts - 1} daemons ended in step {step.name}")
        job.cancellable = any(each.cancellable for each in steps[job.step :])
        if not step.only_if or job.params[step.only_if]:
            job.report(step.name, step.says)
            work = step.do(self._steps, job)
            await (job.interruptible(work) if step.cancellable else work)
        await self.step_done(job, job.step + 1, step.name)

    async def step_done(self, job: Job, number: int, name: str) -> None:
        """Write down that step `number`, counted from 1, is done."""
        steps = OPERATIONS[job.kind].steps
        following = steps[number].name if number < len(steps) else name
        await self._jobs.step_done(job, number, following)


def _check_undoing(job: Job) -> None:
    """Go on undoing what an earlier daemon was undoing: raise the error it did that for."""
    undoing = job.params.get("undoing")
    if undoing is not None:
        raise ERRORS_BY_KIND[undoing["kind"]](undoing["message"])
