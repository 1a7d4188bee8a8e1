"""`events` as a process: what it prints, and that a daemon's restart loses nothing."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import (
    HANG_UP,
    Call,
    Oscloudctl,
    Running,
    StubDaemon,
    build_event,
)

from oscloudctl import reconnect
from oscloudctl.client import NotTheDaemonError
from oscloudctl.events import describe
from oscloudd.errors import (
    DaemonUnreachableError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)


class History:
    """An `event_watch` that sends `sequences`, and in the end does what `then` says."""

    def __init__(self, daemon: StubDaemon, *sequences: int) -> None:
        self.sequences = list(sequences)
        self.latest = 5
        self.then: Any = Call.wait_until_gone
        daemon.answers["event_watch"] = self.watch

    def watch(self, call: Call) -> Any:
        since = call.params.get("since")
        if since is not None:
            for sequence in self.sequences:
                if sequence > since:
                    call.event(sequence)
        if call.params["follow"]:
            return self.then(call)
        return {"latest": self.latest}


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    return Oscloudctl(daemon, tmp_path)


def watched(daemon: StubDaemon) -> list[tuple[Any, bool]]:
    return [(each.get("since"), each["follow"]) for each in daemon.params_of("event_watch")]


def test_a_line_has_time_number_kind_name_and_words(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    History(daemon, 1, 2)
    line = "2026-01-02T03:04:05  {}  vm_state  web  RUNNING\n"
    assert ctl("events", "--since", "0", "--no-follow").stdout == line.format(1) + line.format(2)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"kind": "vm_state", "data": {"state": "STOPPED", "wanted_state": "RUNNING",
                                       "reason": "powered off"}},
         "STOPPED (wanted RUNNING): powered off"),
        ({"kind": "vm_state", "data": {"state": "DELETED", "wanted_state": "DELETED"}}, "DELETED"),
        ({"kind": "vm_state", "data": {"state": "CREATING", "wanted_state": "RUNNING"}},
         "CREATING"),
        ({"kind": "job", "job": 7, "data": {"kind": "vm_create", "state": "RUNNING",
                                            "stage": "booting", "message": ""}},
         "job 7 vm_create RUNNING, booting"),
        ({"kind": "job", "job": 7, "data": {"kind": "vm_stop", "state": "FAILED",
                                            "stage": "stopping", "message": "qemu hangs"}},
         "job 7 vm_stop FAILED: qemu hangs"),
        ({"kind": "port", "data": {"port": "127.0.0.1:8080:80/tcp", "change": "added"}},
         "port 127.0.0.1:8080:80/tcp added"),
        ({"kind": "warning", "data": {"message": "the disk is nearly full"}},
         "the disk is nearly full"),
        ({"kind": "of the future", "data": {"x": 1}}, '{"x": 1}'),
        ({"kind": "vm_state", "data": None}, "None"),
    ],
)  # fmt: skip
def test_what_changed_in_words(event: dict[str, Any], words: str) -> None:
    assert describe(event) == words


def test_names_do_not_drive_the_terminal(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def watch(call: Call) -> Any:
        if "since" in call.params:
            data = {"state": "ERROR", "reason": "\x1b[2Jqemu\nsays no"}
            call.event(1, data=data, at=None)
        return {"latest": 1}

    daemon.answers["event_watch"] = watch
    out = ctl("events", "--since", "0", "--no-follow").stdout
    assert out.endswith("ERROR: qemu says no\n")
    assert len(out.splitlines()) == 1


def test_json_is_a_line_each(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    History(daemon, 4, 5)
    lines = ctl("events", "--since", "3", "--no-follow", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == [build_event(4), build_event(5)]


def test_no_follow_reads_on_until_it_has_all_there_was(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def watch(call: Call) -> Any:
        since = call.params.get("since")
        if since is not None and since < 3:
            call.event(since + 1)
        return {"latest": 3 if since is None else since + 1}

    daemon.answers["event_watch"] = watch
    assert len(ctl("events", "--since", "0", "--no-follow").stdout.splitlines()) == 3
    assert watched(daemon) == [(None, False), (0, False), (1, False), (2, False)]


def test_no_follow_alone_looks_back(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    history = History(daemon, 1, 250)
    history.latest = 250
    assert "  250  " in ctl("events", "--no-follow").stdout
    assert watched(daemon) == [(None, False), (150, False)]


def test_ctrl_c_is_quiet(daemon: StubDaemon, tmp_path: Path) -> None:
    History(daemon, 6)
    with Running(daemon, tmp_path, "events") as running:
        running.read("  6  vm_state")
        running.interrupt()
        status, _, stderr = running.end()
    assert (status, stderr) == (130, "")
    assert watched(daemon) == [(None, False), (5, True)], "nothing between is missed"


def test_goes_on_where_it_was_when_the_daemon_hangs_up(daemon: StubDaemon, tmp_path: Path) -> None:
    history = History(daemon, 6, 7)

    def restart(_call: Call) -> Any:
        history.sequences, history.then = [6, 7, 8, 9], Call.wait_until_gone
        return HANG_UP

    history.then = restart
    with Running(daemon, tmp_path, "events") as running:
        out = running.read("  9  vm_state")
        running.interrupt()
        status, _, stderr = running.end()
    assert [line.split()[1] for line in out.splitlines() if "vm_state" in line] == ["6", "7", "8"]
    assert status == 130
    assert stderr == (
        "the daemon closed the connection before it answered event_watch."
        " Trying again for 60 seconds …\nThe daemon is back.\n"
    )
    assert [since for since, follow in watched(daemon) if follow] == [5, 7]


def test_goes_on_when_another_daemon_listens(daemon: StubDaemon, tmp_path: Path) -> None:
    path = tmp_path / "second" / "oscloudd.sock"
    path.parent.mkdir()
    first = StubDaemon(path)
    History(first, 6)
    with Running(first, tmp_path, "events", "--since", "5") as running:
        running.read("  6  vm_state")
        path.unlink()
        first.close()
        running.see("Trying again for 60 seconds …")
        second = StubDaemon(path)
        History(second, 6, 7)
        running.read("  7  vm_state")
        running.see("The daemon is back.")
        running.interrupt()
        status, _, stderr = running.end()
        assert (status, stderr.strip()) == (130, "")
        assert watched(second) == [(None, False), (6, True)]
        second.close()


def test_being_cut_off_is_no_loss(daemon: StubDaemon, tmp_path: Path) -> None:
    history = History(daemon, 6)

    def cut_off(_call: Call) -> Any:
        history.sequences, history.then = [6, 7], Call.wait_until_gone
        raise UnavailableError("cut off after event 6", since=6)

    history.then = cut_off
    with Running(daemon, tmp_path, "events") as running:
        running.read("  6  ")
        running.see("cut off after event 6. Trying again")
        running.read("  7  ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFoundError("the events after 2 are no longer kept", hint="watch from 9 on"), 3),
        (InvalidArgumentError("since 9 is yet to come", hint="the latest is 5"), 2),
    ],
)
def test_what_trying_again_does_not_mend(
    ctl: Oscloudctl, daemon: StubDaemon, error: Any, status: int
) -> None:
    def fail(_call: Call) -> Any:
        raise error

    History(daemon).then = fail
    done = ctl("events", "--since", "2", status=status)
    assert (done.stdout, done.stderr) == ("", f"Error: {error.message}\nHint: {error.hint}\n")


def test_no_daemon_at_all_is_not_waited_for(ctl: Oscloudctl, tmp_path: Path) -> None:
    stderr = ctl("events", "--socket", str(tmp_path / "none"), status=12).stderr
    assert "Trying again" not in stderr


@pytest.mark.parametrize(
    "text", ["hello", '{"method":"event"}', '{"method":"event","params":{"sequence":"1"}}', "[]"]
)
def test_a_garbled_stream_ends_it(ctl: Oscloudctl, daemon: StubDaemon, text: str) -> None:
    History(daemon).then = lambda call: call.send_text(text) or HANG_UP
    done = ctl("events", status=12)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: what answers on ")


def test_a_slow_stream_is_put_together(daemon: StubDaemon, tmp_path: Path) -> None:
    def dribble(call: Call) -> Any:
        message = {"jsonrpc": "2.0", "method": "event", "params": build_event(6, name="wäb")}
        for byte in json.dumps(message, ensure_ascii=False).encode() + b"\n":
            call.stream.sendall(bytes([byte]))
            os.sched_yield()
        return call.wait_until_gone()

    History(daemon).then = dribble
    with Running(daemon, tmp_path, "events") as running:
        running.read("  6  vm_state  wäb  RUNNING")


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(1000))
    pauses: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", pauses.append)
    patience, error = reconnect.Patience(), DaemonUnreachableError("gone")
    with pytest.raises(DaemonUnreachableError):
        patience.wait(error)
    patience.reached()
    with pytest.raises(NotTheDaemonError):
        patience.wait(NotTheDaemonError("foreign"))
    while True:
        try:
            patience.wait(error)
        except DaemonUnreachableError:
            break
    assert len(pauses) == reconnect.PATIENCE_SECONDS
    assert capsys.readouterr().err == "gone. Trying again for 60 seconds …\n"
