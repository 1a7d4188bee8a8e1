"""Jobs: long operations, each a row written before anything outside the database happens.

Owns the rows and the progress told to whoever listens. What a job does is its noun's affair.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TypeVar

import msgspec

from oscloudd.errors import CloudError
from oscloudd.store.database import Database
from oscloudd.store.models import Job as JobRow

_log = logging.getLogger(__name__)
T = TypeVar("T")


class JobState(StrEnum):
    """Where a job is."""

    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"


class Progress(msgspec.Struct, frozen=True):
    """One step forward; `fraction` is 0 to 1, or None where nobody can tell."""

    job: int
    stage: str
    message: str
    fraction: float | None = None


OnProgress = Callable[[Progress], None]


def no_progress(_progress: Progress) -> None:
    """Listen to nothing."""


class Job:
    """One long operation under way."""

    def __init__(self, job_id: int, listener: OnProgress) -> None:
        self.id = job_id
        self.stage = ""
        self._listener = listener

    def report(self, stage: str, message: str, fraction: float | None = None) -> None:
        """Say what is being done now."""
        if stage != self.stage:
            _log.info("job %d: %s: %s", self.id, stage, message)
        self.stage = stage
        self._listener(Progress(self.id, stage, message, fraction))


class Jobs:
    """All jobs of this daemon; `close` waits for none of them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tasks: set[asyncio.Task[object]] = set()

    async def begin(self, kind: str, target: str, owner_uid: int, listener: OnProgress) -> Job:
        """Write the row of a new job."""

        def insert() -> int:
            row = JobRow.create(
                kind=kind,
                target=target,
                state=JobState.RUNNING,
                owner_uid=owner_uid,
                created_at=time.time(),
            )
            return int(row.id)

        return Job(await self._database.run(insert), listener)

    def run(self, job: Job, work: Awaitable[T]) -> "asyncio.Task[T]":
        """Do the work in a task of its own, so that a client that goes away does not stop it."""
        task = asyncio.create_task(self._run(job, work), name=f"job {job.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel what is under way; the rows say RUNNING, and the next start sees to them."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def fail(self, job: Job, message: str) -> None:
        """End a job that failed before its work began."""
        await self._finish(job, JobState.FAILED, message)

    async def end_unfinished(self) -> None:
        """Mark jobs of an earlier daemon as failed: nobody is working on them any more."""
        await self._database.run(
            lambda: (
                JobRow.update(
                    state=JobState.FAILED, message="the daemon stopped", finished_at=time.time()
                )
                .where(JobRow.state == JobState.RUNNING)
                .execute()
            )
        )

    async def _run(self, job: Job, work: Awaitable[T]) -> T:
        try:
            result = await work
        except asyncio.CancelledError:
            raise
        except CloudError as error:
            await self._finish(job, JobState.FAILED, error.message)
            error.details.setdefault("stage", job.stage)
            raise
        except Exception:
            await self._finish(job, JobState.FAILED, "internal error")
            raise
        await self._finish(job, JobState.DONE, "")
        return result

    async def _finish(self, job: Job, state: JobState, message: str) -> None:
        await self._database.run(
            lambda: (
                JobRow.update(
                    state=state, stage=job.stage, message=message, finished_at=time.time()
                )
                .where(JobRow.id == job.id)
                .execute()
            )
        )
