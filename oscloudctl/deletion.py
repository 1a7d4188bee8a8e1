"""Deleting: asked for once on a terminal, done to each object that is named."""

import sys
from typing import Any

import click

from oscloudctl.output import print_objects
from oscloudctl.session import Session, parse_target
from oscloudctl.targets import run_on_each

yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask (asks only on a terminal).")


def is_meant(question: str, *, yes: bool) -> bool:
    """Ask on a terminal whether to delete; True elsewhere, and with `yes`."""
    if yes or not sys.stdin.isatty() or click.confirm(question, err=True):
        return True
    click.echo("Nothing was deleted.", err=True)
    return False


def delete_each(
    session: Session,
    noun: str,
    names: tuple[str, ...],
    *,
    yes: bool,
    as_json: bool,
    ids_only: bool,
    silence_seconds: float | None = None,
) -> int:
    """Delete each named object of a kind and say so; give the exit status."""
    if not names:
        raise click.UsageError(f"which {noun}? Name one or more")
    if not is_meant(f"Delete {', '.join(names)}?", yes=yes):
        return 1

    def delete(target: int | str) -> Any:
        named: dict[str, Any] = {noun: target}
        return session.call(f"{noun}_delete", timeout_seconds=silence_seconds, **named)

    deleted: list[dict[str, Any]] = []
    status = run_on_each(
        session, [parse_target(name) for name in names], delete, done=deleted.append
    )
    if as_json or ids_only:
        print_objects(deleted, as_json=as_json, ids_only=ids_only)
    else:
        for each in deleted:
            click.echo(f"{each['name']}: deleted")
    return status
