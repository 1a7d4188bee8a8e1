"""`vm-set`, and the options of what a vm does by itself, which `vm-create` has, too."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.output import print_objects
from oscloudctl.session import Session, output_options, parse_target, pass_session, socket_option
from oscloudctl.targets import Target, run_on_each, vms_argument

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

AUTOSTART = ("no", "yes", "last-state")
RESTART = ("no", "on-failure", "always")


def policy_options(function: Decorated) -> Decorated:
    """Add `--autostart` and `--restart`."""
    restart = click.option(
        "--restart", type=click.Choice(RESTART),
        help="Start it again when it has ended: never, when it crashed, or whatever ended it"
        " unless its user did.",
    )  # fmt: skip
    autostart = click.option(
        "--autostart", type=click.Choice(AUTOSTART),
        help="Start it when the host has booted; last-state: if it was wanted running.",
    )  # fmt: skip
    return autostart(restart(function))


def bandwidth_option(function: Decorated) -> Decorated:
    """Add `--bandwidth`."""
    return click.option(
        "--bandwidth", metavar="RATE",
        help="How many bits a second it may send, and receive, such as 100M; none for any number.",
    )(function)  # fmt: skip


@click.command("vm-set")
@vms_argument
@policy_options
@bandwidth_option
@output_options
@socket_option
@pass_session
def vm_set(
    session: Session, /, vms: tuple[str, ...], *, as_json: bool, ids_only: bool, **policies: Any
) -> int:
    """Set what vms do by themselves (start with the host, restart) and their bandwidth."""
    if not vms:
        raise click.UsageError("which vm? Name one or more")
    if not any(policies.values()):
        raise click.UsageError(
            "there is nothing to set: give --autostart, --restart or --bandwidth"
        )
    found: list[dict[str, Any]] = []

    def change(vm: Target) -> dict[str, Any]:
        answer: dict[str, Any] = session.call("vm_set", vm=vm, **policies)
        if not as_json and not ids_only:
            both = f"autostart {answer['autostart']}, restart {answer['restart']}"
            limit = answer.get("bandwidth")
            rate = f", bandwidth {limit} bit/s" if limit else ""
            click.echo(f"{answer['name']}: {both}{rate}")
        return answer

    status = run_on_each(session, [parse_target(vm) for vm in vms], change, done=found.append)
    if found and (as_json or ids_only):
        print_objects(found, as_json=as_json, ids_only=ids_only)
    return status
