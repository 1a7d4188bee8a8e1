"""The commands about the daemon itself."""

from typing import Any

import click

from oscloudctl.output import make_printable, print_json, print_objects
from oscloudctl.session import (
    Session,
    json_option,
    pass_session,
    socket_option,
    timeout_option,
)
from oscloudd.errors import HostError

_MARKS = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}

# The accelerator probe may run a guest that has to time out, twice.
DOCTOR_TIMEOUT_SECONDS = 120.0

# After the power button come quit and SIGKILL, each with a wait of its own.
STOP_MARGIN_SECONDS = 60.0


@click.command("daemon-info")
@json_option
@socket_option
@pass_session
def daemon_info(session: Session, *, as_json: bool) -> None:
    """Show the daemon's version, state and settings."""
    print_objects([session.call("daemon_info")], as_json=as_json)


@click.command("daemon-doctor")
@json_option
@socket_option
@pass_session
def daemon_doctor(session: Session, *, as_json: bool) -> int:
    """Check this box and say what to mend.

    Exits with 10 if a check failed; warnings alone are no failure.
    """
    answer = session.call("daemon_doctor", timeout_seconds=DOCTOR_TIMEOUT_SECONDS)
    if as_json:
        print_json(answer)
    else:
        _print_checks(answer["checks"])
    return 0 if answer["ok"] else HostError.exit_status


@click.command("daemon-stop-guests")
@timeout_option(60, "How long each guest may take before it is switched off.")
@json_option
@socket_option
@pass_session
def daemon_stop_guests(session: Session, timeout: float, *, as_json: bool) -> int:
    """Stop all vms, as the host's shutdown does.

    What each was wanted to be is kept: with --autostart last-state, or yes, it starts again at the
    host's next boot. Exits with 10 if one could not be stopped.
    """
    answer = session.call(
        "daemon_stop_guests", timeout=timeout, timeout_seconds=timeout + STOP_MARGIN_SECONDS
    )
    if as_json:
        print_json(answer)
    else:
        for name in answer["stopped"]:
            click.echo(f"{make_printable(name)}: STOPPED")
        for left in answer["left"]:
            click.echo(make_printable(f"{left['name']}: {left['reason']}"), err=True)
    return HostError.exit_status if answer["left"] else 0


def _print_checks(checks: list[dict[str, Any]]) -> None:
    width = max((len(check["check"]) for check in checks), default=0)
    for check in checks:
        mark = _MARKS.get(check["verdict"], check["verdict"])
        message = make_printable(check["message"])
        click.echo(f"{mark}  {check['check'].ljust(width)}  {message}")
        if check.get("hint") and check["verdict"] != "ok":
            click.echo(f"{' ' * (width + 11)}→ {make_printable(check['hint'])}")
