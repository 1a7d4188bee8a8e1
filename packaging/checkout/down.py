"""`make down` and `make clean`: stop what `make up` started, remove what it made.

`down` leaves the disks; `clean` leaves nothing but the Debian packages and the system users.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import namespace
from checkout import NAMESPACE_FILE, ROOT, RUN, VENV, read_namespace
from control import call, control
from services import DAEMON, SHIM, STOP_SECONDS, start_daemon
from stages import CheckoutError, run, run_command, say, stage
from supervised import Supervised
from up import locked

# A daemon that was installed has the same tables; they are not ours to remove.
_SYSTEM_SOCKET = Path("/run/oscloud/oscloudd.sock")

_TABLES = ("inet oscloud", "bridge oscloud", "ip oscloud_ports", "netdev oscloud_rates")
_CACHES = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist")


def main() -> int:
    """Be the program."""
    parser = argparse.ArgumentParser(prog="make down", description=__doc__)
    parser.add_argument("--clean", action="store_true", help="remove what was made, too")
    clean: bool = parser.parse_args().clean
    if not RUN.exists():
        say("There is no .run: nothing was started")
    elif os.geteuid() != 0:
        raise CheckoutError("what root started, root has to stop", "sudo make down")
    else:
        with locked():
            take_down(clean=clean)
    if clean:
        remove_made()
    return 0


def take_down(*, clean: bool) -> None:
    """Stop the vms, the shim and the daemon, and remove the namespace if it is ours."""
    netns = read_namespace() or ""
    if DAEMON.find_pid() is None and find_orphans():
        say("The daemon is gone and its vms are not; it is started to stop them in order")
        start_daemon(netns)
    bridges: list[str] = []
    if DAEMON.find_pid():
        bridges = [str(network["bridge"]) for network in _rows(call("network-list"))]
        stop_vms()
    stop(SHIM)
    stop(DAEMON)
    if netns:
        namespace.take_down(netns)
    elif clean:
        remove_leftovers(bridges)
    NAMESPACE_FILE.unlink(missing_ok=True)


def stop_vms() -> None:
    """Stop every vm that runs, each in order; raise CheckoutError if one would not."""
    running = [str(vm["name"]) for vm in _rows(call("vm-list")) if vm["pid"]]
    if not running:
        say("No vm runs")
        return
    with stage(f"Stopping {', '.join(running)}"):
        control("vm-stop", "--all")


def stop(program: Supervised) -> None:
    """Stop one of our two programs, saying so."""
    pid = program.find_pid()
    if pid is None:
        program.stop(STOP_SECONDS)
        say(f"{program.name}: does not run")
        return
    with stage(f"Stopping {program.name}"):
        program.stop(STOP_SECONDS)


def find_orphans() -> list[int]:
    """Give the pids of the vms that are left running by a daemon that was killed.

    A qemu of ours sits in its run directory; a number that went to another process does not.
    """
    found = []
    for pid_file in RUN.glob("run/vms/*/qemu.pid"):
        try:
            pid = int(pid_file.read_text(encoding="ascii"))
            ours = Path("/proc", str(pid), "cwd").samefile(pid_file.parent)
        except (OSError, ValueError):
            continue
        if ours:
            found.append(pid)
    return found


def remove_leftovers(bridges: list[str]) -> None:
    """Remove our bridges and our nft tables from the host's own network."""
    present = json.loads(run(["ip", "-json", "link", "show", "type", "bridge"]) or "[]")
    for link in present:
        if link.get("ifname") in bridges and link.get("ifalias") == "oscloud":
            run(["ip", "link", "delete", link["ifname"]])
    if not _SYSTEM_SOCKET.exists():
        for table in _TABLES:
            run(["nft", "-f", "-"], input_text=f"add table {table}\ndelete table {table}\n")


def remove_made() -> None:
    """Remove `.run`, `.venv` and what the tools leave behind."""
    for path in (RUN, VENV, *(ROOT / name for name in _CACHES), *ROOT.glob("*.egg-info")):
        if path.exists():
            shutil.rmtree(path)
            say(f"Removed {path.relative_to(ROOT)}")
    for cache in ROOT.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)
    say("The Debian packages and the users oscloud-qemu and oscloud-http stay")


def _rows(answer: Any) -> list[dict[str, Any]]:
    return list(answer or [])


if __name__ == "__main__":
    sys.exit(run_command(main))
