"""The job commands: list, info, wait, cancel."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.job_call import call_job, describe_job
from oscloudctl.output import Column, format_duration, print_list, print_objects
from oscloudctl.reconnect import Patience
from oscloudctl.session import (
    COMPLETION_TIMEOUT_SECONDS,
    Session,
    json_option,
    output_options,
    pass_session,
    socket_option,
    timeout_option,
)
from oscloudctl.targets import Target, run_on_each
from oscloudctl.vm import ANSWER_MARGIN_SECONDS, show_each
from oscloudd.errors import (
    ERRORS_BY_KIND,
    CancelledJobError,
    CloudError,
    DaemonUnreachableError,
    InternalError,
    InvalidStateError,
    UnavailableError,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Job = dict[str, Any]

COLUMNS = (
    Column("ID", "id"),
    Column("KIND", "kind"),
    Column("TARGET", "target"),
    Column("STATE", "state"),
    Column("STAGE", "stage"),
    Column("STEP", "step"),
    Column("AGE", "age"),
    Column("TOOK", "took"),
)

DEFAULT_LIMIT = 100
# The most the daemon gives.
MAX_LIMIT = 10_000
_DAY_SECONDS = 86400

# Undoing a create stops a guest first, which has half a minute to power off.
CANCEL_SILENCE_SECONDS = 900.0


def jobs_argument(*states: str) -> Callable[[Decorated], Decorated]:
    """Add the argument JOB..., several ids; those of jobs in one of `states` complete, or all."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        session = ctx.find_object(Session) or Session(ctx.find_root().params.get("socket"))
        try:
            jobs = session.call("job_list", timeout_seconds=COMPLETION_TIMEOUT_SECONDS)
        except CloudError:
            return []
        ids = [str(job["id"]) for job in jobs if not states or job["state"] in states]
        return [each for each in ids if each.startswith(incomplete)]

    return click.argument(
        "jobs", metavar="JOB...", nargs=-1, required=True, type=int, shell_complete=complete
    )


@click.command("job-list")
@click.option(
    "--limit", type=click.IntRange(1, MAX_LIMIT), default=DEFAULT_LIMIT, show_default=True,
    metavar="N", help="So many, the newest.",
)  # fmt: skip
@click.option("--all", "every", is_flag=True, help="All that are kept.")
@output_options
@socket_option
@pass_session
def job_list(session: Session, limit: int, *, every: bool, as_json: bool, ids_only: bool) -> None:
    """List the jobs, the newest first."""
    jobs: list[Job] = session.call("job_list", limit=MAX_LIMIT if every else limit)
    if not jobs and not as_json and not ids_only:
        click.echo("There is no job yet: vm-create, vm-start and the like begin them.", err=True)
        return
    rows = jobs if as_json or ids_only else [_build_row(job) for job in jobs]
    print_list(rows, COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("job-info")
@jobs_argument()
@output_options
@socket_option
@pass_session
def job_info(session: Session, jobs: tuple[int, ...], *, as_json: bool, ids_only: bool) -> int:
    """Show all there is to know about jobs."""
    names = tuple(map(str, jobs))
    return show_each(session, "job", names, as_json=as_json, ids_only=ids_only)


@click.command("job-wait")
@jobs_argument("RUNNING")
@timeout_option(_DAY_SECONDS, "Give up after this long.")
@json_option
@socket_option
@pass_session
def job_wait(session: Session, jobs: tuple[int, ...], timeout: float, *, as_json: bool) -> int:
    """Wait until jobs have ended; fails as they do.

    Exits with 0 when they are done, with the error's status when one has failed, with 130 when one
    was cancelled. Ctrl-C leaves them running.
    """

    def wait(job: Target) -> Job:
        patience, end = Patience(), time.monotonic() + timeout
        while True:
            try:
                session.call("job_info", job=job)
                patience.reached()
                return _wait_once(session, job, end, subject=str(job) if len(jobs) > 1 else "")
            except (DaemonUnreachableError, UnavailableError) as error:
                patience.wait(error)

    return _end_each(session, jobs, wait, as_json=as_json)


@click.command("job-cancel")
@jobs_argument("RUNNING")
@json_option
@socket_option
@pass_session
def job_cancel(session: Session, jobs: tuple[int, ...], *, as_json: bool) -> int:
    """End jobs early and undo what they did."""

    def cancel(job: Target) -> Job:
        answer: Job = session.call("job_cancel", timeout_seconds=CANCEL_SILENCE_SECONDS, job=job)
        return answer

    return _end_each(session, jobs, cancel, as_json=as_json, wanted="CANCELLED")


def _wait_once(session: Session, job: Target, end: float, *, subject: str) -> Job:
    left = round(max(0.0, end - time.monotonic()), 3)
    answer: Job = call_job(
        session, "job_wait", cancels=False, subject=subject, job=job, timeout=left,
        silence_seconds=left + ANSWER_MARGIN_SECONDS,
    )  # fmt: skip
    return answer


def build_failure(job: Job) -> CloudError:
    """Give the error that a job has ended with, or that it has ended well in spite of a cancel."""
    if job["state"] == "DONE":
        return InvalidStateError(f"it was too late to cancel {describe_job(job)}: it is done")
    if job["state"] == "CANCELLED":
        return CancelledJobError(job["message"] or f"{describe_job(job)} was cancelled")
    kind = ERRORS_BY_KIND.get(job["error_kind"], InternalError)
    reason = job["message"] or "no reason is known"
    hint = f"see: oscloudctl job-info {job['id']}"
    return kind(f"{describe_job(job)} failed: {reason}", hint=hint)


def _end_each(
    session: Session,
    jobs: tuple[int, ...],
    action: Callable[[Target], Job],
    *,
    as_json: bool,
    wanted: str = "DONE",
) -> int:
    """Do what sees jobs to their end, telling how they ended; give the exit status."""
    ended: list[Job] = []

    def end(target: Target) -> Job:
        job = action(target)
        ended.append(job)
        if job["state"] != wanted:
            raise build_failure(job)
        if not as_json:
            click.echo(f"{describe_job(job)}: {job['state'].lower()}")
        return job

    status = run_on_each(session, list(jobs), end, done=lambda _job: None)
    if as_json and ended:
        print_objects(ended, as_json=True)
    return status


def _build_row(job: Job) -> Job:
    end, begin = job["finished_at"], job["created_at"]
    return {
        **job,
        "step": f"{job['step']} of {job['steps']}",
        "age": format_duration(max(0.0, time.time() - begin)),
        "took": None if end is None else _format_took(end - begin),
    }


def _format_took(seconds: float) -> str:
    return f"{max(0.0, seconds):.1f} s" if seconds < 10 else format_duration(seconds)
