"""The command vm-publish: a template from a vm."""

import click

from oscloudctl.job_call import call_job, print_begun
from oscloudctl.output import print_list, print_objects
from oscloudctl.session import (
    Session,
    no_wait_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)
from oscloudctl.template import COLUMNS, SILENCE_SECONDS


@click.command("vm-publish")
@vm_argument
@click.argument("template", metavar="TEMPLATE")
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_publish(
    session: Session, vm: str, template: str, *, no_wait: bool, as_json: bool, ids_only: bool
) -> None:
    """Make a template of a stopped vm.

    Vms made from it begin with all that is on its disk, and with a name, an address, keys and a
    password of their own. The vm stays as it is.
    """
    made = call_job(
        session, "vm_publish", subject=template, silence_seconds=SILENCE_SECONDS,
        vm=parse_target(vm), template=template, wait=False if no_wait else None,
    )  # fmt: skip
    if as_json or ids_only:
        print_objects([made], as_json=as_json, ids_only=ids_only)
    elif no_wait:
        print_begun([made])
    else:
        print_list([made], COLUMNS, as_json=False, ids_only=False)
        click.echo(f"Next: oscloudctl vm-create NAME --image {template}", err=True)
