"""`make up`: from a checkout with a `.venv` to a vm whose ssh server answers.

May be run again at any time: does what is missing, says what is there already. Leaves stopping to
down.py and installing to `install`.
"""

import argparse
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import namespace
from checkout import (
    KEY,
    KNOWN_HOSTS,
    LOGS,
    NAMESPACE_FILE,
    RUN,
    SOCKET,
    VENV,
    ensure_config,
    read_listen,
    read_namespace,
)
from control import call, control, show_info
from services import DAEMON, SHIM, start_daemon, start_shim
from stages import CheckoutError, run, run_command, say

DEFAULT_IMAGE = "debian_12"

# A cold first boot under emulation on a busy machine.
READY_SECONDS = 300

_DOWN = ("STOPPED", "SUSPENDED", "CRASHED", "ERROR")


def main() -> int:
    """Be the program."""
    parser = argparse.ArgumentParser(prog="make up", description=__doc__)
    parser.add_argument("--netns", default="", help="the network namespace to put everything into")
    parser.add_argument("--image", default="", help=f"the vm's template, {DEFAULT_IMAGE} if none")
    parser.add_argument("--vm", default="my_vm", help="the vm to make")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        raise CheckoutError("bridges, taps and namespaces are made by root", "sudo make up")
    with locked():
        return bring_up(chosen.netns, chosen.image, chosen.vm)


@contextmanager
def locked() -> Iterator[None]:
    """Keep a second `make up`, `down` or `clean` of this checkout waiting."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (RUN / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def bring_up(netns: str, image: str, vm: str) -> int:
    """Do it all, step by step; give the exit status."""
    ran = bool(DAEMON.find_pid() and SHIM.find_pid())
    chosen = choose_namespace(netns)
    if chosen:
        namespace.bring_up(namespace.check_name(chosen))
    NAMESPACE_FILE.write_text(f"{chosen}\n", encoding="utf-8")
    config = ensure_config()
    start_daemon(chosen)
    start_shim(chosen, *read_listen(config))
    key_made = ensure_key()
    vm_changed = ensure_vm(vm, image)
    info = find_vm(vm)
    if info is None:
        raise CheckoutError(f"{vm} was deleted by somebody else meanwhile", "make up")
    write_known_hosts(info)
    show(info, chosen, config)
    if ran and not key_made and not vm_changed:
        say("\nEverything was there already; nothing was changed.")
    return 0


def choose_namespace(wanted: str) -> str:
    """Give the namespace to use: the one asked for, or that of the last `make up`.

    Raises CheckoutError where something still runs in another one: it would be torn in two.
    """
    last = read_namespace()
    if last is None or wanted in ("", last):
        return wanted or last or ""
    in_use = bool(DAEMON.find_pid() or SHIM.find_pid())
    if last and namespace.exists(last):
        in_use = in_use or bool(run(["ip", "netns", "pids", last]).strip())
    if in_use:
        where = f"in the namespace {last}" if last else "in the host's own network"
        raise CheckoutError(f"this checkout runs {where}, not in {wanted}",
                            f"make down && make up NETNS={wanted}")  # fmt: skip
    if last:
        namespace.take_down(last)
    return wanted


def ensure_key() -> bool:
    """Make the key pair the vm lets in, if there is none; tell whether it was made."""
    if KEY.exists():
        return False
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "oscloud-checkout", "-f", str(KEY)])
    return True


def ensure_vm(vm: str, image: str) -> bool:
    """Make or start the vm as needed; tell whether anything was done."""
    info = find_vm(vm)
    if info is None:
        create_vm(vm, image or DEFAULT_IMAGE)
        return True
    if image and info["os"] != image:
        say(f"{vm}: was made from {info['os']}; for another: make up IMAGE={image} VM=other")
    state = info["state"]
    if state == "RUNNING" and info["ready"]:
        say(f"{vm}: already running (process {info['pid']})")
        return False
    if state == "PAUSED":
        say(f"{vm}: is paused and stays so; go on with: oscloudctl vm-resume {vm}")
        return False
    if state in _DOWN:
        say(f"{vm}: {state.lower()}; starting it")
        control("vm-start", vm)
    say(f"{vm}: waiting for its ssh server")
    control("vm-wait", vm, "--timeout", str(READY_SECONDS))
    return True


def find_vm(vm: str) -> dict[str, Any] | None:
    """Give the vm's info, or None if there is no such vm."""
    return _first(call("vm-info", vm))


def create_vm(vm: str, image: str) -> None:
    """Make the template if need be, then the vm."""
    template = _first(call("template-info", image))
    if template is None:
        raise CheckoutError(f"there is no template {image!r}", "see: make ctl ARGS=template-list")
    if template["state"] != "READY":
        verb = "download" if template["source"] == "download" else "build"
        say(f"Template {image}: not here yet; this {verb} is done once")
        control(f"template-{verb}", image)
    say(f"Making the vm {vm} from {image}")
    control("vm-create", vm, "--image", image, "--ssh-key", f"{KEY}.pub", "-q")


def _first(answer: Any) -> dict[str, Any] | None:
    found: dict[str, Any] | None = answer[0] if isinstance(answer, list) and answer else answer
    return found


def write_known_hosts(info: dict[str, Any]) -> None:
    """Put the vm's host keys where the printed ssh command looks: no question, no trust in luck."""
    keys = [" ".join(key.split()[:2]) for key in info.get("ssh_host_keys") or []]
    text = "".join(f"{info['ip']} {key}\n" for key in keys)
    if not KNOWN_HOSTS.exists() or KNOWN_HOSTS.read_text(encoding="ascii") != text:
        KNOWN_HOSTS.write_text(text, encoding="ascii")


def show(info: dict[str, Any], netns: str, config: dict[str, Any]) -> None:
    """Print the vm's info, how to log in, and what to type next."""
    say("")
    show_info(info["name"])
    inside = f"ip netns exec {netns} " if netns else ""
    password = config.get("guest", {}).get("root_password", "123456")
    login = f"or with the password {password}" if password else "the key only"
    host, port = read_listen(config)
    say(f"""
Log in ({login}):
    {inside}ssh -i .run/id_ed25519 -o UserKnownHostsFile=.run/known_hosts root@{info["ip"]}

Next:
    export OSCLOUD_SOCKET={shlex.quote(str(SOCKET))} PATH={shlex.quote(str(VENV / "bin"))}:$PATH
    oscloudctl vm-list
    oscloudctl vm-console {info["name"]}        # Ctrl-] leaves
    oscloudctl vm-create web
    {inside}curl http://{host}:{port}/vm_list
    make down                        # stops all of it; the vm's disk stays""")


if __name__ == "__main__":
    sys.exit(run_command(main))
