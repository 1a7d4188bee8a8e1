"""The disk commands that change something: make, attach, detach, grow, delete."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.deletion import delete_each, yes_option
from oscloudctl.output import format_value, print_objects
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

complete_disks = complete_from("disk_list")

# A template that is declared only is made first; one that is built says nothing for minutes.
SILENCE_SECONDS = 1800.0


def disk_argument(function: Decorated) -> Decorated:
    """Add the argument DISK: one id or name."""
    return click.argument("disk", metavar="DISK", shell_complete=complete_disks)(function)


@click.command("disk-create")
@click.argument("name")
@click.option("--size", metavar="SIZE", help="How large, such as 20G.  [default: the template's]")
@click.option(
    "--template", metavar="TEMPLATE", shell_complete=complete_from("template_list"),
    help="Whose system is on it.  [default: it is empty]",
)  # fmt: skip
@output_options
@socket_option
@pass_session
def disk_create(
    session: Session,
    name: str,
    size: str | None,
    template: str | None,
    *,
    as_json: bool,
    ids_only: bool,
) -> None:
    """Make a disk, empty or with a template's system.

    It stays when a vm that had it is deleted.
    """
    if size is None and template is None:
        raise click.UsageError("how large? Give --size, or --template")
    disk = _change(session, "disk_create", name=name, size=size, template=template)
    _show(disk, "made, " + _size_of(disk), as_json=as_json, ids_only=ids_only)
    if not as_json and not ids_only:
        click.echo(f"Next: oscloudctl disk-attach VM {name}", err=True)
        if template is not None:
            click.echo(f"      oscloudctl vm-create NAME --disk {name}", err=True)


@click.command("disk-attach")
@vm_argument
@disk_argument
@output_options
@socket_option
@pass_session
def disk_attach(session: Session, vm: str, disk: str, *, as_json: bool, ids_only: bool) -> None:
    """Give a vm a disk, at once if it runs.

    Its guest finds it as /dev/disk/by-id/virtio-NAME, the first 20 characters of its name.
    """
    answer = _change(session, "disk_attach", vm=parse_target(vm), disk=parse_target(disk))
    where = f"attached to {answer['vm']} as virtio-{answer['serial']}"
    _show(answer, where, as_json=as_json, ids_only=ids_only)


@click.command("disk-detach")
@vm_argument
@disk_argument
@output_options
@socket_option
@pass_session
def disk_detach(session: Session, vm: str, disk: str, *, as_json: bool, ids_only: bool) -> None:
    """Take a disk from a vm, at once if it runs.

    Unmount it in the guest first: Linux lets go of a disk whose file systems are mounted, too.
    """
    answer = _change(session, "disk_detach", vm=parse_target(vm), disk=parse_target(disk))
    _show(answer, f"detached from {vm}", as_json=as_json, ids_only=ids_only)


@click.command("disk-resize")
@disk_argument
@click.argument("size")
@output_options
@socket_option
@pass_session
def disk_resize(session: Session, disk: str, size: str, *, as_json: bool, ids_only: bool) -> None:
    """Make a disk larger, at once if its vm runs.

    None can be made smaller. The file system of a root disk grows at the guest's next boot, or by
    resize2fs in the guest.
    """
    answer = _change(session, "disk_resize", disk=parse_target(disk), size=size)
    _show(answer, "has " + _size_of(answer), as_json=as_json, ids_only=ids_only)


@click.command("disk-delete")
@click.argument("disks", metavar="DISK...", nargs=-1, shell_complete=complete_disks)
@yes_option
@output_options
@socket_option
@pass_session
def disk_delete(session: Session, /, disks: tuple[str, ...], **options: bool) -> int:
    """Delete disks that no vm has."""
    return delete_each(session, "disk", disks, **options)


def _change(session: Session, method: str, **params: Any) -> dict[str, Any]:
    from oscloudctl.job_call import call_job

    answer: dict[str, Any] = call_job(session, method, silence_seconds=SILENCE_SECONDS, **params)
    return answer


def _show(disk: dict[str, Any], what: str, *, as_json: bool, ids_only: bool) -> None:
    if as_json or ids_only:
        print_objects([disk], as_json=as_json, ids_only=ids_only)
    else:
        click.echo(f"{disk['name']}: {what}")


def _size_of(disk: dict[str, Any]) -> str:
    return format_value("size", disk["size"])
