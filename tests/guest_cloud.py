"""A cloud with real guests: oscloudd in a network namespace with an uplink, qemu, ssh.

Owns everything it starts, and ends it by pid. Templates that were built are kept in
`.run/test/templates` until what they are built from changes.
"""

import contextlib
import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest
from kept import KEPT, ROOT, keep

from oscloudctl.client import Client

NETNS = ROOT / "packaging/checkout/netns"
LIMIT_SECONDS = 90.0
BOOT_SECONDS = 300.0
BUILD_SECONDS = 1800.0
BOOT_ID = "/proc/sys/kernel/random/boot_id"

_CONFIG = """\
state_dir = "{root}/state"
runtime_dir = "{root}/run"
log_dir = "{root}/log"
template_dirs = ["{templates}", "{root}/declared"]
accelerator = "tcg"
[warm]
mode = "{warm}"
"""

_SSH_OPTIONS = ("-F", "none", "-o", "ConnectTimeout=20", "-o", "GlobalKnownHostsFile=/dev/null")


class GuestCloud:
    """One cloud: its directory, its namespace, its daemon, and a key its guests let in."""

    def __init__(self, root: Path, name: str, config: str = "", warm: str = "off") -> None:
        self.root = root
        self.namespace = name
        self.key = root / "id_ed25519"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.client = Client(str(root / "run/oscloudd.sock"))
        basics = _CONFIG.format(root=root, templates=ROOT / "templates", warm=warm)
        (root / "oscloud.toml").write_text(basics + config)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", self.key],
            check=True,
        )

    # The daemon

    def start(self) -> None:
        """Start the daemon and wait until it says that it is ready."""
        path = self.root / "notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            notify.settimeout(LIMIT_SECONDS)
            self.daemon = self.spawn(
                sys.executable, "-m", "oscloudd", "--config", str(self.root / "oscloud.toml"),
                NOTIFY_SOCKET=str(path),
            )  # fmt: skip
            while b"READY=1" not in notify.recv(4096).splitlines():
                assert self.daemon.poll() is None, self.log()

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the daemon by signal."""
        assert self.daemon is not None
        self.client.close()
        self.daemon.send_signal(number)
        self.daemon.wait(LIMIT_SECONDS)
        self.daemon = None

    def log(self) -> str:
        return (self.root / "log.txt").read_text()

    def close(self) -> None:
        """End everything in the namespace, and the namespace."""
        if self.daemon is not None:
            self.end()
        shown = subprocess.check_output(["ip", "netns", "pids", self.namespace], text=True)
        for pid in map(int, shown.split()):
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                wait_for_end(pidfd)
                os.close(pidfd)

    # Processes in the namespace

    def inside(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *argv]

    def environment(self, **more: str) -> dict[str, str]:
        home = {"HOME": str(self.root), "OSCLOUD_SOCKET": self.client.socket_path}
        return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", **home, **more}

    def spawn(self, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program in the namespace; `ip netns exec` becomes it, so the pid is its own."""
        with (self.root / "log.txt").open("ab") as log:
            return subprocess.Popen(
                self.inside(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.root, env=self.environment(**environment),
            )  # fmt: skip

    def run(self, *argv: str, check: bool = True) -> str:
        """Run a program in the namespace and give what it prints."""
        done = subprocess.run(
            self.inside(*argv), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            cwd=self.root, env=self.environment(), timeout=BOOT_SECONDS, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def control(self, *argv: str) -> str:
        """Run oscloudctl."""
        return self.run(sys.executable, "-m", "oscloudctl", *argv)

    def terminal(self, *argv: str) -> "pexpect.spawn[str]":
        """Run a program in the namespace on a terminal of its own."""
        command, *rest = self.inside(*argv)
        return pexpect.spawn(
            command, rest, env=self.environment(), cwd=str(self.root),
            encoding="utf-8", codec_errors="replace", timeout=LIMIT_SECONDS,
        )  # fmt: skip

    # Vms

    def call(self, method: str, **params: Any) -> Any:
        return self.client.call(method, params, timeout_seconds=BOOT_SECONDS)

    def build(self, template: str) -> None:
        self.client.call("template_build", {"template": template}, timeout_seconds=BUILD_SECONDS)

    def create(self, name: str, **params: Any) -> dict[str, Any]:
        """Make a vm that lets the cloud's key in, and wait until it is ready."""
        given = {"image": "tiny", "mem_size": "256M", "disk_size": "1G", "wait": "ready", **params}
        public = self.key.with_suffix(".pub").read_text().strip()
        vm: dict[str, Any] = self.call("vm_create", name=name, ssh_key=[public], **given)
        assert vm["ready"], vm
        return vm

    def info(self, vm: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.call("vm_info", vm=vm["id"])
        return found

    def wait(self, vm: dict[str, Any], state: str = "ready") -> dict[str, Any]:
        seen: dict[str, Any] = self.call(
            "vm_wait", vm=vm["id"], state=state, timeout=BOOT_SECONDS - 10
        )
        return seen

    def ssh_command(self, vm: dict[str, Any], *options: str) -> list[str]:
        """Give an ssh command that trusts the host keys of vm_info and no others."""
        known = self.root / f"known_hosts-{vm['id']}"
        known.write_text("".join(f"{vm['ip']} {key}\n" for key in vm["ssh_host_keys"]))
        trust = ("-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes")
        return ["ssh", *_SSH_OPTIONS, *trust, *options, f"root@{vm['ip']}"]

    def ssh(self, vm: dict[str, Any], command: str, *, check: bool = True) -> str:
        """Run a command in the guest, logged in by key."""
        argv = self.ssh_command(vm, "-i", str(self.key), "-o", "BatchMode=yes")
        return self.run(*argv, command, check=check).strip()

    def until(self, look: Callable[[], bool], what: str) -> None:
        """Look again and again, for what no event tells of."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not look():
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.log()[-3000:]}"
            time.sleep(0.001)

    def wait_for_boot(self, vm: dict[str, Any], old_boot_id: str) -> None:
        """Wait until ssh answers from another boot than the old one; a reboot has no event."""
        deadline = time.monotonic() + BOOT_SECONDS
        while (seen := self.ssh(vm, f"cat {BOOT_ID}", check=False)) in ("", old_boot_id):
            assert time.monotonic() < deadline, f"no other boot than {seen!r}"
            time.sleep(0.2)

    def ssh_by_password(self, vm: dict[str, Any], password: str, command: str) -> str:
        """Run a command in the guest, logged in by password."""
        argv = self.ssh_command(vm, "-o", "PubkeyAuthentication=no")
        with closing(self.terminal(*argv, command)) as ssh:
            ssh.expect("assword:")
            ssh.sendline(password)
            ssh.expect(pexpect.EOF)
            return str(ssh.before).strip()


@contextmanager
def closing(terminal: "pexpect.spawn[str]") -> Iterator["pexpect.spawn[str]"]:
    try:
        yield terminal
    finally:
        terminal.close(force=True)


def wait_for_end(pidfd: int) -> None:
    """Wait for a process's end, which makes its pidfd readable."""

    assert select.select([pidfd], [], [], LIMIT_SECONDS)[0]


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process, and not just its zombie."""
    try:
        return Path(f"/proc/{pid}/exe").readlink() is not None
    except OSError:
        return False


@contextmanager
def open_cloud(
    *templates: str,
    routes: tuple[str, ...] = (),
    state_image: Path | None = None,
    config: str = "",
    warm: str = "off",
) -> Iterator[GuestCloud]:
    """Give a running cloud in a new namespace with these templates.

    `routes` are there before it starts, the filesystem in `state_image` is where its state is,
    `config` is added to its configuration, `warm` is the mode of warm images.
    """
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    root = Path(tempfile.mkdtemp(prefix="oscloud-guest-"))
    root.chmod(0o755)  # the name server's user reads below it
    name = f"osc-{root.name.rpartition('-')[2]}".replace(".", "")
    subprocess.run([NETNS, "up", name], check=True, stdout=subprocess.DEVNULL)
    try:
        cloud = GuestCloud(root, name, config, warm)
        if state_image is not None:
            (root / "state").mkdir()
            subprocess.run(["mount", "-o", "loop", state_image, root / "state"], check=True)
        try:
            for route in routes:
                cloud.run("ip", "route", "add", *route.split())
            for template in templates:
                shutil.copytree(keep_template(template), root / "state/templates" / template)
            cloud.start()
            yield cloud
        finally:
            cloud.close()
            if state_image is not None:
                subprocess.run(["umount", root / "state"], check=True)
    finally:
        subprocess.run([NETNS, "down", name], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(root)


def keep_template(template: str) -> Path:
    """Give the directory of a template that was made, made first where it is not there yet."""

    def build(directory: Path) -> None:
        with open_cloud() as cloud:
            cloud.build(template)
            shutil.copytree(cloud.root / "state/templates" / template, directory)

    return keep(kept_template(template), build)


def kept_template(template: str) -> Path:
    """Give the directory where a built template is kept; another one when its sources change."""
    digest = hashlib.sha256()
    shared = [path for path in (ROOT / "templates").iterdir() if path.is_file()]
    for path in sorted([*shared, *(ROOT / "templates" / template).rglob("*")]):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return KEPT / f"templates/{template}-{digest.hexdigest()[:16]}"
