"""Network cards: the commands of those beside a vm's first, and the option that names them all."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.job_call import call_job
from oscloudctl.output import print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    output_options,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# A guest has half a minute to let go.
SILENCE_SECONDS = 120.0


def network_option(what: str) -> Callable[[Decorated], Decorated]:
    """Add `--network`, several times for several cards."""
    return click.option(
        "--network", "networks", multiple=True, metavar="NETWORK[,ip=ADDRESS]",
        shell_complete=complete_from("network_list"), help=what,
    )  # fmt: skip


def read_networks(given: tuple[str, ...]) -> list[int | str] | int | str | None:
    """Give the methods' `network` for what was typed, None for nothing."""
    networks = [parse_target(each) for each in given]
    return networks if len(networks) > 1 else next(iter(networks), None)


def describe_cards(vm: dict[str, Any]) -> str:
    """Say which cards a vm has."""
    return "cards in: " + ", ".join(f"{nic['network']} ({nic['ip']})" for nic in vm["nics"])


@click.command("nic-add")
@vm_argument
@click.argument("network", metavar="NETWORK", shell_complete=complete_from("network_list"))
@click.option("--ip", metavar="ADDRESS", help="Its address.  [default: the next free one]")
@output_options
@socket_option
@pass_session
def nic_add(
    session: Session, vm: str, network: str, ip: str | None, *, as_json: bool, ids_only: bool
) -> None:
    """Give a vm a card in one more network, at once if it runs.

    Its guest was told of the cards it was made with; the address of this one is set in the guest.
    """
    _change(
        session, "nic_add", vm=parse_target(vm), network=parse_target(network), ip=ip,
        as_json=as_json, ids_only=ids_only,
    )  # fmt: skip


@click.command("nic-delete")
@vm_argument
@click.argument("nic", metavar="NETWORK|SLOT", shell_complete=complete_from("network_list"))
@output_options
@socket_option
@pass_session
def nic_delete(session: Session, vm: str, nic: str, *, as_json: bool, ids_only: bool) -> None:
    """Take a network card from a vm, at once if it runs.

    Its first one stays.
    """
    _change(
        session, "nic_delete", vm=parse_target(vm), nic=parse_target(nic),
        as_json=as_json, ids_only=ids_only,
    )  # fmt: skip


def _change(session: Session, method: str, *, as_json: bool, ids_only: bool, **params: Any) -> None:
    """Call the method and show which cards the vm has then."""
    vm = call_job(session, method, silence_seconds=SILENCE_SECONDS, **params)
    if as_json or ids_only:
        print_objects([vm], as_json=as_json, ids_only=ids_only)
    else:
        click.echo(f"{vm['name']} has {describe_cards(vm)}")
