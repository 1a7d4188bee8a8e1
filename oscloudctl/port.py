"""The commands of forwarded ports."""

from typing import Any

import click

from oscloudctl.output import Column, print_list, print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    complete_vms,
    json_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)
from oscloudctl.targets import run_on_each

COLUMNS = (
    Column("NAME", "name"),
    Column("VM", "vm"),
    Column("GUEST", "guest_address"),
    Column("GUEST_PORT", "guest_port"),
)


@click.command("port-add")
@vm_argument
@click.argument("ports", metavar="[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|udp]...", nargs=-1)
@json_option
@socket_option
@pass_session
def port_add(session: Session, vm: str, ports: tuple[str, ...], *, as_json: bool) -> int:
    """Let ports of the host lead to a vm.

    Without ADDRESS only the host itself reaches them; 0.0.0.0 is for everybody.
    """
    if not ports:
        raise click.UsageError("which port? Name one or more, as in 8080:80")
    target = parse_target(vm)
    return _run_on_each(
        session,
        ports,
        lambda port: session.call("port_add", vm=target, port=port),
        "leads to",
        as_json=as_json,
    )


@click.command("port-list")
@click.argument("vm", metavar="[VM]", required=False, shell_complete=complete_vms)
@output_options
@socket_option
@pass_session
def port_list(session: Session, vm: str | None, *, as_json: bool, ids_only: bool) -> None:
    """List the forwarded ports."""
    rows = session.call("port_list", vm=None if vm is None else parse_target(vm))
    if not rows and not as_json and not ids_only:
        click.echo("No port is forwarded. Forward one: oscloudctl port-add web 8080:80", err=True)
        return
    print_list(rows, COLUMNS, as_json=as_json, ids_only=ids_only)


@click.command("port-delete")
@click.argument(
    "ports", metavar="[ADDRESS:]HOSTPORT[/tcp|udp]...", nargs=-1,
    shell_complete=complete_from("port_list"),
)  # fmt: skip
@json_option
@socket_option
@pass_session
def port_delete(session: Session, ports: tuple[str, ...], *, as_json: bool) -> int:
    """Let ports of the host lead nowhere."""
    if not ports:
        raise click.UsageError("which port? Name one or more; see: oscloudctl port-list")
    return _run_on_each(
        session,
        ports,
        lambda port: session.call("port_delete", port=port),
        "leads no longer to",
        as_json=as_json,
    )


def _run_on_each(
    session: Session, ports: tuple[str, ...], call: Any, verb: str, *, as_json: bool
) -> int:
    found: list[dict[str, Any]] = []

    def done(answer: dict[str, Any]) -> None:
        found.append(answer)
        if not as_json:
            click.echo(f"{answer['name']} {verb} port {answer['guest_port']} of {answer['vm']}")

    status = run_on_each(session, list(ports), call, done=done)
    if found and as_json:
        print_objects(found, as_json=True)
    return status
