"""One oscloudd as a real process in a network namespace of its own, over its socket.

Owns everything it starts: `close()` ends it by pid, and says what was left behind.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mariadb_server import MariaDb

IMAGE = "fake_1"
LIMIT_SECONDS = 90.0
_numbers = itertools.count(1)

_CONFIG = """\
state_dir = "{root}/state"
runtime_dir = "{root}/run"
log_dir = "{root}/log"
template_dirs = []
database = "{url}"
accelerator = "tcg"
[guest]
default_image = "{image}"
[warm]
mode = "off"
[qemu]
binary = "{binary}"
user = "nobody"
"""

_TEMPLATE = """\
description = "No machine at all"
os = "Fake 1"
min_mem_size = "64M"
[source]
kind = "build"
[boot]
kernel = "vmlinuz"
[guest]
identity = "serial"
ipv6 = true
"""

# What a guest's sshd would say; the namespace has the guest's address for as long as this runs.
_SSHD = """
import socket, sys
with socket.create_server((sys.argv[1], 22)) as server:
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        client.sendall(b"SSH-2.0-fake\\r\\n")
        client.close()
"""


class RpcError(Exception):
    """The daemon's error, as it came."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error)
        self.code: int = error["code"]
        self.message: str = error["message"]
        self.data: dict[str, Any] = error["data"]
        self.kind: str = error["data"]["kind"]


class Line:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(LIMIT_SECONDS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        assert line.endswith(b"\n"), f"the daemon hung up after {line!r}"
        message: dict[str, Any] = json.loads(line)
        assert message["jsonrpc"] == "2.0"
        return message

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        assert len(data) == size, "the daemon hung up"
        return data

    def at_end(self) -> bool:
        return self._file.read(1) == b""

    def read_until(self, wanted: bytes) -> bytes:
        seen = b""
        while wanted not in seen:
            data = self._file.read1(65536)
            assert data, f"the line ended after {seen!r}"
            seen += data
        return seen

    def ask(self, text: bytes) -> dict[str, Any]:
        """Send one line as it is and give the answer to it."""
        self.send(text + b"\n")
        return self.receive()

    def call(
        self,
        method: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        **params: Any,
    ) -> Any:
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": 7}
        self.send(json.dumps(request).encode() + b"\n")
        while (answer := self.receive()).get("method") == "progress":
            if on_progress is not None:
                on_progress(answer["params"])
        assert answer["id"] == 7
        if "error" in answer:
            raise RpcError(answer["error"])
        return answer["result"]


class Box:
    """One cloud: its directories, its namespace, its daemon, and what that has started.

    With `mariadb`, a database of its own on that server; else SQLite's file.
    """

    def __init__(self, binary: Path, mariadb: MariaDb | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="oscloud-rpc-"))
        self.root.chmod(0o755)
        self.namespace = f"oscloud-test-{os.getpid()}-{next(_numbers)}"
        self.socket_path = self.root / "run" / "oscloudd.sock"
        self.daemon: subprocess.Popen[bytes] | None = None
        self._sshd: subprocess.Popen[str] | None = None
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)
        self._ip("link", "set", "lo", "up")
        self.mariadb = mariadb
        self.database = "" if mariadb is None else mariadb.make_database()
        url = "" if mariadb is None else mariadb.url(self.database)
        config = _CONFIG.format(root=self.root, image=IMAGE, binary=binary, url=url)
        (self.root / "oscloud.toml").write_text(config)
        self._make_template()
        (self.root / "tmp").mkdir()

    def _make_template(self) -> None:
        directory = self.root / "state" / "templates" / IMAGE
        directory.mkdir(parents=True)
        (directory / "template.toml").write_text(_TEMPLATE)
        (directory / "vmlinuz").touch()
        image = directory / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        image.chmod(0o444)
        (directory / "digest").write_text("sha256:" + "0" * 64 + "\n")

    # The daemon

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a daemon on this box's configuration, and leave waiting for it to the caller."""
        # `ip netns exec` becomes the daemon: the pid is the daemon's own.
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "oscloudd"]
        with (self.root / "daemon.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--config", str(self.root / "oscloud.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).resolve().parent.parent,
                env={**os.environ, "TMPDIR": str(self.root / "tmp")},
            )

    def start(self) -> None:
        before = self._serving_count()
        self.daemon = self.spawn()
        self.until(lambda: self._serving_count() > before, "the daemon serving its socket")

    def _serving_count(self) -> int:
        log = self.root / "daemon.log"
        return log.read_text().count("serves") if log.exists() else 0

    def log(self) -> str:
        return (self.root / "daemon.log").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the daemon by signal and give its status."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        status = self.daemon.wait(LIMIT_SECONDS)
        self.daemon = None
        return status

    def until(self, look: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while not look():
            dead = self.daemon is not None and self.daemon.poll() is not None
            assert not dead, f"the daemon died:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"{what} did not happen:\n{self.log()[-3000:]}"
            time.sleep(0.01)

    # Talking to it

    def connect(self) -> Line:
        return Line(self.socket_path)

    def call(
        self,
        method: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        **params: Any,
    ) -> Any:
        with self.connect() as line:
            return line.call(method, on_progress, **params)

    def create(self, name: str, **params: Any) -> dict[str, Any]:
        given = {"mem_size": "64M", "disk_size": "16M", "wait": "started", **params}
        vm: dict[str, Any] = self.call("vm_create", name=name, **given)
        return vm

    def wait(self, vm: int | str, state: str) -> dict[str, Any]:
        seen: dict[str, Any] = self.call("vm_wait", vm=vm, state=state, timeout=LIMIT_SECONDS)
        return seen

    @contextlib.contextmanager
    def sshd_at(self, address: str) -> Iterator[None]:
        """Answer at a guest's address as its sshd would."""
        self._ip("address", "add", f"{address}/32", "dev", "lo")
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-I", "-c", _SSHD]
        sshd = subprocess.Popen([*command, address], stdout=subprocess.PIPE)
        assert sshd.stdout is not None
        try:
            assert sshd.stdout.readline() == b"ready\n"
            yield
        finally:
            sshd.kill()
            sshd.wait()
            sshd.stdout.close()
            self._ip("address", "del", f"{address}/32", "dev", "lo")

    # What there is on the host

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the database itself, whichever it is, past the daemon; `?` stands for a value."""
        if self.mariadb is not None:
            return self.mariadb.query(query.replace("?", "%s"), values, database=self.database)
        with contextlib.closing(sqlite3.connect(self.root / "state" / "oscloud.db")) as database:
            rows = database.execute(query, values).fetchall()
            database.commit()
            return rows

    def qemus(self) -> list[int]:
        """Give the processes that work in a directory of this box: every qemu, and nobody else."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/cwd").startswith(f"{self.root}/"):
                    found.append(int(name))
        return found

    def _ip(self, *arguments: str) -> str:
        done = subprocess.run(
            ["ip", "-n", self.namespace, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout

    def _listeners(self) -> list[str]:
        shown = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Htln"],
            check=True,
            capture_output=True,
            text=True,
        )
        return [line.split()[3] for line in shown.stdout.splitlines()]

    def forwarded_ports(self) -> list[str]:
        """Give what the host's rules forward, as `host address . protocol . port : guest`."""
        command = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "nft",
            "list",
            "table",
            "ip",
            "oscloud_ports",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return sorted(
            re.findall(r"[0-9a-z][0-9a-z. ]+ : [0-9. ]+[0-9]", done.stdout.replace("=", ""))
        )

    def traces(self) -> dict[str, Any]:
        """Give all there is of vms anywhere, in a form that compares; empty when there is none."""
        # The job of a vm that was deleted ends a moment after the answer to that.
        ended = "SELECT 1 FROM job WHERE state = 'RUNNING' AND vm_id NOT IN (SELECT id FROM vm)"
        self.until(lambda: not self.rows(ended), "the end of jobs without a vm")
        names = [link["ifname"] for link in json.loads(self._ip("-json", "link"))]
        neighbours = json.loads(self._ip("-json", "neighbour", "show", "nud", "permanent") or "[]")
        found: dict[str, Any] = {
            "vm rows": self.rows("SELECT id, name FROM vm"),
            "disk rows": self.rows("SELECT id, name FROM disk"),
            "layer rows": [number for (number,) in self.rows("SELECT id FROM layer ORDER BY id")],
            "snapshot rows": self.rows("SELECT vm_id, name FROM snapshot ORDER BY id"),
            "unfinished jobs": self.rows("SELECT id, kind FROM job WHERE state = 'RUNNING'"),
            "taps": sorted(name for name in names if "tap" in name or "oscwarm" in name),
            "addresses": sorted(neighbour["dst"] for neighbour in neighbours),
            # A network's name server is there as long as its daemon.
            "ports": sorted(each for each in self._listeners() if not each.endswith(":53")),
            "processes": sorted(self.qemus()),
            "port rows": sorted(self.rows("SELECT vm_id, spec FROM port")),
            "nic rows": sorted(self.rows("SELECT vm_id, slot, ip FROM nic")),
            "forwarded ports": self.forwarded_ports(),
        }
        for name, pattern in (
            ("run directories", "run/vms/*"),
            ("disks", "state/disks/*"),
            ("overlays to be", "state/disks/*/next.qcow2"),
            ("layers", "state/layers/*"),
            ("layers being merged", "state/layers/*/.*"),
            ("memory of layers", "state/layers/*/memory*"),
            ("saved memory", "state/disks/*/suspended*"),
            ("logs", "log/*"),
            ("temporary files", "tmp/*"),
            ("names", "run/names/*/hosts/*"),
            ("warm images being made", "state/warm/.*"),
            ("their run directories", "run/warm/*"),
        ):
            found[name] = sorted(
                str(path.relative_to(self.root)) for path in self.root.glob(pattern)
            )
        return {name: what for name, what in found.items() if what}

    def close(self) -> None:
        """Delete every vm through the daemon, end it, and fail if anything is left."""
        left: dict[str, Any] = {"daemon": "is dead"}
        try:
            if self.daemon is None and self.socket_path.parent.exists():
                self.start()
            for vm in self.call("vm_list"):
                self.call("vm_set", vm=vm["id"], protect=False)
                self.call("vm_delete", vm=vm["id"], force=True)
            for disk in self.call("disk_list"):
                self.call("disk_delete", disk=disk["id"])
            left = self.traces()
            assert self.end() == 0, self.log()[-3000:]
            assert not self.socket_path.exists()
        finally:
            self._end_by_force()
        assert not left, left

    def _end_by_force(self) -> None:
        pids = self.qemus()
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            pids = self.qemus()
        pids += [int(path.read_text()) for path in self.root.glob("run/names/*/pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=True)
        shutil.rmtree(self.root)
        if self.mariadb is not None:
            self.mariadb.drop_database(self.database)
