"""The export commands: what the daemon sends, written to a file or standard output."""

import shlex
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from oscloudctl.download import Download
from oscloudctl.job_call import call_job
from oscloudctl.output import format_size, print_json
from oscloudctl.session import (
    Session,
    complete_from,
    json_option,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_STANDARD_OUTPUT = "-"
# While a disk is flattened the daemon says something at each hundredth of it.
_SILENCE_SECONDS = 1800.0


def _file_argument(function: Decorated) -> Decorated:
    """Add the argument FILE and `--force`."""
    force = click.option("-f", "--force", is_flag=True, help="Replace FILE if there is one.")
    file = click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
    return file(force(function))


@click.command("disk-export")
@click.argument("disk", metavar="DISK", shell_complete=complete_from("disk_list"))
@_file_argument
@click.option(
    "--format", "image_format", type=click.Choice(["qcow2", "raw"]),
    help="What FILE becomes.  [default: qcow2]",
)  # fmt: skip
@json_option
@socket_option
@pass_session
def disk_export(
    session: Session, disk: str, file: str, image_format: str | None, *, force: bool, as_json: bool
) -> None:
    """Write a disk into one file.

    It becomes an image that stands on nothing else. The vm it is of has to be stopped. FILE is
    written by this command, for you alone to read; - is standard output.
    """
    _export(
        session, file, "disk_export", force=force, as_json=as_json,
        disk=parse_target(disk), format=image_format,
    )  # fmt: skip


@click.command("vm-export")
@vm_argument
@_file_argument
@json_option
@socket_option
@pass_session
def vm_export(session: Session, vm: str, file: str, *, force: bool, as_json: bool) -> None:
    """Write a vm into one file, for vm-import.

    That may be on another machine. The vm has to be stopped. The file is a tar with its settings,
    its disks and what it boots with; its guest's keys are in it, so it is for you alone to read. -
    is standard output.
    """
    _export(session, file, "vm_export", force=force, as_json=as_json, vm=parse_target(vm))


def _export(
    session: Session, file: str, method: str, *, force: bool, as_json: bool, **params: Any
) -> None:
    """Call a method that sends something, write that to `file`, and say what it is."""
    to_output = file == _STANDARD_OUTPUT
    if to_output and sys.stdout.isatty():
        raise click.UsageError("this is not for a terminal: name a file, or send it to a program")
    with Download(None if to_output else file, force=force) as download:
        answer = call_job(
            session, method, subject=file, silence_seconds=_SILENCE_SECONDS,
            on_piece=download.write, **params,
        )  # fmt: skip
        download.keep(answer["size"], answer["sha256"])
    if to_output:
        return
    if as_json:
        print_json(answer)
        return
    click.echo(f"{file}: {format_size(answer['size'])}, SHA256 {answer['sha256']}")
    if method == "vm_export":
        click.echo(f"Next: oscloudctl vm-import {shlex.quote(file)}", err=True)
