"""A daemon of the benchmark's own: its directories under `.run/bench`, its start and its end."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from oscloudctl.client import Client
from oscloudd.errors import NotFoundError
from oscloudd.host.processes import find_processes_below, open_process

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".run/bench"
READY_MADE = ROOT / ".run/state/templates"
_VENV = Path(sys.executable).parent
OSCLOUDCTL = _VENV / "oscloudctl"

_START_SECONDS = 90.0
_STOP_SECONDS = 30.0
_LOOK_SECONDS = 0.05


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Daemon:
    """One oscloudd with a state of its own; `running` starts it and stops it."""

    def __init__(self, name: str) -> None:
        self.directory = BENCH / name
        self.state = self.directory / "state"
        self.socket = self.directory / "oscloudd.sock"
        self.pid = 0

    def prepare(self) -> None:
        """Forget what an earlier run left, but for its templates."""
        for name in ("state/disks", "state/warm", "run", "log"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for path in self.state.glob("oscloud.db*"):
            path.unlink()
        self.state.mkdir(parents=True, exist_ok=True)
        (self.directory / "log").mkdir()

    def _configure(self, pool: int) -> None:
        values = {
            "state_dir": self.state,
            "runtime_dir": self.directory / "run",
            "log_dir": self.directory / "log",
            "socket": self.socket,
        }
        # A JSON string of a path is a TOML string too.
        lines = [f"{key} = {json.dumps(str(path))}" for key, path in values.items()]
        lines.append(f"template_dirs = [{json.dumps(str(ROOT / 'templates'))}]")
        # Twenty guests of the usual size are promised more than a small machine has.
        lines += ["[limits]", "overcommit = 10"]
        # No image is made in the background of what is measured.
        lines += ["[warm]", *(['mode = "auto"', f"pool = {pool}"] if pool else ['mode = "off"'])]
        (self.directory / "oscloud.toml").write_text("\n".join(lines) + "\n")

    def take_template(self, image: str) -> None:
        """Copy a template of the checkout's own cloud, where that has made it."""
        made, own = READY_MADE / image, self.state / "templates" / image
        if (made / "digest").exists() and not _same_digest(made, own):
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(made, own)

    @contextmanager
    def running(self, pool: int = 0) -> Iterator[Client]:
        """Run the daemon for a while, with so many spare clones; end its vms and it."""
        self._configure(pool)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(f"\0oscloud-bench-{os.getpid()}")  # abstract: it needs no file
        argv = [_VENV / "oscloudd", "--config", self.directory / "oscloud.toml"]
        environment = {**os.environ, "NOTIFY_SOCKET": f"@oscloud-bench-{os.getpid()}"}
        with notify, (self.directory / "log/oscloudd.log").open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                cwd=self.directory,  # as `end_leftovers` looks for
                start_new_session=True,  # an interrupt is ours to pass on, after its vms
            )  # fmt: skip
            self.pid = process.pid
            try:
                self._wait_ready(process, notify)
                with Client(str(self.socket)) as client:
                    try:
                        yield client
                    finally:
                        delete_running(client)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(_STOP_SECONDS)

    def _wait_ready(self, process: subprocess.Popen[bytes], notify: socket.socket) -> None:
        deadline = time.monotonic() + _START_SECONDS
        death = os.pidfd_open(process.pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                readable = select.select([notify.fileno(), death], [], [], left)[0]
                if notify.fileno() in readable and b"READY=1" in notify.recv(4096).splitlines():
                    return
                if death in readable:
                    break
        finally:
            os.close(death)
        raise RuntimeError(f"oscloudd did not start: see {self.directory}/log/oscloudd.log")


def end_leftovers() -> None:
    """Kill what works in the benchmark's own directories: what a run that was killed has left."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (left := find_processes_below(BENCH)) and time.monotonic() < deadline:
        for found in left:
            with suppress(NotFoundError):
                process = open_process(found.identity)
                process.send_signal(signal.SIGKILL)
                process.close()
        time.sleep(_LOOK_SECONDS)


def delete_running(client: Client) -> None:
    for vm in client.call("vm_list"):
        if vm["state"] != "STOPPED":
            client.call("vm_delete", {"vm": vm["id"], "force": True})


def _same_digest(made: Path, own: Path) -> bool:
    digest = own / "digest"
    return digest.exists() and digest.read_bytes() == (made / "digest").read_bytes()
