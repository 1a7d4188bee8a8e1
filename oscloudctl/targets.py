"""One command on several objects: goes on after a failure, ends with the first one's status."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.report import EXIT_INTERRUPTED, report
from oscloudctl.session import Session, complete_vms, parse_target
from oscloudd.errors import CloudError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Target = int | str


def vms_argument(function: Decorated) -> Decorated:
    """Add the argument VM..., several ids or names."""
    return click.argument("vms", metavar="VM...", nargs=-1, shell_complete=complete_vms)(function)


def all_option(function: Decorated) -> Decorated:
    """Add `--all`."""
    return click.option(
        "--all", "every", is_flag=True, help="All vms that are in a state where it can be done."
    )(function)


def choose_vms(
    session: Session, vms: tuple[str, ...], *, every: bool, states: frozenset[str] | None = None
) -> list[Target]:
    """Give what was named, or with `--all` the names of all vms in one of `states`.

    Raises UsageError for neither and for both.
    """
    if bool(vms) == every:
        raise click.UsageError(
            "name vms or say --all, not both" if every else "which vm? Name one or more, or --all"
        )
    if not every:
        return [parse_target(vm) for vm in vms]
    rows = session.call("vm_list")
    return [row["id"] for row in rows if states is None or row["state"] in states]


def run_on_each(
    session: Session,
    targets: list[Target],
    action: Callable[[Target], Any],
    *,
    done: Callable[[Any], None],
) -> int:
    """Do `action` to each target and hand its answer to `done`; give the exit status.

    Goes on after a failure, but not after a Ctrl-C that has cancelled a job.
    """
    status = 0
    for number, target in enumerate(targets, 1):
        try:
            answer = action(target)
        except CloudError as error:
            failed = report(error)
            status = status or failed
        else:
            done(answer)
        if session.interrupted and (left := targets[number:]):
            click.echo(f"Not begun: {', '.join(map(str, left))}", err=True)
            return status or EXIT_INTERRUPTED
    return status
