"""Why there is no connection to the daemon, and what would help: one sentence each.

Tells apart a daemon that is down, a path that is wrong, and a user who may not. Standard library
only, as its user `client.py`.
"""

import grp
import os
import pwd
from pathlib import Path

from oscloudd.errors import DaemonUnreachableError

DEFAULT_SOCKET = "/run/oscloud/oscloudd.sock"
CHECKOUT_SOCKET = ".run/oscloudd.sock"
GROUP = "oscloud"

_START = "start it with: systemctl start oscloudd (and see: journalctl -u oscloudd)"


def explain(error: OSError, path: str) -> DaemonUnreachableError:
    """Turn the error of connecting to `path` into the one for the user."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        message = f"there is no socket {path}: the daemon is not running, or the path is wrong"
        return DaemonUnreachableError(message, hint=_find_other(path) or _START)
    if isinstance(error, ConnectionRefusedError):
        message = f"nobody listens on {path}: the daemon is not running"
        return DaemonUnreachableError(message, hint=_START)
    if isinstance(error, PermissionError):
        return DaemonUnreachableError(
            f"you may not open {path}: it is for root and the group {GROUP}", hint=_let_in()
        )
    if isinstance(error, (TimeoutError, BlockingIOError)):
        message = f"the daemon on {path} accepts no connection: it is stuck or overloaded"
        return DaemonUnreachableError(message, hint="see: systemctl status oscloudd")
    reason = error.strerror or str(error)
    return DaemonUnreachableError(
        f"can't connect to {path}: {reason}", hint="name the socket with --socket or OSCLOUD_SOCKET"
    )


def _find_other(path: str) -> str | None:
    """Point to a socket that is there, when another was named or none."""
    if path != DEFAULT_SOCKET and os.access(DEFAULT_SOCKET, os.F_OK):
        return f"the system's is {DEFAULT_SOCKET}: leave out --socket, and unset OSCLOUD_SOCKET"
    checkout = Path(CHECKOUT_SOCKET).absolute()
    if str(checkout) == path or not checkout.exists():
        return None
    return f"for this checkout's own daemon: export OSCLOUD_SOCKET={checkout}"


def _let_in() -> str:
    """Say how this user comes into the group, or that only a login is missing."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = "$USER"
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        return f"there is no group {GROUP} on this host: run it as root"
    if user in group.gr_mem and group.gr_gid not in os.getgroups():
        return (
            f"you are in the group by now, but not in this login: log in again, or: newgrp {GROUP}"
        )
    return f"join the group, then log in again: sudo usermod -aG {GROUP} {user}"
