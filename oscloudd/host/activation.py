"""What systemd hands to a service it starts: that it is one, and a socket already bound.

Reads the environment of systemd.exec(5) and sd_listen_fds(3); owns nothing. Outside systemd, in a
checkout or a container without it, there is neither, and the daemon does without.
"""

import os
import socket
from pathlib import Path

from oscloudd.errors import HostError

# sd_listen_fds(3): the first descriptor that is passed.
_FIRST_DESCRIPTOR = 3
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

# sd_booted(3): it is there exactly where systemd is the init.
_BOOTED = Path("/run/systemd/system")


def is_service() -> bool:
    """Tell whether systemd has started this very process, so that it may be asked for more."""
    # A shell inside a service inherits the variable, with the number of another process in it.
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()) and _BOOTED.is_dir()


def take_listener() -> socket.socket | None:
    """Give the Unix socket that systemd listens on for us; None where it does not.

    Raises HostError when it passed something else.
    """
    passed = {name: os.environ.pop(name, "") for name in _LISTEN}
    if passed["LISTEN_PID"] != str(os.getpid()):
        return None
    if passed["LISTEN_FDS"] != "1":
        raise HostError(
            f"systemd passed {passed['LISTEN_FDS']} sockets",
            hint="oscloudd.socket must have one ListenStream=",
        )
    listener = socket.socket(fileno=_FIRST_DESCRIPTOR)
    listener.set_inheritable(False)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM:
        raise HostError(
            f"systemd passed a socket of {listener.family.name}, {listener.type.name}",
            hint="oscloudd.socket must have one ListenStream= with a path",
        )
    return listener
