"""The commands that reach into a vm: ssh, console, log, and qemu's monitor."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from oscloudctl.output import make_printable, print_guest_text, print_json
from oscloudctl.session import (
    Session,
    complete_from,
    json_option,
    parse_target,
    pass_session,
    socket_option,
    vm_argument,
)
from oscloudd.errors import HostError, InvalidArgumentError


@click.command(
    "vm-ssh", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--user", default="root", show_default=True, help="Who to log in as.")
@click.option(
    "-i", "--identity", "identities", multiple=True, metavar="FILE", help="A private key to use."
)
@socket_option
@vm_argument
@click.argument("command", metavar="[COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@pass_session
def vm_ssh(
    session: Session, vm: str, user: str, identities: tuple[str, ...], command: tuple[str, ...]
) -> None:
    """Log in to a vm, or run a command in it, by ssh.

    Options come before VM; what follows VM is the command, dashes and blanks and all. A single word
    is shell text: vm-ssh web 'ps | wc -l'.
    """
    from oscloudctl.keys import list_identities
    from oscloudctl.ssh import build_arguments, check_reachable, write_known_hosts

    info = session.call("vm_info", vm=parse_target(vm))
    argv = build_arguments(
        check_reachable(info),
        user=user,
        known_hosts=write_known_hosts(info),
        identities=[Path(each) for each in identities] or list_identities(),
        command=command[1:] if command[:1] == ("--",) else command,
    )
    session.client.close()
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - not having a shell in between is the point
    except FileNotFoundError as error:
        hint = "sudo apt install openssh-client"
        raise HostError("there is no ssh on this machine", hint=hint) from error


@click.command("vm-ssh-config")
@click.option("--user", default="root", show_default=True, help="Who to log in as.")
@socket_option
@click.argument("vms", metavar="[VM...]", nargs=-1, shell_complete=complete_from("vm_list"))
@pass_session
def vm_ssh_config(session: Session, vms: tuple[str, ...], user: str) -> None:
    """Print how ssh alone finds vms: ~/.ssh/config.

    It is of all vms, or of those that are named. As a file that ~/.ssh/config includes, it lets
    "ssh web.oscloud", scp and rsync find them and know their keys:

    \b
        oscloudctl vm-ssh-config >~/.ssh/oscloud
        sed -i '1i Include oscloud' ~/.ssh/config
    """
    from oscloudctl.keys import list_identities
    from oscloudctl.ssh import build_config, write_known_hosts

    if vms:
        infos = [session.call("vm_info", vm=parse_target(vm)) for vm in vms]
    else:
        infos = session.call("vm_list")
    identities = list_identities()
    parts = [
        build_config(info, user=user, known_hosts=write_known_hosts(info), identities=identities)
        for info in infos
    ]
    click.echo("\n".join(parts), nl=False)


@click.command("vm-console")
@vm_argument
@socket_option
@pass_session
def vm_console(session: Session, vm: str) -> None:
    """Attach the terminal to a vm's serial console.

    Ctrl-] leaves; the vm goes on, and so does whoever is logged in there.
    """
    from oscloudctl.console import attach

    raw = session.client.upgrade("vm_console", {"vm": parse_target(vm)})
    terminal = sys.stdin.isatty()
    if terminal:
        click.echo(f"Console of {vm}. Ctrl-] leaves.", err=True)
    tail = str(raw.answer.get("log_tail") or "").encode()
    left = attach(
        raw.stream,
        tail + raw.unread,
        input_fd=sys.stdin.fileno(),
        output_fd=sys.stdout.fileno(),
    )
    if terminal:
        click.echo("\nLeft the console." if left else "\nThe console was closed.", err=True)


@click.command("vm-log")
@vm_argument
@click.option("-n", "--lines", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--source", type=click.Choice(["console", "qemu"]), default="console", show_default=True,
    help="What the guest printed, or what qemu said.",
)  # fmt: skip
@click.option("-f", "--follow", is_flag=True, help="Go on showing the console as it prints.")
@json_option
@socket_option
@pass_session
def vm_log(
    session: Session, vm: str, lines: int, source: str, *, follow: bool, as_json: bool
) -> None:
    """Show what a vm printed on its console, or qemu said."""
    if follow:
        if source != "console" or as_json:
            raise click.UsageError("--follow shows the console only, and as text")
        _follow_console(session, vm, lines)
        return
    answer = session.call("vm_log", vm=parse_target(vm), source=source, lines=lines)
    if as_json:
        print_json(answer)
    else:
        print_guest_text(answer["text"])


def _follow_console(session: Session, vm: str, lines: int) -> None:
    from oscloudctl.console import follow

    raw = session.client.upgrade("vm_console", {"vm": parse_target(vm)})
    tail = str(raw.answer.get("log_tail") or "").splitlines(keepends=True)[-lines:]
    harmless = sys.stdout.isatty()

    def write(received: bytes) -> None:
        text = received.decode(errors="replace")
        click.echo(make_printable(text) if harmless else text, nl=False, color=True)

    with raw.stream:
        follow(raw.stream, "".join(tail).encode() + raw.unread, write)


@click.command("vm-qemu-command")
@vm_argument
@click.argument("command")
@click.argument("arguments", metavar="[JSON]", required=False)
@socket_option
@pass_session
def vm_qemu_command(session: Session, vm: str, command: str, arguments: str | None) -> None:
    """Send a QMP command to a vm's qemu.

    COMMAND is QMP's name, such as query-status; JSON an object with its arguments. Qemu's answer is
    printed as JSON.
    """
    print_json(
        session.call(
            "vm_qemu_command",
            vm=parse_target(vm),
            command=command,
            arguments=_parse_object(arguments) if arguments else {},
        )
    )


def _parse_object(text: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_arguments(text) from error
    if not isinstance(value, dict):
        raise _bad_arguments(text)
    return value


def _bad_arguments(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"arguments {text!r:.80} are no JSON object", hint="""for example: '{"device": "disk0"}'"""
    )
