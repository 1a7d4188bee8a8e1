"""Jobs: long operations, each a row written before anything outside the database happens.

Owns the rows, the tasks at work on them, and the progress told to whoever listens. What a job does
is its noun's affair; for vms it is a list of steps, see `operations`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from oscloudd.cloud.changes import Changes
from oscloudd.cloud.job_rows import (
    JobState,
    finish_job,
    forgive_attempt,
    insert_job,
    mark_undoing,
    tell_job,
)
from oscloudd.cloud.missing import missing
from oscloudd.cloud.start_slots import CloneTurn
from oscloudd.errors import (
    CancelledJobError,
    CloudError,
    InternalError,
    InvalidStateError,
    UnavailableError,
)
from oscloudd.store.database import Database
from oscloudd.store.models import Job as JobRow
from oscloudd.units import is_possible_id

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Finished jobs are looked at for a while; then only what they made is of interest.
KEPT_SECONDS = 7 * 86400
KEPT_JOBS = 2000


class Progress(msgspec.Struct, frozen=True):
    """One step forward; `fraction` is 0 to 1, or None where nobody can tell."""

    job: int
    stage: str
    message: str
    fraction: float | None = None


OnProgress = Callable[[Progress], None]


def no_progress(_progress: Progress) -> None:
    """Listen to nothing."""


@dataclass(frozen=True)
class Order:
    """Who wants something done, who hears how it goes, and whether they wait for its end."""

    owner_uid: int
    listener: OnProgress = no_progress
    wait: bool = True


class JobInfo(msgspec.Struct, frozen=True):
    """The answer of `job_info`: `step` of `steps` are done, times in seconds since 1970."""

    id: int
    kind: str
    target: str
    vm: int | None
    state: str
    step: int
    steps: int
    stage: str
    message: str
    fraction: float | None
    error_kind: str
    cancellable: bool
    owner_uid: int
    created_at: float
    finished_at: float | None


class Job:
    """One long operation under way in this daemon."""

    def __init__(self, row: JobRow) -> None:
        self.id = int(row.id)
        self.kind = str(row.kind)
        self.target = str(row.target)
        self.vm_id: int = row.vm_id or 0
        self.owner_uid = int(row.owner_uid)
        self.step = int(row.step)
        self.stage = self.journalled_stage = str(row.stage)
        self.attempts = int(row.attempts)
        self.is_resumed = False  # an earlier daemon has begun it
        self.booting_pid: int | None = None  # the qemu whose guest a new vm waits for
        self.params: dict[str, Any] = msgspec.json.decode(row.params)
        self.message = ""
        self.fraction: float | None = None
        self.cancellable = False
        self.cancel_requested = False
        self.timings: dict[str, float] = {}  # seconds of the stages that are measured
        self.clone_turn: CloneTurn | None = None
        self.listeners: list[OnProgress] = []
        self._step_done = asyncio.Event()
        self._inner: asyncio.Future[Any] | None = None

    def report(self, stage: str, message: str, fraction: float | None = None) -> None:
        """Say what is being done now."""
        if stage != self.stage:
            _log.info("job %d: %s: %s", self.id, stage, message)
        self.stage, self.message, self.fraction = stage, message, fraction
        for listener in self.listeners:
            listener(Progress(self.id, stage, message, fraction))

    @contextmanager
    def listening(self, listener: OnProgress) -> Iterator[None]:
        """Let one more hear how it goes, from what is being done now on."""
        self.listeners.append(listener)
        if self.stage:
            listener(Progress(self.id, self.stage, self.message, self.fraction))
        try:
            yield
        finally:
            self.listeners.remove(listener)

    def end_turn(self) -> None:
        """Let another clone begin, where this job has the turn of one."""
        if self.clone_turn is not None:
            self.clone_turn.release()

    async def passed(self, step: int) -> None:
        """Wait until so many of its steps are done; for ever when it ends before."""
        while self.step < step:
            await self._step_done.wait()

    def mark_done(self, step: int) -> None:
        """So many steps are done, and that is written down."""
        self.step = step
        self._step_done.set()
        self._step_done = asyncio.Event()

    def check_cancelled(self) -> None:
        """Raise CancelledJobError when somebody wants it ended."""
        if self.cancel_requested:
            raise CancelledJobError(f"job {self.id} ({self.kind} {self.target}) was cancelled")

    async def interruptible(self, work: Awaitable[T]) -> T:
        """Do a part of the job that `job_cancel` may cut short: raises CancelledJobError then."""
        self._inner = asyncio.ensure_future(work)
        try:
            if self.cancel_requested:
                self._inner.cancel()
            result: T = await self._inner
            return result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                self.check_cancelled()
            raise
        finally:
            self._inner = None

    def interrupt(self) -> None:
        """Ask it to end; what can be cut short is."""
        self.cancel_requested = True
        if self._inner is not None:
            self._inner.cancel()


class Jobs:
    """All jobs; `close` lets go of those under way, and the next daemon sees to them."""

    def __init__(
        self, database: Database, changes: Changes, count_steps: Callable[[str], int]
    ) -> None:
        self._database = database
        self._changes = changes
        self._count_steps = count_steps
        self._live: dict[int, Job] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def list(self, limit: int) -> list[JobInfo]:
        """Describe the newest `limit` jobs, newest first."""

        def read() -> list[JobRow]:
            return list(JobRow.select().order_by(JobRow.id.desc()).limit(limit))

        return [self._describe(row) for row in await self._database.run(read)]

    async def info(self, job_id: int) -> JobInfo:
        """Describe one job; raises NotFoundError."""

        def read() -> JobRow | None:
            return JobRow.get_or_none(JobRow.id == job_id) if is_possible_id(job_id) else None

        row = await self._database.run(read)
        if row is None:
            raise missing("job", job_id)
        return self._describe(row)

    async def wait(
        self, job_id: int, timeout_seconds: float, listener: OnProgress = no_progress
    ) -> JobInfo:
        """Wait until a job has ended, well or not; raises OperationTimeoutError."""
        info = await self.info(job_id)
        job = self._live.get(job_id)
        with ExitStack() as stack:
            if job is not None:
                stack.enter_context(job.listening(listener))
            return await self._changes.wait_until(
                lambda: self._ended(job_id),
                timeout_seconds=timeout_seconds,
                what=f"the end of job {job_id} ({info.kind} {info.target})",
            )

    async def cancel(self, job_id: int) -> JobInfo:
        """End a job early and answer when it is undone; raises InvalidStateError if it is late."""
        info = await self.info(job_id)
        job = self._live.get(job_id)
        if job is None or not info.cancellable:
            has = f"is {info.state}" if info.state != JobState.RUNNING else "is past that"
            raise InvalidStateError(
                f"job {job_id} ({info.kind} {info.target}) can't be cancelled: it {has}",
                hint=f"see: oscloudctl job-info {job_id}",
                state=info.state,
            )
        job.interrupt()
        return await self._changes.wait_until(
            lambda: self._ended(job_id), timeout_seconds=3600, what=f"the end of job {job_id}"
        )

    async def begin(self, kind: str, target: str, order: Order) -> Job:
        """Write the row of a new job that is not about a vm."""
        row = await self._database.run(lambda: insert_job(kind, target, order.owner_uid))
        return self.take(row, order.listener)

    def take(self, row: JobRow, listener: OnProgress = no_progress) -> Job:
        """Begin to work on a job whose row has been written."""
        job = Job(row)
        self._live[job.id] = job
        job.listeners.append(listener)
        self._changes.announce()
        return job

    def run(self, job: Job, work: Awaitable[T]) -> "asyncio.Task[T]":
        """Do the work in a task of its own, so that a client that goes away does not stop it."""
        task = asyncio.create_task(self._run(job, work), name=f"job {job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A failure is in the row, and told to whoever waits; perhaps nobody does.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def step_done(self, job: Job, number: int, next_stage: str) -> None:
        """Write down that `number` steps are done, and which is next."""
        stage = job.journalled_stage

        def write() -> None:
            JobRow.update(step=number, stage=next_stage).where(JobRow.id == job.id).execute()
            if next_stage != stage:
                tell_job(JobRow.get_by_id(job.id), JobState.RUNNING, next_stage)

        await self._database.run_when_available(write)
        job.journalled_stage = next_stage
        job.mark_done(number)
        self._changes.announce()

    async def close(self) -> None:
        """Cancel what is under way; the rows say RUNNING, and the next start sees to them."""
        left = list(self._live)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(UnavailableError):
            await self._database.run(lambda: forgive_attempt(left))

    async def undoing(self, job: Job, error: BaseException) -> None:
        """Write down that a job is being undone, and why."""
        kind = error.kind if isinstance(error, CloudError) else InternalError.kind
        message = error.message if isinstance(error, CloudError) else "something unexpected"
        job.params["undoing"] = {"kind": kind, "message": message}
        params = dict(job.params)
        await self._database.run_when_available(lambda: mark_undoing(job.id, params))

    async def prune(self) -> None:
        """Forget jobs that ended long ago, and all but the newest of them."""

        def prune() -> None:
            ended = JobRow.state != JobState.RUNNING
            JobRow.delete().where(ended, JobRow.finished_at < time.time() - KEPT_SECONDS).execute()
            kept = JobRow.select(JobRow.id).where(ended).order_by(JobRow.id.desc())
            oldest = kept.offset(KEPT_JOBS).limit(1).scalar()
            if oldest is not None:
                JobRow.delete().where(ended, JobRow.id <= oldest).execute()

        await self._database.run(prune)

    async def _run(self, job: Job, work: Awaitable[T]) -> T:
        try:
            result = await work
        except asyncio.CancelledError:
            raise
        except CancelledJobError as error:
            await self._finish(job, JobState.CANCELLED, error.message, error.kind)
            raise
        except CloudError as error:
            error.details.setdefault("stage", job.stage)
            await self._finish(job, JobState.FAILED, error.message, error.kind)
            raise
        except Exception:
            _log.exception("job %d (%s %s)", job.id, job.kind, job.target)
            await self._finish(job, JobState.FAILED, "something unexpected happened", "internal")
            raise
        finally:
            self._live.pop(job.id, None)
        await self._finish(job, JobState.DONE)
        return result

    async def _finish(self, job: Job, state: JobState, message: str = "", kind: str = "") -> None:
        await self._database.run_when_available(
            lambda: finish_job(job.id, state, message, kind, stage=job.stage)
        )
        self._changes.announce()

    async def _ended(self, job_id: int) -> JobInfo | None:
        info = await self.info(job_id)
        return None if info.state == JobState.RUNNING else info

    def _describe(self, row: JobRow) -> JobInfo:
        live = self._live.get(row.id) if row.state == JobState.RUNNING else None
        steps = self._count_steps(row.kind)
        return JobInfo(
            id=row.id,
            kind=row.kind,
            target=row.target,
            vm=row.vm_id,
            state=row.state,
            step=steps
            if row.state == JobState.DONE
            else row.step,  # one without a list counts none
            steps=steps,
            stage=live.stage if live else row.stage,
            message=live.message if live else row.message,
            fraction=live.fraction if live else None,
            error_kind=row.error_kind,
            cancellable=live.cancellable and not live.cancel_requested if live else False,
            owner_uid=row.owner_uid,
            created_at=row.created_at,
            finished_at=row.finished_at,
        )
