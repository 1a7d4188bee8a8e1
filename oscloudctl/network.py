"""The network commands."""

import click

from oscloudctl.deletion import delete_each, yes_option
from oscloudctl.output import Column, print_list, print_objects
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
    Column("SUBNET6", "subnet6"),
    Column("GATEWAY", "gateway"),
    Column("BRIDGE", "bridge"),
    Column("USED", "addresses_used"),
    Column("ISOLATED", "isolated"),
    Column("NAT", "nat"),
    Column("DNS", "dns"),
)

networks_argument = click.argument(
    "networks", metavar="NETWORK...", nargs=-1, shell_complete=complete_from("network_list")
)


@click.command("network-list")
@output_options
@socket_option
@pass_session
def network_list(session: Session, *, as_json: bool, ids_only: bool) -> None:
    """List the networks."""
    print_list(session.call("network_list"), COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("network-info")
@networks_argument
@output_options
@socket_option
@pass_session
def network_info(
    session: Session, networks: tuple[str, ...], *, as_json: bool, ids_only: bool
) -> int:
    """Show all there is to know about networks."""
    return show_each(session, "network", networks, as_json=as_json, ids_only=ids_only)


@click.command("network-create")
@click.argument("name")
@click.option(
    "--subnet", metavar="CIDR", help="Its addresses, such as 10.20.0.0/24.  [default: a free /24]"
)
@click.option(
    "--subnet6", metavar="CIDR",
    help='Its IPv6 addresses, a /64 within fc00::/7, or "none".  [default: one that is drawn]',
)  # fmt: skip
@click.option("--isolated", is_flag=True, help="Its vms reach nothing but each other and the host.")
@click.option(
    "--no-nat", is_flag=True,
    help="Its vms go out under their own addresses, and are reached at them.",
)  # fmt: skip
@click.option(
    "--dns", multiple=True, metavar="ADDRESS",
    help="Where its name server asks for what is no vm's name; may be repeated."
    "  [default: as the host; isolated: nobody]",
)  # fmt: skip
@output_options
@socket_option
@pass_session
def network_create(
    session: Session,
    name: str,
    subnet: str | None,
    subnet6: str | None,
    dns: tuple[str, ...],
    *,
    isolated: bool,
    no_nat: bool,
    as_json: bool,
    ids_only: bool,
) -> None:
    """Make a network for vms; a name is enough."""
    made = session.call(
        "network_create",
        name=name,
        subnet=subnet,
        subnet6=subnet6,
        isolated=isolated or None,
        nat=False if no_nat else None,
        dns=list(dns) or None,
    )
    print_objects([made], as_json=as_json, ids_only=ids_only)
    if not (as_json or ids_only):
        click.echo(f"Next: oscloudctl vm-create NAME --network {name}", err=True)


@click.command("network-delete")
@networks_argument
@yes_option
@output_options
@socket_option
@pass_session
def network_delete(session: Session, /, networks: tuple[str, ...], **options: bool) -> int:
    """Delete networks that no vm is in."""
    return delete_each(session, "network", networks, **options)
