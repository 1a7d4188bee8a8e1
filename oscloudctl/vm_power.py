"""The vm commands that change what it does: start, stop, restart, pause, resume, delete."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.output import print_objects
from oscloudctl.progress import ProgressLine
from oscloudctl.session import Session, json_option, pass_session, socket_option, timeout_option
from oscloudctl.targets import Target, all_option, choose_vms, run_on_each, vms_argument

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# A first boot under emulation takes half a minute, and the stop before it its own timeout.
START_TIMEOUT_SECONDS = 300.0

# The ladder after the power button: quit, then SIGKILL, each with a wait of its own.
STOP_MARGIN_SECONDS = 60.0

_DOWN = frozenset({"STOPPED", "CRASHED", "ERROR"})
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
    silence_seconds: float | None = None,
    **params: Any,
) -> int:
    """Call `method` for each vm, telling each one's new state; give the exit status."""
    answers: list[dict[str, Any]] = []

    def change(vm: Target) -> dict[str, Any]:
        with ProgressLine(str(vm) if len(targets) > 1 else "") as line:
            answer: dict[str, Any] = session.call(
                method, on_progress=line.show, timeout_seconds=silence_seconds, vm=vm, **params
            )
        if not as_json:
            click.echo(f"{answer['name']}: {answer.get('state', 'deleted')}")
        return answer

    status = run_on_each(targets, change, done=answers.append)
    if as_json and answers:
        print_objects(answers, as_json=True)
    return status


@click.command("vm-start")
@vms_argument
@all_option
@json_option
@socket_option
@pass_session
def vm_start(session: Session, vms: tuple[str, ...], *, every: bool, as_json: bool) -> int:
    """Start vms."""
    targets = choose_vms(session, vms, every=every, states=_DOWN)
    return change_each(
        session, "vm_start", targets, as_json=as_json, silence_seconds=START_TIMEOUT_SECONDS
    )


@click.command("vm-stop")
@vms_argument
@all_option
@force_option
@timeout_option(30, _STOP_HELP)
@json_option
@socket_option
@pass_session
def vm_stop(
    session: Session,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Stop vms: power button first, then harder."""
    targets = choose_vms(session, vms, every=every, states=_UP)
    return change_each(
        session, "vm_stop", targets, as_json=as_json,
        silence_seconds=timeout + STOP_MARGIN_SECONDS, force=force, timeout=timeout,
    )  # fmt: skip


@click.command("vm-restart")
@vms_argument
@all_option
@force_option
@timeout_option(30, _STOP_HELP)
@json_option
@socket_option
@pass_session
def vm_restart(
    session: Session,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Stop vms and start them again."""
    targets = choose_vms(session, vms, every=every, states=_UP)
    return change_each(
        session, "vm_restart", targets, as_json=as_json,
        silence_seconds=timeout + START_TIMEOUT_SECONDS, force=force, timeout=timeout,
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
    """Let paused vms go on."""
    targets = choose_vms(session, vms, every=every, states=frozenset({"PAUSED"}))
    return change_each(session, "vm_resume", targets, as_json=as_json)


@click.command("vm-delete")
@vms_argument
@all_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask (asks only on a terminal).")
@force_option
@timeout_option(30, _STOP_HELP)
@json_option
@socket_option
@pass_session
def vm_delete(
    session: Session,
    vms: tuple[str, ...],
    timeout: float,
    *,
    every: bool,
    yes: bool,
    force: bool,
    as_json: bool,
) -> int:
    """Delete vms and their disks."""
    targets = choose_vms(session, vms, every=every)
    if targets and not yes and sys.stdin.isatty():
        named = ", ".join(map(str, targets))
        if not click.confirm(f"Delete {named} with all that is on their disks?", err=True):
            click.echo("Nothing was deleted.", err=True)
            return 1
    return change_each(
        session, "vm_delete", targets, as_json=as_json,
        silence_seconds=timeout + STOP_MARGIN_SECONDS, force=force, timeout=timeout,
    )  # fmt: skip
