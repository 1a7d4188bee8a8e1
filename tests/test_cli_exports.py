"""disk-export on a scripted daemon: what becomes of the pieces, and of a file that was there."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from stub_daemon import (
    HANG_UP,
    JOB,
    Call,
    Oscloudctl,
    Running,
    StubDaemon,
    Terminal,
    build_environment,
)

from oscloudd.errors import InvalidStateError

# With a hole in it.
PIECES = [bytes(range(256)) * 1024, bytes(1 << 18), b"the end"]
CONTENT = b"".join(PIECES)


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    return Oscloudctl(daemon, tmp_path)


class Giver:
    """Answers an export: sends the pieces with progress in between, and says what they were."""

    def __init__(self, daemon: StubDaemon, method: str = "disk_export", **answer: Any) -> None:
        digest = hashlib.sha256(CONTENT).hexdigest()
        self.answer = {"name": "web", "size": len(CONTENT), "sha256": digest, **answer}
        daemon.answers[method] = self.give

    def give(self, call: Call) -> Any:
        for number, piece in enumerate(PIECES):
            call.progress("sending", "web", number / len(PIECES))
            send_piece(call, piece)
        return self.answer


def send_piece(call: Call, piece: bytes) -> None:
    call.send({"jsonrpc": "2.0", "method": "piece", "params": {"size": len(piece)}})
    call.stream.sendall(piece)


def export_to(output: IO[bytes], daemon: StubDaemon) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "oscloudctl", "disk-export", "web", "-"],
        stdout=output, env=build_environment(daemon, daemon.path.parent), check=False,
    )  # fmt: skip


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "sock")


def test_a_file_is_there_when_it_is_whole(
    ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path
) -> None:
    digest = Giver(daemon).answer["sha256"]
    done = ctl("disk-export", "web-1", "web.qcow2")
    assert done.stdout == f"web.qcow2: 512K, SHA256 {digest}\n"
    target = tmp_path / "web.qcow2"
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_blocks * 512 < len(CONTENT)
    assert files(tmp_path) == ["web.qcow2"]
    assert daemon.calls == [("disk_export", {"disk": "web-1"})]
    answer = ctl("disk-export", "7", "b", "--format", "raw", "--json")
    assert json.loads(answer.stdout)["sha256"] == digest
    assert daemon.calls[1][1] == {"disk": 7, "format": "raw"}


def test_a_file_that_is_there_stays(ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path) -> None:
    Giver(daemon)
    target = tmp_path / "web.qcow2"
    target.write_text("dear")
    refused = ctl("disk-export", "web", "web.qcow2", status=4)
    assert "web.qcow2 is there already" in refused.stderr
    assert "--force" in refused.stderr
    assert daemon.calls == []
    assert target.read_text() == "dear"
    (tmp_path / "link").symlink_to(target)
    ctl("disk-export", "web", "link", "--force")
    assert target.read_bytes() == CONTENT
    for place, words in (("/dev/null", "no ordinary file"), (".", "no ordinary file"),
                         ("none/x", "No such file")):  # fmt: skip
        assert words in ctl("disk-export", "web", place, "--force", status=10).stderr
    assert files(tmp_path) == ["link", "web.qcow2"]


def test_standard_output_carries_the_file_alone(daemon: StubDaemon, tmp_path: Path) -> None:
    Giver(daemon)
    with (tmp_path / "out").open("wb") as out:
        done = export_to(out, daemon)
    assert (done.returncode, done.stdout) == (0, None)
    assert (tmp_path / "out").read_bytes() == CONTENT
    terminal = Terminal(daemon, tmp_path, "disk-export", "web", "-")
    terminal.see(b"not for a terminal")
    assert terminal.wait() == 2
    terminal.close()


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": len(CONTENT) + 1}])
def test_another_file_than_was_sent_is_not_kept(
    ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    Giver(daemon, **wrong)
    assert "is not what the daemon has sent" in ctl("disk-export", "w", "f", status=10).stderr
    assert files(tmp_path) == []


def test_an_error_between_pieces_leaves_nothing(
    ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path
) -> None:
    def give(call: Call) -> Any:
        send_piece(call, PIECES[0])
        raise InvalidStateError("the disk of vm 'web' can't be exported", hint="stop it")

    daemon.answers["disk_export"] = give
    assert "Hint: stop it" in ctl("disk-export", "w", "f", status=5).stderr
    assert files(tmp_path) == []

    def cut(call: Call) -> Any:
        call.send({"jsonrpc": "2.0", "method": "piece", "params": {"size": 1000}})
        call.stream.sendall(b"too little")
        return HANG_UP

    daemon.answers["disk_export"] = cut
    assert "closed the connection" in ctl("disk-export", "w", "f", status=12).stderr
    daemon.answers["disk_export"] = lambda call: send_piece(call, bytes((1 << 20) + 1))
    assert "not oscloudd" in ctl("disk-export", "w", "f", status=12).stderr
    assert files(tmp_path) == []


def test_a_full_disk_ends_it(daemon: StubDaemon) -> None:
    Giver(daemon)
    with Path("/dev/full").open("wb") as full:
        assert export_to(full, daemon).returncode == 8


def test_ctrl_c_cancels_and_leaves_nothing(daemon: StubDaemon, tmp_path: Path) -> None:
    cancelled: list[Call] = []

    def give(call: Call) -> Any:
        call.progress("sending", "web")
        send_piece(call, PIECES[0])
        while not cancelled:
            signal.sigtimedwait([], 0.01)
        raise InvalidStateError("job 7 (disk_export web) was cancelled")

    def cancel(call: Call) -> dict[str, Any]:
        cancelled.append(call)
        return {**JOB, "state": "CANCELLED"}

    daemon.answers |= {"disk_export": give, "job_cancel": cancel}
    with Running(daemon, tmp_path, "disk-export", "web", "f") as running:
        running.see("sending: web")
        running.interrupt()
        running.see("Cancelling job 7")
        assert running.end()[0] == 5
    assert files(tmp_path) == []
