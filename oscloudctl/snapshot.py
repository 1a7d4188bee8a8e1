"""The snapshot commands; the list is drawn as the tree it is."""

from typing import Any

import click

from oscloudctl.job_call import call_job, print_begun
from oscloudctl.output import Column, print_json, print_list, print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    json_option,
    no_wait_option,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)

COLUMNS = (
    Column("NAME", "tree"),
    Column("KIND", "kind"),
    Column("SIZE", "size"),
    Column("ALLOCATED", "allocated"),
    Column("CREATED", "created_at"),
    Column("DESCRIPTION", "description"),
)

# Stopping a vm and starting it, under emulation; its memory on a slow disk.
_SILENCE_SECONDS = 3600.0


def complete_snapshots(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Offer the names of the snapshots of the vm that was named before."""
    vm = parse_target(ctx.params.get("vm") or "")
    return complete_from("snapshot_list", vm=vm)(ctx, param, incomplete)


_snapshot_argument = click.argument("snapshot", shell_complete=complete_snapshots)


@click.command("snapshot-create")
@vm_argument
@click.argument("name")
@click.option("--memory", is_flag=True, help="With what its guest has in memory.")
@click.option("--description", metavar="TEXT", help="What is to be remembered about it.")
@no_wait_option
@json_option
@socket_option
@pass_session
def snapshot_create(
    session: Session, /, vm: str, name: str, *, no_wait: bool, as_json: bool, **params: Any
) -> None:
    """Keep a vm's disk as it is, under a name.

    A vm that runs goes on; its snapshot is as its disk would be after a power cut. With --memory it
    stands still while that is written, and a restore has it go on where it stood.
    """
    answer = _call(session, "snapshot_create", vm, no_wait=no_wait, name=name, **params)
    if as_json:
        print_objects([answer], as_json=True)
    elif no_wait:
        print_begun([answer])
    else:
        click.echo(f"{answer['vm']}: {answer['name']}")
        click.echo(f"Next: oscloudctl snapshot-restore {answer['vm']} {answer['name']}", err=True)


@click.command("snapshot-list")
@vm_argument
@json_option
@socket_option
@pass_session
def snapshot_list(session: Session, vm: str, *, as_json: bool) -> None:
    """Show a vm's snapshots as a tree.

    Its disk stands on the one with a star.
    """
    rows = session.call("snapshot_list", vm=parse_target(vm))
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo(f"There is no snapshot yet: oscloudctl snapshot-create {vm} NAME", err=True)
    else:
        print_list(_draw(rows, None, ""), COLUMNS, as_json=False, ids_only=False)


def _draw(rows: list[dict[str, Any]], parent: str | None, indent: str) -> list[dict[str, Any]]:
    """Give the snapshots below a parent, each with its place in the tree, in the tree's order."""
    drawn = []
    for row in rows:
        if row["parent"] == parent:
            star = " *" if row["current"] else ""
            drawn.append({**row, "tree": f"{indent}{row['name']}{star}"})
            drawn += _draw(rows, row["name"], indent.replace("└", " ") + "└ ")
    return drawn


@click.command("snapshot-restore")
@vm_argument
@_snapshot_argument
@click.option("--force", is_flag=True, help="Even if it runs or is suspended: that is lost.")
@click.option("--disk-only", is_flag=True, help="Without the memory of the snapshot.")
@no_wait_option
@json_option
@socket_option
@pass_session
def snapshot_restore(
    session: Session, /, vm: str, snapshot: str, *, no_wait: bool, as_json: bool, **how: bool
) -> None:
    """Have a vm's disk as it was.

    What was written since is lost, but for what other snapshots have of it. A vm that ran is
    started again, and one whose memory was kept goes on where it stood.
    """
    answer = _call(session, "snapshot_restore", vm, no_wait=no_wait, snapshot=snapshot, **how)
    if as_json:
        print_objects([answer], as_json=True)
    elif no_wait:
        print_begun([answer])
    else:
        click.echo(f"{answer['name']}: {answer['state']}")


@click.command("snapshot-delete")
@vm_argument
@_snapshot_argument
@no_wait_option
@json_option
@socket_option
@pass_session
def snapshot_delete(
    session: Session, vm: str, snapshot: str, *, no_wait: bool, as_json: bool
) -> None:
    """Forget a snapshot.

    The vm and its other snapshots stay as they are. What it had becomes part of the one above it,
    unless something else stands on it.
    """
    answer = _call(session, "snapshot_delete", vm, no_wait=no_wait, snapshot=snapshot)
    if as_json:
        print_objects([answer], as_json=True)
    elif no_wait:
        print_begun([answer])
    else:
        click.echo(f"{answer['vm']}: {answer['deleted']} deleted")
        if answer["kept"]:
            click.echo("Its contents stay: a disk or another snapshot stands on them.", err=True)


def _call(session: Session, method: str, vm: str, *, no_wait: bool, **params: Any) -> Any:
    return call_job(
        session, method, silence_seconds=_SILENCE_SECONDS, vm=parse_target(vm),
        wait=False if no_wait else None, **params,
    )  # fmt: skip
