"""The network commands."""

import click

from oscloudctl.output import Column, print_list
from oscloudctl.session import (
    Session,
    complete_from,
    output_options,
    pass_session,
    socket_option,
)
from oscloudctl.vm import show_each

COLUMNS = (
    Column("ID", "id"),
    Column("NAME", "name"),
    Column("SUBNET", "subnet"),
    Column("GATEWAY", "gateway"),
    Column("BRIDGE", "bridge"),
    Column("USED", "addresses_used"),
    Column("DNS", "dns"),
)


@click.command("network-list")
@output_options
@socket_option
@pass_session
def network_list(session: Session, *, as_json: bool, ids_only: bool) -> None:
    """List the networks."""
    print_list(session.call("network_list"), COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("network-info")
@click.argument(
    "networks", metavar="NETWORK...", nargs=-1, shell_complete=complete_from("network_list")
)
@output_options
@socket_option
@pass_session
def network_info(
    session: Session, networks: tuple[str, ...], *, as_json: bool, ids_only: bool
) -> int:
    """Show all there is to know about networks."""
    return show_each(session, "network", networks, as_json=as_json, ids_only=ids_only)
