"""The command vm-import: a vm from a file that vm-export wrote."""

import click

from oscloudctl.job_call import call_job
from oscloudctl.output import print_list, print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    output_options,
    parse_target,
    pass_session,
    socket_option,
)
from oscloudctl.upload import NotAFileError, Upload
from oscloudctl.vm import COLUMNS

# The daemon looks at the whole of a disk before it answers.
_SILENCE_SECONDS = 1800.0


@click.command("vm-import")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--name", metavar="NAME", help="What it is to be called.  [default: as it was]")
@click.option(
    "--network", metavar="NETWORK", shell_complete=complete_from("network_list"),
    help="The network it is to be in, by id or name.  [default: as it was]",
)  # fmt: skip
@click.option(
    "--new-identity", is_flag=True, help="Have its guest told at its next boot that it is another."
)
@output_options
@socket_option
@pass_session
def vm_import(
    session: Session,
    file: str,
    name: str | None,
    network: str | None,
    *,
    new_identity: bool,
    as_json: bool,
    ids_only: bool,
) -> None:
    """Make a stopped vm of a file that vm-export wrote.

    It has the contents and the identity it had: address, MAC, ssh host keys. Where another vm has
    its address it is refused, unless with --new-identity, which leaves nothing as it was but the
    contents and who may log in. A data disk whose name another has is given another one.

    - is standard input, for what another machine sends: ssh HOST oscloudctl vm-export VM - |
    oscloudctl vm-import -
    """
    try:
        upload = Upload(file)
    except NotAFileError as error:
        raise click.UsageError(str(error)) from error
    with upload:
        vm = call_job(
            session, "vm_import", subject=name or upload.params["file_name"],
            silence_seconds=_SILENCE_SECONDS, upload=upload, **upload.params, name=name,
            network=None if network is None else parse_target(network),
            new_identity=new_identity or None,
        )  # fmt: skip
    if as_json or ids_only:
        print_objects([vm], as_json=as_json, ids_only=ids_only)
        return
    print_list([vm], COLUMNS, as_json=False, ids_only=False)
    click.echo(f"Next: oscloudctl vm-start {vm['name']}", err=True)
