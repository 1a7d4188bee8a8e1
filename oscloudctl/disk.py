"""The disk commands."""

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
    Column("SIZE", "size"),
    Column("ALLOCATED", "allocated"),
    Column("TEMPLATE", "template"),
    Column("VM", "vm"),
    Column("ROLE", "role"),
)


@click.command("disk-list")
@output_options
@socket_option
@pass_session
def disk_list(session: Session, *, as_json: bool, ids_only: bool) -> None:
    """List the disks."""
    print_list(session.call("disk_list"), COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("disk-info")
@click.argument("disks", metavar="DISK...", nargs=-1, shell_complete=complete_from("disk_list"))
@output_options
@socket_option
@pass_session
def disk_info(session: Session, disks: tuple[str, ...], *, as_json: bool, ids_only: bool) -> int:
    """Show all there is to know about disks."""
    return show_each(session, "disk", disks, as_json=as_json, ids_only=ids_only)
