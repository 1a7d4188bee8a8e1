"""`vm-create`: one name is enough, everything else has a default."""

import sys
from typing import Any

import click

from oscloudctl.job_call import call_job, print_begun
from oscloudctl.nic import network_option, read_networks
from oscloudctl.output import print_objects
from oscloudctl.session import (
    Session,
    complete_from,
    no_wait_option,
    output_options,
    parse_target,
    pass_session,
    socket_option,
)
from oscloudctl.vm_set import bandwidth_option, policy_options
from oscloudd.errors import InvalidArgumentError

DEFAULT_IMAGE = "debian_12"

# The daemon bounds the boot itself and says why it failed; this only bounds a daemon that hangs.
SILENCE_SECONDS = 900.0


wait_option = click.option(
    "--wait", type=click.Choice(["none", "started", "ready"]),
    help="Come back when its ssh server answers, when qemu runs, or at once.  [default: ready]",
)  # fmt: skip


@click.command("vm-create")
@click.argument("name")
@click.option(
    "--image", metavar="TEMPLATE", shell_complete=complete_from("template_list"),
    help=f"The template it is made from.  [default: {DEFAULT_IMAGE}]",
)  # fmt: skip
@network_option(
    "The network it is in; several times for a card in each, the first of which has the way"
    ' out.  [default: "default"]'
)
@click.option("--mem-size", metavar="SIZE", help="Memory, such as 512M.  [default: 1G]")
@click.option("--disk-size", metavar="SIZE", help="Disk, such as 20G.  [default: 10G]")
@click.option(
    "--disk", metavar="DISK", shell_complete=complete_from("disk_list"),
    help="Begin on this disk, made by disk-create --template, in place of a new one.",
)  # fmt: skip
@click.option("--cpus", type=int, metavar="N", help="Virtual processors.  [default: 1]")
@click.option("--ip", metavar="ADDRESS", help="Its (first) address.  [default: the next free one]")
@click.option(
    "--ssh-key", "ssh_keys", multiple=True, metavar="FILE",
    help="A public key that may log in as root; several times for several."
    "  [default: ~/.ssh/id_*.pub, or a key made for this]",
)  # fmt: skip
@click.option("--no-ssh-key", is_flag=True, help="Put no key in.")
@click.option("--password", metavar="WORD", help='Root\'s password; "-" asks for it.')
@click.option(
    "--user-data", metavar="FILE", help='For cloud-init, cloud-config or script; "-" is stdin.'
)
@click.option(
    "--publish", multiple=True, metavar="HOSTPORT:GUESTPORT",
    help="Forward a port of this host to it, such as 8080:80 or 0.0.0.0:5353:53/udp, where"
    " 0.0.0.0 is for everybody; several times for several.  [address: 127.0.0.1]",
)  # fmt: skip
@policy_options
@bandwidth_option
@click.option(
    "--warm", type=click.Choice(["auto", "off", "only"]),
    help="Begin where a template that was booted once stands: if there is one, never, or not at"
    " all without.  [default: auto]",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show how long each stage took.")
@wait_option
@no_wait_option
@output_options
@socket_option
@pass_session
def vm_create(
    session: Session,
    /,
    name: str,
    ssh_keys: tuple[str, ...],
    password: str | None,
    user_data: str | None,
    image: str | None,
    disk: str | None,
    wait: str | None,
    publish: tuple[str, ...],
    networks: tuple[str, ...],
    *,
    no_ssh_key: bool,
    no_wait: bool,
    verbose: bool,
    as_json: bool,
    ids_only: bool,
    **params: Any,
) -> None:
    """Make a vm and start it; a name alone is enough."""
    if disk is None:
        params["image"] = image or DEFAULT_IMAGE
    else:
        params |= {"image": image, "disk": parse_target(disk)}
    params["ssh_key"] = _read_keys(ssh_keys, no_ssh_key=no_ssh_key)
    params["password"] = _read_password(password)
    params["publish"] = list(publish) or None
    params["network"] = read_networks(networks)
    params["user_data"] = _read_user_data(user_data)
    chosen = choose_wait(wait, no_wait=no_wait)
    answer = call_job(
        session, "vm_create", silence_seconds=SILENCE_SECONDS, name=name, wait=chosen, **params
    )
    print_made(answer, chosen, as_json=as_json, ids_only=ids_only, verbose=verbose)


def print_made(
    answer: dict[str, Any], wait: str, *, as_json: bool, ids_only: bool, verbose: bool = False
) -> None:
    """Print a new vm as asked for, or the job that makes it, and what to do next."""
    if as_json or ids_only:
        print_objects([answer], as_json=as_json, ids_only=ids_only)
    elif wait == "none":
        print_begun([answer])
    else:
        print_objects([answer], as_json=False)
        if verbose:
            _print_timings(answer)
        _print_next(answer["name"], wait)


def _print_timings(vm: dict[str, Any]) -> None:
    for stage, seconds in (vm.get("timings") or {}).items():
        click.echo(f"{stage:>10}  {seconds * 1000:8.0f} ms", err=True)


def choose_wait(wait: str | None, *, no_wait: bool) -> str:
    """Give the method's `wait` for `--wait` and `--no-wait`; raises UsageError for both."""
    if no_wait and wait not in (None, "none"):
        raise click.UsageError(f"--no-wait and --wait {wait} exclude each other")
    return "none" if no_wait else wait or "ready"


def _read_keys(ssh_keys: tuple[str, ...], *, no_ssh_key: bool) -> list[str] | None:
    from oscloudctl.keys import ensure_default_keys, read_public_key

    if no_ssh_key and ssh_keys:
        raise click.UsageError("--ssh-key and --no-ssh-key exclude each other")
    if no_ssh_key:
        return None
    return [read_public_key(key) for key in ssh_keys] or ensure_default_keys()


def _read_password(given: str | None) -> str | None:
    if given != "-":
        return given
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    word: str = click.prompt("Root's password", hide_input=True, confirmation_prompt=True, err=True)
    return word


def _read_user_data(given: str | None) -> str | None:
    if given is None:
        return None
    try:
        with click.open_file(given, encoding="utf-8") as file:
            text: str = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        message = f"can't read the user data {given}: {reason}"
        raise InvalidArgumentError(message, hint="name a cloud-config file") from error
    return text


def _print_next(name: str, wait: str) -> None:
    if wait != "ready":
        click.echo(f"Next: oscloudctl vm-wait {name}", err=True)
        return
    click.echo(f"Next: oscloudctl vm-ssh {name}", err=True)
    click.echo(f"      oscloudctl vm-console {name}   (Ctrl-] leaves)", err=True)
    click.echo(f"      oscloudctl vm-stop {name}", err=True)
