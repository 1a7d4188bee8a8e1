"""`vm-set`, and the options of what a vm does by itself, which `vm-create` has, too."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.nic import describe_cards, network_option, read_networks
from oscloudctl.output import format_value, print_objects
from oscloudctl.session import Session, output_options, parse_target, pass_session, socket_option
from oscloudctl.targets import Target, run_on_each, vms_argument

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_WORDS = {"mem_size": "memory", "protect": "protected"}
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


def _describe(vm: dict[str, Any], given: dict[str, Any]) -> str:
    """Say how a vm is now: its policies, and what else was given."""
    shown = ["cpus", "mem_size", "protect", "bandwidth"]
    keys = [*(key for key in shown if key in given), "autostart", "restart"]
    words = [f"{_WORDS.get(key, key)} {format_value(key, vm.get(key))}" for key in keys]
    return ", ".join([*words, describe_cards(vm)] if "network" in given else words)


@click.command("vm-set")
@vms_argument
@click.option("--name", metavar="NAME", help="Its name; its guest keeps the hostname it has.")
@click.option("--cpus", type=int, metavar="N", help="Virtual processors, while it is off.")
@click.option("--mem-size", metavar="SIZE", help="Memory, such as 2G, while it is off.")
@network_option(
    "A network it is to have a card in, while it is off; several times for several. It has these"
    " cards then and no others; the first one stays in its network."
)
@policy_options
@bandwidth_option
@click.option("--protect", type=click.Choice(["no", "yes"]), help="Refuse to delete it.")
@output_options
@socket_option
@pass_session
def vm_set(
    session: Session,
    /,
    vms: tuple[str, ...],
    protect: str | None,
    networks: tuple[str, ...],
    *,
    as_json: bool,
    ids_only: bool,
    **settings: Any,
) -> int:
    """Change what vms are: size, name, networks, policies."""
    if not vms:
        raise click.UsageError("which vm? Name one or more")
    settings["protect"] = None if protect is None else protect == "yes"
    settings["network"] = read_networks(networks)
    given = {name: value for name, value in settings.items() if value is not None}
    if not given:
        raise click.UsageError("there is nothing to set: give one of the options, see --help")
    if "name" in given and len(vms) > 1:
        raise click.UsageError("only one vm can have that name")
    found: list[dict[str, Any]] = []

    def change(vm: Target) -> dict[str, Any]:
        answer: dict[str, Any] = session.call("vm_set", vm=vm, **given)
        if not as_json and not ids_only:
            click.echo(f"{answer['name']}: {_describe(answer, given)}")
        return answer

    status = run_on_each(session, [parse_target(vm) for vm in vms], change, done=found.append)
    if found and (as_json or ids_only):
        print_objects(found, as_json=as_json, ids_only=ids_only)
    return status
