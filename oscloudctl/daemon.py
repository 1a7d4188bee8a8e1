"""The commands about the daemon itself."""

from typing import Any

import click

from oscloudctl.output import make_printable, print_json, print_objects
from oscloudctl.session import Session, json_option, pass_session, socket_option
from oscloudd.errors import HostError

_MARKS = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}

# The accelerator probe may run a guest that has to time out, twice.
DOCTOR_TIMEOUT_SECONDS = 120.0


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


def _print_checks(checks: list[dict[str, Any]]) -> None:
    width = max((len(check["check"]) for check in checks), default=0)
    for check in checks:
        mark = _MARKS.get(check["verdict"], check["verdict"])
        message = make_printable(check["message"])
        click.echo(f"{mark}  {check['check'].ljust(width)}  {message}")
        if check.get("hint") and check["verdict"] != "ok":
            click.echo(f"{' ' * (width + 11)}→ {make_printable(check['hint'])}")
