"""The vm commands that look and name: list, info, rename, wait."""

from typing import Any

import click

from oscloudctl.output import Column, make_printable, print_list, print_objects
from oscloudctl.session import (
    Session,
    json_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
    timeout_option,
    vm_argument,
)
from oscloudctl.targets import run_on_each, vms_argument

COLUMNS = (
    Column("ID", "id"),
    Column("NAME", "name"),
    Column("STATE", "state"),
    Column("IP", "ip"),
    Column("CPUS", "cpus"),
    Column("MEMORY", "mem_size"),
    Column("DISK", "disk_size"),
    Column("NETWORK", "network"),
    Column("OS", "os"),
)

# The other states pass by themselves.
_AT_REST = frozenset({"STOPPED", "PAUSED", "CRASHED", "UNRESPONSIVE", "ERROR"})

# A host that has lost its disk has all its vms in trouble.
MAX_TROUBLES = 10

# The daemon needs a moment longer than the wait it was asked for to say that it was in vain.
ANSWER_MARGIN_SECONDS = 15


@click.command("vm-list")
@output_options
@socket_option
@pass_session
def vm_list(session: Session, *, as_json: bool, ids_only: bool) -> None:
    """List the vms."""
    rows = session.call("vm_list")
    if not rows and not as_json and not ids_only:
        click.echo("There is no vm yet. Make one: oscloudctl vm-create web", err=True)
        return
    print_list(rows, COLUMNS, as_json=as_json, ids_only=ids_only)
    if not as_json and not ids_only:
        _print_troubles(rows)


def _print_troubles(rows: list[dict[str, Any]]) -> None:
    """Say why vms are not as they are wanted: below the table, where no program reads it."""
    troubles = [trouble for trouble in map(find_trouble, rows) if trouble]
    for trouble in troubles[:MAX_TROUBLES]:
        click.echo(trouble, err=True)
    if len(troubles) > MAX_TROUBLES:
        click.echo(f"… and {len(troubles) - MAX_TROUBLES} more: see oscloudctl vm-info", err=True)


def find_trouble(vm: dict[str, Any]) -> str | None:
    """Give a sentence about a vm that came to rest in another state than its user wanted."""
    state = vm["state"]
    if state not in _AT_REST or state == vm.get("wanted_state"):
        return None
    return make_printable(f"{vm['name']} is {describe_state(vm)}")


def describe_state(vm: dict[str, Any]) -> str:
    """Put the state of a vm, or of an event about one, into words: what is, was wanted, and why."""
    state, wanted = vm.get("state"), vm.get("wanted_state")
    differs = state in _AT_REST and wanted not in (None, state)
    words = f"{state} (wanted {wanted})" if differs else f"{state}"
    return f"{words}: {vm['reason']}" if vm.get("reason") else words


@click.command("vm-info")
@vms_argument
@output_options
@socket_option
@pass_session
def vm_info(session: Session, vms: tuple[str, ...], *, as_json: bool, ids_only: bool) -> int:
    """Show all there is to know about vms."""
    return show_each(session, "vm", vms, as_json=as_json, ids_only=ids_only)


def show_each(
    session: Session, noun: str, names: tuple[str, ...], *, as_json: bool, ids_only: bool
) -> int:
    """Print the info of each named object of a kind; give the exit status."""
    if not names:
        raise click.UsageError(f"which {noun}? Name one or more")
    found: list[dict[str, Any]] = []
    status = run_on_each(
        session,
        [parse_target(name) for name in names],
        lambda target: session.client.call(f"{noun}_info", {noun: target}),
        done=found.append,
    )
    if found:
        print_objects(found, as_json=as_json, ids_only=ids_only)
    return status


@click.command("vm-rename")
@vm_argument
@click.argument("name", metavar="NEW_NAME")
@json_option
@socket_option
@pass_session
def vm_rename(session: Session, vm: str, name: str, *, as_json: bool) -> None:
    """Give a vm another name."""
    answer = session.call("vm_rename", vm=parse_target(vm), name=name)
    if as_json:
        print_objects([answer], as_json=True)
    else:
        click.echo(f"{vm} is now {answer['name']}")


@click.command("vm-wait")
@vms_argument
@click.option(
    "--state", metavar="STATE",
    help="ready (its ssh server answered), or a state such as RUNNING or STOPPED."
    "  [default: ready]",
)  # fmt: skip
@click.option(
    "--for", "sign", metavar="SIGN",
    help="What the guest shows now: address (it answers at its address), ssh (its ssh server"
    " greets) or port:80 (it accepts connections there); or a state.",
)  # fmt: skip
@timeout_option(60, "Give up after this long.")
@json_option
@socket_option
@pass_session
def vm_wait(
    session: Session,
    vms: tuple[str, ...],
    state: str | None,
    sign: str | None,
    timeout: float,
    *,
    as_json: bool,
) -> int:
    """Wait until vms are ready, in a given state, or answer."""
    if not vms:
        raise click.UsageError("which vm? Name one or more")
    if state is not None and sign is not None:
        raise click.UsageError("--state and --for exclude each other")
    wanted = sign or ("ready" if state is None or state.lower() == "ready" else state.upper())
    given: dict[str, Any] = {"state": wanted} if sign is None else {"for": sign}
    found: list[dict[str, Any]] = []
    status = run_on_each(
        session,
        [parse_target(vm) for vm in vms],
        lambda vm: session.call(
            "vm_wait",
            timeout_seconds=timeout + ANSWER_MARGIN_SECONDS,
            vm=vm,
            **given,
            timeout=timeout,
        ),
        done=found.append,
    )
    if as_json and found:
        print_objects(found, as_json=True)
    elif not as_json:
        for answer in found:
            click.echo(f"{answer['name']}: {wanted}")
    return status
