"""A Debian of its own with a real systemd, under systemd-nspawn, to install the package in.

Its tree is made once, with all that the package depends on, and kept in `.run/test` until that
changes; what a run does to it goes into an overlay that the run removes. It has a network
namespace of its own without a way out: what is installed comes from the tree or the package.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from kept import KEPT, ROOT, keep

BOOT_SECONDS = 120.0
RUN_SECONDS = 300.0
BUILD_SECONDS = 1800.0

# EXIT_FORCE_RESTART of systemd's exit-status.h.
_REBOOT_STATUS = 133

# A Debian that boots, and what the tests themselves run in it.
_BASE = (
    "systemd", "systemd-sysv", "systemd-resolved", "dbus",
    "apt", "curl", "openssh-client", "procps",
)  # fmt: skip


def build_package() -> Path:
    """Build the package unless it is newer than all it is made from."""
    done = subprocess.run(
        [ROOT / "packaging/build-deb"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=BUILD_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / done.stdout.split()[0]


def _dependencies(package: Path) -> list[str]:
    """Give what the package depends on, of alternatives the first."""
    shown = subprocess.check_output(["dpkg-deb", "--field", package, "Depends"], text=True)
    return [one.split("|")[0].split("(")[0].strip() for one in shown.split(",")]


def ensure_tree(package: Path) -> Path:
    """Give a tree that has all the package depends on, made anew where that has changed."""
    included = sorted({*_BASE, *_dependencies(package)})
    key = hashlib.sha256(" ".join(included).encode()).hexdigest()[:16]
    return keep(KEPT / f"debian-{key}", lambda tree: _bootstrap(tree, included))


def _bootstrap(tree: Path, included: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".list") as sources:
        sources.write(_read_sources())
        sources.flush()
        done = subprocess.run(
            [
                "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory",
                f"--include={','.join(included)}", "--aptopt=APT::Sandbox::User \"root\"",
                "bookworm", tree, sources.name,
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_SECONDS,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tree.chmod(0o755)
    # A journal that outlives a boot tells how the last one ended.
    (tree / "var/log/journal").mkdir(exist_ok=True)


def _read_sources() -> str:
    """Give this host's sources of Debian 12, as lines of a sources.list."""
    layout = "$(ORIGIN)|$(CODENAME)|deb $(REPO_URI) $(CODENAME) $(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", layout]
    selected = ["Created-By: Packages", "Architecture: amd64"]
    lines = subprocess.check_output([*command, *selected], text=True).splitlines()
    found = {line.rpartition("|")[2] for line in lines if line.startswith("Debian|bookworm")}
    assert found, "the host's apt sources have no Debian 12 (bookworm)"
    return "".join(f"{line}\n" for line in sorted(found))


def _remove_stale() -> None:
    """Remove what tests that were killed have left."""
    for work in KEPT.glob("container-*"):
        if not Path("/proc", work.name.split("-")[1]).exists():
            subprocess.run(["umount", "--lazy", work / "root"], check=False)
            shutil.rmtree(work)


class Container:
    """One boot after another of a tree; `close` ends it and removes what it wrote."""

    def __init__(self, tree: Path) -> None:
        # Not in /tmp, where there may be an overlay already, which can't be below another.
        _remove_stale()
        self._work = Path(tempfile.mkdtemp(prefix=f"container-{os.getpid()}-", dir=KEPT))
        self.root = self._work / "root"
        for name in ("upper", "work", "root"):
            (self._work / name).mkdir()
        layers = f"lowerdir={tree},upperdir={self._work / 'upper'},workdir={self._work / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", self.root], check=True)
        self._nspawn: subprocess.Popen[bytes] | None = None
        # unix(7) allows 107 bytes, and a checkout may lie deep.
        self._notify_directory = Path(tempfile.mkdtemp(prefix="oscloud-nspawn-"))
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._notify_directory / "notify"))
        self._notify.settimeout(BOOT_SECONDS)
        self._leader = 0

    def start(self) -> None:
        """Boot it, and wait until its systemd is ready."""
        with (self._work / "console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                [
                    # It must not outlive tests that are killed.
                    "setpriv", "--pdeathsig=TERM",
                    "systemd-nspawn", "--directory", self.root, "--boot", "--register=no",
                    "--keep-unit", f"--machine=osc{os.getpid()}", "--private-network",
                    "--bind=/dev/net/tun", "--capability=CAP_NET_ADMIN", "--notify-ready=yes",
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "NOTIFY_SOCKET": str(self._notify_directory / "notify")},
            )  # fmt: skip
        self._wait_for_boot()

    def reboot(self) -> None:
        """Have its systemd reboot it, and wait until it is up again."""
        assert self._nspawn is not None
        self.run("systemctl", "reboot")
        # With --keep-unit nspawn leaves the second boot to whoever supervises it.
        assert self._nspawn.wait(BOOT_SECONDS) == _REBOOT_STATUS
        self.start()

    def _wait_for_boot(self) -> None:
        while True:
            # sd_notify(3): nspawn names the first process of the container, and says when it is up.
            said = dict(
                line.partition("=")[::2] for line in self._notify.recv(4096).decode().splitlines()
            )
            self._leader = int(said.get("X_NSPAWN_LEADER_PID", self._leader))
            if said.get("READY") == "1":
                return

    def run(self, *argv: str | Path, user: str = "root", check: bool = True) -> str:
        """Run a program in it and give what it prints, both outputs together."""
        done = self.attempt(*argv, user=user)
        assert not check or done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def attempt(self, *argv: str | Path, user: str = "root") -> "subprocess.CompletedProcess[str]":
        """Run a program in it, however it ends."""
        enter = ["nsenter", f"--target={self._leader}"]
        enter += ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]
        login = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--reset-env"]
        return subprocess.run(
            [*enter, *login, "env", "LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", *argv],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=RUN_SECONDS, check=False,
        )  # fmt: skip

    def close(self) -> None:
        """Power it off and remove what it wrote."""
        if self._nspawn is not None:
            # systemd-nspawn(1): the first asks the container's init to power off.
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(BOOT_SECONDS)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._notify.close()
        subprocess.run(["umount", self.root], check=True)
        shutil.rmtree(self._work)
        shutil.rmtree(self._notify_directory)
