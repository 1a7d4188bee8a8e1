"""The two programs of a checkout, oscloudd and the HTTP shim: how each is started and is ready.

Waiting is by event where there is one: the daemon's own READY=1, and a pidfd for its death.
"""

import contextlib
import os
import select
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from checkout import CONFIG, LOGS, ROOT, RUN, VENV
from stages import CheckoutError, say, stage
from supervised import Supervised

DAEMON = Supervised("oscloudd", RUN / "oscloudd.pid", LOGS / "oscloudd.log")
SHIM = Supervised("oscloud-http", RUN / "oscloud-http.pid", LOGS / "oscloud-http.log")

# The accelerator's probe may need two tries of two seconds; the rest is a busy machine.
DAEMON_READY_SECONDS = 90.0
SHIM_READY_SECONDS = 30.0
STOP_SECONDS = 60.0

# /proc/net/tcp has no event; the wait is on the process's death, this often interrupted to look.
LOOK_SECONDS = 0.05
_LISTENING = "0A"

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def start_daemon(namespace: str) -> None:
    """Start oscloudd, unless it runs, and wait until it says it is ready."""
    if pid := DAEMON.find_pid():
        say(f"oscloudd: already running (process {pid})")
        return
    argv = [str(VENV / "bin/oscloudd"), "--config", str(CONFIG)]
    # unix(7) allows 107 bytes, and a checkout may lie deep.
    with tempfile.TemporaryDirectory(prefix="oscloud-up-", dir="/run") as directory:
        address = f"{directory}/notify"
        with stage("Starting oscloudd"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(address)
            begin = DAEMON.log_end()
            pid = DAEMON.start(_inside(namespace, argv), _environment(NOTIFY_SOCKET=address))
            _wait_ready(pid, notify, begin)


def _wait_ready(pid: int, notify: socket.socket, begin: int) -> None:
    deadline = time.monotonic() + DAEMON_READY_SECONDS
    with _death_of(pid) as death:
        while (left := deadline - time.monotonic()) > 0:
            readable = select.select([notify.fileno(), death], [], [], left)[0]
            # sd_notify(3): newline-separated assignments.
            if notify.fileno() in readable and b"READY=1" in notify.recv(4096).splitlines():
                return
            if death in readable:
                raise DAEMON.explain_death(begin)
    raise CheckoutError(
        f"oscloudd is not ready after {DAEMON_READY_SECONDS:.0f} s", f"see {DAEMON.log}"
    )


def start_shim(namespace: str, host: str, port: int) -> None:
    """Start the HTTP shim as its own user, unless it runs, and wait until it listens."""
    if pid := SHIM.find_pid():
        say(f"oscloud-http: already running (process {pid})")
        return
    argv = [str(ROOT / "packaging/checkout/shim"), str(ROOT), f"{host}:{port}"]
    with stage(f"Starting oscloud-http on {host}:{port}"):
        begin = SHIM.log_end()
        pid = SHIM.start(_inside(namespace, argv), _environment())
        _wait_listening(pid, port, begin)


def _wait_listening(pid: int, port: int, begin: int) -> None:
    deadline = time.monotonic() + SHIM_READY_SECONDS
    with _death_of(pid) as death:
        while time.monotonic() < deadline:
            if select.select([death], [], [], LOOK_SECONDS)[0]:
                raise SHIM.explain_death(begin)
            if owns_listener(pid, port):
                return
    raise CheckoutError(f"oscloud-http does not listen on port {port}", f"see {SHIM.log}")


def owns_listener(pid: int, port: int) -> bool:
    """Tell whether the process itself holds a listening TCP socket on the port."""
    inodes = set()
    for family in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            # proc_pid_net(5): its own namespace's sockets; local address, state and inode are
            # columns 2, 4 and 10.
            for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[1].endswith(f":{port:04X}") and columns[3] == _LISTENING:
                    inodes.add(f"socket:[{columns[9]}]")
    with contextlib.suppress(OSError):
        return any(str(fd.readlink()) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@contextlib.contextmanager
def _death_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _inside(namespace: str, argv: list[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *argv] if namespace else argv


def _environment(**more: str) -> dict[str, str]:
    return {"PATH": _PATH, "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **more}
