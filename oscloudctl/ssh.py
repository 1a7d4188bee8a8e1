"""The system's ssh, told what we know: address, user, the guest's own host keys.

Pure but for the file of known hosts, which it owns in the user's cache.
"""

import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oscloudd.errors import InvalidStateError


def build_known_hosts(address: str, host_keys: Sequence[str]) -> str:
    """Give the lines of a known_hosts file for one guest."""
    return "".join(f"{address} {' '.join(key.split()[:2])}\n" for key in host_keys)


def build_arguments(
    address: str,
    *,
    user: str,
    known_hosts: Path | None,
    identities: Sequence[Path],
    command: Sequence[str],
) -> list[str]:
    """Give ssh's argument vector.

    One word of command is shell text, as with ssh itself; several are one command whose words
    arrive as they are. Without host keys the first connection is trusted, and only that.
    """
    argv = ["ssh"]
    for name, value in _trust(known_hosts).items():
        argv += ["-o", f"{name}={value}"]
    for identity in identities:
        argv += ["-i", str(identity)]
    argv += ["-l", user, "--", address]
    if command:
        argv.append(command[0] if len(command) == 1 else shlex.join(command))
    return argv


def build_config(
    vm: dict[str, Any], *, user: str, known_hosts: Path | None, identities: Sequence[Path]
) -> str:
    """Give the part of an ssh_config(5) by which ssh alone finds a vm, as NAME.oscloud."""
    name = vm["name"]
    # As the guest itself is called, and found by name.
    names = dict.fromkeys([name, name.lower().replace("_", "-").rstrip("-")])
    settings = {"HostName": vm["ip"], "User": user, **_trust(known_hosts)}
    lines = [f"Host {' '.join(f'{each}.oscloud' for each in names)}"]
    lines += [f"    {setting} {value}" for setting, value in settings.items()]
    lines += [f"    IdentityFile {_quote_option(identity)}" for identity in identities]
    return "\n".join([*lines, ""])


def _trust(known_hosts: Path | None) -> dict[str, str]:
    """Give the options by which ssh trusts the guest's own keys, and no others."""
    if known_hosts is None:
        return {"StrictHostKeyChecking": "accept-new"}
    return {
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": _quote_option(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
    }


def write_known_hosts(vm: dict[str, Any]) -> Path | None:
    """Write the guest's host keys where ssh can read them; None if the daemon knows none.

    Written anew each time and renamed into place: an id can come back with other keys.
    """
    keys = vm.get("ssh_host_keys") or []
    if not keys:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oscloud"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"known_hosts-{vm['id']}-{vm['ip']}"
    with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
        file.write(build_known_hosts(vm["ip"], keys))
    Path(file.name).replace(path)
    return path


def check_reachable(vm: dict[str, Any]) -> str:
    """Give the address of a running vm; raise InvalidStateError for any other."""
    name, state = vm["name"], vm["state"]
    if state not in {"RUNNING", "STARTING", "CREATING", "UNRESPONSIVE"} or not vm.get("ip"):
        verb = "vm-resume" if state in {"PAUSED", "SUSPENDED"} else "vm-start"
        raise InvalidStateError(
            f"vm {name} is {state}: nobody answers there", hint=f"first: oscloudctl {verb} {name}"
        )
    address: str = vm["ip"]
    return address


def _quote_option(path: Path) -> str:
    # ssh_config(5): arguments with blanks in double quotes; % begins a token.
    return '"' + str(path).replace("%", "%%").replace('"', '\\"') + '"'
