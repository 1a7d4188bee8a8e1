"""The vm commands that change what it does, from start to delete."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.deletion import is_meant, yes_option
from oscloudctl.job_call import call_job, print_begun
from oscloudctl.output import print_ids, print_objects
from oscloudctl.session import (
    Session,
    json_option,
    no_wait_option,
    output_options,
    pass_session,
    socket_option,
    timeout_option,
)
from oscloudctl.targets import (
    Target,
    all_option,
    choose_vms,
    run_on_each,
    vms_argument,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# A first boot under emulation takes half a minute, and the stop before it its own timeout.
START_TIMEOUT_SECONDS = 300.0

# The daemon gives a guest of 16 GiB a quarter of an hour to be written to a slow disk.
SUSPEND_TIMEOUT_SECONDS = 3600.0

# The ladder after the power button: quit, then SIGKILL, each with a wait of its own.
STOP_MARGIN_SECONDS = 60.0

_DOWN = frozenset({"STOPPED", "SUSPENDED", "CRASHED", "ERROR"})
_UP = frozenset({"STARTING", "RUNNING", "PAUSED", "UNRESPONSIVE"})
_STOP_HELP = "How long the power button may take before it is switched off."


def force_option(function: Decorated) -> Decorated:
    """Add `--force`."""
    return click.option("--force", is_flag=True, help="Switch off at once, like a power cut.")(
        function
    )


def change_each(
    session: Session,
    method: str,
    targets: list[Target],
    *,
    as_json: bool,
    ids_only: bool = False,
    no_wait: bool = False,
    silence_seconds: float | None = None,
    **params: Any,
) -> int:
    """Call `method` for each vm, telling each one's new state or job; give the exit status."""
    answers: list[dict[str, Any]] = []

    def change(vm: Target) -> dict[str, Any]:
        subject = str(vm) if len(targets) > 1 else ""
        answer: dict[str, Any] = call_job(
            session, method, subject=subject, silence_seconds=silence_seconds,
            vm=vm, wait=False if no_wait else None, **params,
        )  # fmt: skip
        if not (as_json or ids_only or no_wait):
            click.echo(f"{answer['name']}: {answer.get('state', 'deleted')}")
        return answer

    status = run_on_each(session, targets, change, done=answers.append)
    if answers and as_json:
        print_objects(answers, as_json=True)
    elif ids_only:
        print_ids([{"id": answer.get("deleted"), **answer} for answer in answers])
    elif answers and no_wait:
        print_begun(answers)
    return status


@click.command("vm-start")
@vms_argument
@all_option
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_start(session: Session, /, vms: tuple[str, ...], *, every: bool, **output: bool) -> int:
    """Start vms."""
    targets = choose_vms(session, vms, every=every, states=_DOWN)
    return change_each(
        session, "vm_start", targets, silence_seconds=START_TIMEOUT_SECONDS, **output
    )


@click.command("vm-stop")
@vms_argument
@all_option
@force_option
@timeout_option(30, _STOP_HELP)
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_stop(
    session: Session,
    /,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    force: bool,
    **output: bool,
) -> int:
    """Stop vms: power button first, then harder."""
    targets = choose_vms(session, vms, every=every, states=_UP)
    return change_each(
        session, "vm_stop", targets, silence_seconds=timeout + STOP_MARGIN_SECONDS,
        force=force, timeout=timeout, **output,
    )  # fmt: skip


@click.command("vm-restart")
@vms_argument
@all_option
@force_option
@timeout_option(30, _STOP_HELP)
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_restart(
    session: Session,
    /,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    force: bool,
    **output: bool,
) -> int:
    """Stop vms and start them again."""
    targets = choose_vms(session, vms, every=every, states=_UP)
    return change_each(
        session, "vm_restart", targets, silence_seconds=timeout + START_TIMEOUT_SECONDS,
        force=force, timeout=timeout, **output,
    )  # fmt: skip


@click.command("vm-pause")
@vms_argument
@all_option
@json_option
@socket_option
@pass_session
def vm_pause(session: Session, vms: tuple[str, ...], *, every: bool, as_json: bool) -> int:
    """Freeze running vms."""
    targets = choose_vms(session, vms, every=every, states=frozenset({"RUNNING"}))
    return change_each(session, "vm_pause", targets, as_json=as_json)


@click.command("vm-resume")
@vms_argument
@all_option
@json_option
@socket_option
@pass_session
def vm_resume(session: Session, vms: tuple[str, ...], *, every: bool, as_json: bool) -> int:
    """Let paused or suspended vms go on."""
    targets = choose_vms(session, vms, every=every, states=frozenset({"PAUSED", "SUSPENDED"}))
    return change_each(
        session, "vm_resume", targets, as_json=as_json, silence_seconds=START_TIMEOUT_SECONDS
    )


@click.command("vm-suspend")
@vms_argument
@all_option
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_suspend(session: Session, /, vms: tuple[str, ...], *, every: bool, **output: bool) -> int:
    """Save vms with their memory to disk and end them.

    They go on where they stood with vm-resume or vm-start, after a reboot of the host, too.
    """
    targets = choose_vms(session, vms, every=every, states=frozenset({"RUNNING", "PAUSED"}))
    status = change_each(
        session, "vm_suspend", targets, silence_seconds=SUSPEND_TIMEOUT_SECONDS, **output
    )
    if targets and status == 0 and not any(output.values()):
        click.echo(f"Resume it: oscloudctl vm-resume {' '.join(map(str, targets))}", err=True)
    return status


@click.command("vm-delete")
@vms_argument
@all_option
@yes_option
@force_option
@timeout_option(30, _STOP_HELP)
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_delete(
    session: Session,
    /,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    yes: bool,
    force: bool,
    **output: bool,
) -> int:
    """Delete vms and their disks."""
    targets = choose_vms(session, vms, every=every)
    named = ", ".join(map(str, targets))
    if targets and not is_meant(f"Delete {named} with all that is on their disks?", yes=yes):
        return 1
    return change_each(
        session, "vm_delete", targets, silence_seconds=timeout + STOP_MARGIN_SECONDS,
        force=force, timeout=timeout, **output,
    )  # fmt: skip
