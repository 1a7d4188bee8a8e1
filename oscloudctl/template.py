"""The template commands."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.deletion import delete_each, yes_option
from oscloudctl.output import Column, print_list, print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    no_wait_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
)
from oscloudctl.targets import run_on_each
from oscloudctl.vm import show_each

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

COLUMNS = (
    Column("NAME", "name"),
    Column("STATE", "state"),
    Column("SIZE", "size"),
    Column("USED", "used_by"),
    Column("SOURCE", "source"),
    Column("OS", "os"),
    Column("DESCRIPTION", "description"),
)

# Packing a root filesystem says nothing for minutes on a slow disk; a build that hangs for longer
# than this is stuck.
SILENCE_SECONDS = 1800.0


def templates_argument(function: Decorated) -> Decorated:
    """Add the argument TEMPLATE..., several names."""
    return click.argument(
        "templates", metavar="TEMPLATE...", nargs=-1, shell_complete=complete_from("template_list")
    )(function)


@click.command("template-list")
@output_options
@socket_option
@pass_session
def template_list(session: Session, *, as_json: bool, ids_only: bool) -> None:
    """List the templates vms can be made from."""
    print_list(session.call("template_list"), COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("template-info")
@templates_argument
@output_options
@socket_option
@pass_session
def template_info(
    session: Session, templates: tuple[str, ...], *, as_json: bool, ids_only: bool
) -> int:
    """Show all there is to know about templates."""
    return show_each(session, "template", templates, as_json=as_json, ids_only=ids_only)


def _make_each(
    session: Session,
    method: str,
    templates: tuple[str, ...],
    shape: dict[str, Any],
    *,
    no_wait: bool,
    as_json: bool,
    ids_only: bool,
) -> int:
    from oscloudctl.job_call import call_job, print_begun

    if not templates:
        raise click.UsageError("which template? Name one or more")
    made: list[dict[str, Any]] = []

    def make(template: int | str) -> Any:
        return call_job(
            session, method, subject=str(template), silence_seconds=SILENCE_SECONDS,
            template=template, wait=False if no_wait else None, **shape,
        )  # fmt: skip

    targets = [parse_target(each) for each in templates]
    status = run_on_each(session, targets, make, done=made.append)
    if made and (as_json or ids_only):
        print_objects(made, as_json=as_json, ids_only=ids_only)
    elif made and no_wait:
        print_begun(made)
    elif made:
        print_list(made, COLUMNS, as_json=False, ids_only=False)
    return status


@click.command("template-build")
@templates_argument
@no_wait_option
@output_options
@socket_option
@pass_session
def template_build(session: Session, /, templates: tuple[str, ...], **output: bool) -> int:
    """Build templates that are built here."""
    return _make_each(session, "template_build", templates, {}, **output)


@click.command("template-warm")
@click.argument("template", shell_complete=complete_from("template_list"))
@click.option("--mem-size", metavar="SIZE", help="Memory of the vms it is for.  [default: 1G]")
@click.option("--cpus", type=int, metavar="N", help="Their processors.  [default: 1]")
@click.option("--disk-size", metavar="SIZE", help="The smallest of their disks.  [default: 10G]")
@no_wait_option
@output_options
@socket_option
@pass_session
def template_warm(
    session: Session,
    /,
    template: str,
    mem_size: str | None,
    cpus: int | None,
    disk_size: str | None,
    **output: bool,
) -> int:
    """Boot a template once, for fast new vms."""
    shape = {"mem_size": mem_size, "cpus": cpus, "disk_size": disk_size}
    return _make_each(session, "template_warm", (template,), shape, **output)


@click.command("template-download")
@templates_argument
@no_wait_option
@output_options
@socket_option
@pass_session
def template_download(session: Session, /, templates: tuple[str, ...], **output: bool) -> int:
    """Download templates their vendor publishes."""
    return _make_each(session, "template_download", templates, {}, **output)


@click.command("template-delete")
@templates_argument
@yes_option
@output_options
@socket_option
@pass_session
def template_delete(session: Session, /, templates: tuple[str, ...], **options: bool) -> int:
    """Delete templates that no disk stands on.

    The warm images of one go with it. What is declared on this box can be made again.
    """
    # Some file systems take long to remove a large file.
    return delete_each(session, "template", templates, silence_seconds=SILENCE_SECONDS, **options)
