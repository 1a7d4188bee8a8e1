"""`vm-clone`: another vm with the same on its disk."""

from typing import Any

import click

from oscloudctl.job_call import call_job
from oscloudctl.session import (
    Session,
    no_wait_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)
from oscloudctl.snapshot import complete_snapshots
from oscloudctl.vm_create import SILENCE_SECONDS, choose_wait, print_made, wait_option


@click.command("vm-clone")
@vm_argument
@click.argument("name")
@click.option(
    "--snapshot", metavar="SNAPSHOT", shell_complete=complete_snapshots,
    help="Begin with this snapshot of the vm.  [default: its disk as it is now]",
)  # fmt: skip
@click.option("--mem-size", metavar="SIZE", help="Memory, such as 512M.  [default: the vm's]")
@click.option("--disk-size", metavar="SIZE", help="Disk, such as 20G.  [default: the vm's]")
@click.option("--cpus", type=int, metavar="N", help="Virtual processors.  [default: the vm's]")
@click.option("--ip", metavar="ADDRESS", help="Its address.  [default: the next free one]")
@wait_option
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_clone(
    session: Session,
    /,
    vm: str,
    wait: str | None,
    *,
    no_wait: bool,
    as_json: bool,
    ids_only: bool,
    **params: Any,
) -> None:
    """Make a vm with another one's disk, and start it.

    It is somebody else: name, address and host key are its own, and who may log in is as in the
    other. That one goes on; both stand on what its disk had, and so take up little room at first.
    """
    chosen = choose_wait(wait, no_wait=no_wait)
    answer = call_job(
        session, "vm_clone", silence_seconds=SILENCE_SECONDS,
        vm=parse_target(vm), wait=chosen, **params,
    )  # fmt: skip
    print_made(answer, chosen, as_json=as_json, ids_only=ids_only)
