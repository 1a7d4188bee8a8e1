"""The command template-import: a template from an image of the user's own."""

import contextlib
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import click

from oscloudctl.job_call import call_job, print_begun
from oscloudctl.output import print_list, print_objects
from oscloudctl.session import (
    Session,
    no_wait_option,
    output_options,
    pass_session,
    socket_option,
)
from oscloudctl.template import COLUMNS, SILENCE_SECONDS
from oscloudctl.upload import STANDARD_INPUT, NotAFileError, Upload

_MAX_NAME_LENGTH = 63
_SUFFIXES = (".qcow2", ".qcow", ".img", ".raw", ".image", ".bin")


@click.command("template-import")
@click.argument("source", metavar="FILE|URL", type=click.Path(allow_dash=True))
@click.option("--name", metavar="NAME", help="The template's name.  [default: the file's]")
@click.option("--sha256", metavar="HEX", help="What sha256sum prints for it; sha512sum's, too.")
@click.option(
    "--format", "image_format", type=click.Choice(["qcow2", "raw"]),
    help="What it is.  [default: told by its bytes]",
)  # fmt: skip
@click.option(
    "--firmware", type=click.Choice(["bios", "uefi"]),
    help="What its boot loader is for.  [default: bios]",
)  # fmt: skip
@click.option(
    "--identity", type=click.Choice(["cloud-init", "dhcp"]),
    help="How its guests learn who they are.  [default: cloud-init]",
)  # fmt: skip
@click.option("--os", metavar="WORDS", help="Its operating system, for lists.  [default: its name]")
@no_wait_option
@output_options
@socket_option
@pass_session
def template_import(
    session: Session,
    source: str,
    name: str | None,
    sha256: str | None,
    image_format: str | None,
    firmware: str | None,
    identity: str | None,
    os: str | None,
    *,
    no_wait: bool,
    as_json: bool,
    ids_only: bool,
) -> None:
    """Make a template of an image you have.

    It is a disk image, qcow2 or raw: a file that you can read, or what is at an http:// or https://
    address, which the daemon downloads itself. The image is kept as it is, once its own bytes have
    shown that it is whole and names no other file.

    With cloud-init in it, its guests get their names, keys and all else. One without is for
    --identity dhcp: its guests are told their address when they ask, and have the accounts and
    keys that are in the image.

    - is standard input. From a pipe, what was cut off can't be told from what is whole but by its
    --sha256.
    """
    is_url = is_address(source)
    if no_wait and not is_url:
        raise click.UsageError("a file is sent by this command: it can't be left alone")
    if source == STANDARD_INPUT and not name:
        raise click.UsageError("what comes on standard input has no name: give --name")
    chosen = name or suggest_name(source)
    with contextlib.ExitStack() as stack:
        upload = None if is_url else stack.enter_context(_open(source))
        where: dict[str, Any] = {"url": source} if upload is None else upload.params
        answer = call_job(
            session, "template_import", subject=chosen, silence_seconds=SILENCE_SECONDS,
            upload=upload, name=chosen, **where,
            sha256=sha256, format=image_format, firmware=firmware,
            identity=identity, os=os, wait=False if no_wait else None,
        )  # fmt: skip
    if as_json or ids_only:
        print_objects([answer], as_json=as_json, ids_only=ids_only)
    elif no_wait:
        print_begun([answer])
    else:
        print_list([answer], COLUMNS, as_json=False, ids_only=False)


def is_address(source: str) -> bool:
    """Tell whether `source` is meant as an address, whether it can be used or not."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def suggest_name(source: str) -> str:
    """Give a name for a template made of this file or address."""
    path = unquote(urlsplit(source).path) if is_address(source) else source
    name = PurePosixPath(path).name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
    return name[:_MAX_NAME_LENGTH]


def _open(source: str) -> Upload:
    try:
        return Upload(source)
    except NotAFileError as error:
        raise click.UsageError(str(error)) from error
