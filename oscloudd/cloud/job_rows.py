"""The rows of jobs: written, counted and ended inside the transactions of what they are about."""

import time
from enum import StrEnum
from typing import Any

import msgspec

from oscloudd.cloud.events import EventKind, insert_event
from oscloudd.store.models import Job as JobRow


class JobState(StrEnum):
    """Where a job is."""

    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


def insert_job(
    kind: str,
    target: str,
    owner_uid: int,
    *,
    stage: str = "",
    vm_id: int | None = None,
    params: dict[str, Any] | None = None,
) -> JobRow:
    """Write the row of a new job, inside the transaction that decides on it."""
    row: JobRow = JobRow.create(
        kind=kind,
        target=target,
        vm_id=vm_id,
        state=JobState.RUNNING,
        stage=stage,
        params=msgspec.json.encode(params or {}).decode(),
        owner_uid=owner_uid,
        created_at=time.time(),
    )
    tell_job(row, JobState.RUNNING, stage)
    return row


def tell_job(row: JobRow, state: str, stage: str, message: str = "") -> None:
    """Write the event of a job's step or end."""
    data = {"kind": row.kind, "state": state, "stage": stage, "message": message}
    insert_event(EventKind.JOB, row.target, data, vm_id=row.vm_id, job_id=row.id)


def finish_job(
    job_id: int, state: JobState, message: str = "", kind: str = "", *, stage: str | None = None
) -> None:
    """Write a job's end, inside a transaction; what its steps needed, secrets too, is forgotten."""
    row = JobRow.get_or_none(JobRow.id == job_id)
    if row is None:
        return
    row.state, row.message, row.error_kind = state, message, kind
    row.stage = row.stage if stage is None else stage
    row.finished_at, row.params = time.time(), "{}"
    row.save()
    tell_job(row, state, row.stage, message)


def running_jobs() -> list[JobRow]:
    """Read the jobs that have not ended, oldest first, inside a transaction."""
    return list(JobRow.select().where(JobRow.state == JobState.RUNNING).order_by(JobRow.id))


def taken_up_again(row: JobRow) -> JobRow:
    """Count one more daemon that works on a job, inside a transaction."""
    # In SQL: a transaction that the database lost is run again, and must not count again.
    JobRow.update(attempts=JobRow.attempts + 1).where(JobRow.id == row.id).execute()
    taken: JobRow = JobRow.get_by_id(row.id)
    return taken


def forgive_attempt(job_ids: list[int]) -> None:
    """Don't count a daemon that was told to stop as one that the jobs may have killed."""
    JobRow.update(attempts=JobRow.attempts - 1).where(JobRow.id.in_(job_ids)).execute()


def mark_undoing(job_id: int, params: dict[str, Any]) -> None:
    """Write down that a job is being undone: from here on nobody takes its steps up again."""
    text = msgspec.json.encode(params).decode()
    JobRow.update(params=text).where(JobRow.id == job_id).execute()
