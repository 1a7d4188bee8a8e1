"""`make up`, twice, `make down` and `make clean` in a copy of this checkout, with a real guest."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.guest

ROOT = Path(__file__).parent.parent
NOT_IN_A_CLONE = shutil.ignore_patterns(
    ".git", ".venv", ".run", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build.log"
)

# Installing, building a template and booting, each on a busy machine.
UP_SECONDS = 900


@dataclass(frozen=True)
class Copy:
    """A checkout as a clone would be, and the name of the namespace it is to run in."""

    root: Path
    netns: str

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run make there."""
        return subprocess.run(
            ["make", *arguments], cwd=self.root, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=UP_SECONDS, check=False,
        )  # fmt: skip

    def made(self, *arguments: str) -> str:
        """Run make there, which has to succeed; give what it printed."""
        done = self.make(*arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def vm(self) -> dict[str, Any]:
        """Ask the copy's own daemon about the vm."""
        printed = self.made("-s", "ctl", "ARGS=vm-info my_vm --json")
        answer = json.loads(printed)
        found: dict[str, Any] = answer[0] if isinstance(answer, list) else answer
        return found

    def inside(self, printed_command: str) -> str:
        """Type a command that was printed, with what to run in the guest behind it."""
        return subprocess.check_output(
            ["bash", "-c", printed_command], cwd=self.root, text=True, timeout=60
        )


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    copy = Copy(tmp_path / "a checkout", f"osctest{os.getpid()}")
    shutil.copytree(ROOT, copy.root, ignore=NOT_IN_A_CLONE)
    yield copy
    copy.make("clean")


def find_line(printed: str, word: str) -> str:
    return next(line.strip() for line in printed.splitlines() if word in line)


def namespaces() -> str:
    return subprocess.check_output(["ip", "netns"], text=True)


def test_up_twice_down_and_clean(copy: Copy) -> None:
    printed = copy.made("up", f"NETNS={copy.netns}", "IMAGE=tiny")
    login = find_line(printed, "ssh -i")
    assert login.startswith(f"ip netns exec {copy.netns} ssh ")
    assert copy.inside(f"{login} hostname") == "my-vm\n"
    http = find_line(printed, "curl")
    assert json.loads(copy.inside(http)) == [{"id": 1, "name": "my_vm"}]
    before = copy.vm()

    again = copy.made("up")
    assert "Everything was there already; nothing was changed." in again
    assert f"my_vm: already running (process {before['pid']})" in again
    assert copy.vm()["pid"] == before["pid"]

    elsewhere = copy.make("up", "NETNS=elsewhere")
    assert elsewhere.returncode != 0
    assert "Hint: make down && make up NETNS=elsewhere" in elsewhere.stdout

    exports = find_line(printed, "export OSCLOUD_SOCKET")
    assert copy.inside(f"{exports}; oscloudctl vm-list -q") == "1\n"

    copy.made("down")
    assert not Path(f"/proc/{before['pid']}").exists()
    assert copy.netns not in namespaces()
    assert list((copy.root / ".run/state/disks").glob("*/disk.qcow2"))

    back = copy.made("up", f"NETNS={copy.netns}")
    assert copy.inside(f"{find_line(back, 'ssh -i')} hostname") == "my-vm\n"
    assert copy.vm()["ip"] == before["ip"]

    # A daemon that was killed leaves its vm running; down stops both all the same.
    daemon, shim = (
        int((copy.root / f".run/{name}.pid").read_text().split()[0])
        for name in ("oscloudd", "oscloud-http")
    )
    vm = copy.vm()["pid"]
    os.kill(daemon, 9)
    copy.made("clean")
    for pid in (daemon, shim, vm):
        assert not Path(f"/proc/{pid}/exe").exists()
    assert copy.netns not in namespaces()
    assert not (copy.root / ".run").exists()
    assert not (copy.root / ".venv").exists()


def test_nothing_to_stop_is_no_failure(copy: Copy) -> None:
    assert "nothing was started" in copy.made("down")
