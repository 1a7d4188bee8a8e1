"""template-import and template-delete on a scripted daemon: what is sent, and what is said."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import DEADLINE_SECONDS, HANG_UP, JOB, Call, Oscloudctl, Running, StubDaemon

from oscloudctl.template_import import suggest_name
from oscloudd.errors import (
    CancelledJobError,
    CloudError,
    InUseError,
    InvalidArgumentError,
    UnavailableError,
)

CONTENT = bytes(range(256)) * 8192
TEMPLATE = {
    "name": "mine", "state": "READY", "size": 2 << 20, "used_by": 0, "source": "import",
    "os": "mine", "description": "imported from mine.img",
}  # fmt: skip


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    return Oscloudctl(daemon, tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "mine.img"
    path.write_bytes(CONTENT)
    return path


class Taker:
    """Answers template_import: asks for the file, takes so much of it, and says how it went."""

    def __init__(self, daemon: StubDaemon, wanted: int | None = None, answer: Any = None) -> None:
        self.content = b""
        self._wanted, self._answer = wanted, TEMPLATE if answer is None else answer
        daemon.answers["template_import"] = self._take

    def _take(self, call: Call) -> Any:
        call.send({"jsonrpc": "2.0", "method": "send", "params": {"size": call.params["size"]}})
        left = call.params["size"] if self._wanted is None else self._wanted
        while left and (chunk := call.stream.recv(min(left, 1 << 16))):
            self.content += chunk
            left -= len(chunk)
            call.progress("receiving", "MiB", len(self.content) / len(CONTENT))
        # What follows a file is not read as requests any more.
        answer: dict[str, Any] = {"result": self._answer}
        if isinstance(self._answer, CloudError):
            error = self._answer
            answer = {
                "error": {"code": error.code, "message": error.message, "data": error.as_data()}
            }
        call.send({"jsonrpc": "2.0", "id": call.id, **answer})
        return HANG_UP


def test_a_file_is_sent_when_the_daemon_asks(
    ctl: Oscloudctl, daemon: StubDaemon, image: Path
) -> None:
    taker = Taker(daemon)
    done = ctl("template-import", "mine.img", "--os", "Mine 1", "--sha256", "ab" * 32)
    assert taker.content == CONTENT
    assert daemon.calls == [("template_import", {
        "name": "mine", "size": len(CONTENT), "file_name": "mine.img", "os": "Mine 1",
        "sha256": "ab" * 32,
    })]  # fmt: skip
    assert done.stdout.splitlines()[1].split()[:2] == ["mine", "READY"]
    answer = ctl("template-import", str(image), "--name", "other", "--format", "raw", "--json")
    assert json.loads(answer.stdout) == TEMPLATE
    assert daemon.calls[1][1]["name"] == "other"
    assert daemon.calls[1][1]["format"] == "raw"


def test_an_address_is_left_to_the_daemon(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["template_import"] = TEMPLATE
    url = "https://h/images/Mine%20OS-1.2.qcow2?download=1"
    assert ctl("template-import", url, "--firmware", "uefi", "-q").stdout == "mine\n"
    wanted = {"name": "Mine-OS-1.2", "url": url, "firmware": "uefi"}
    assert daemon.calls == [("template_import", wanted)]


@pytest.mark.parametrize("wanted", [0, 100_000])
def test_a_daemon_that_has_seen_enough_is_heard(
    ctl: Oscloudctl, daemon: StubDaemon, image: Path, wanted: int
) -> None:
    Taker(daemon, wanted, InvalidArgumentError("image mine.img is refused", hint="convert it"))
    done = ctl("template-import", str(image), status=2)
    assert done.stderr.splitlines()[-2:] == [
        "Error: image mine.img is refused", "Hint: convert it",
    ]  # fmt: skip


def test_a_file_that_shrinks_ends_early(ctl: Oscloudctl, daemon: StubDaemon, image: Path) -> None:
    answer = UnavailableError("the file ended after 10 of 20 bytes")
    taker = Taker(daemon, None, answer)
    ask = daemon.answers["template_import"]

    def cut_first(call: Call) -> Any:
        os.truncate(image, 1000)
        return ask(call)

    daemon.answers["template_import"] = cut_first
    assert "ended after" in ctl("template-import", str(image), status=11).stderr
    assert taker.content == CONTENT[:1000]


def test_ctrl_c_cancels_while_a_file_is_sent(
    daemon: StubDaemon, image: Path, tmp_path: Path
) -> None:
    cancelled = threading.Event()
    Taker(daemon, 0, CancelledJobError("job 7 (template_import mine) was cancelled"))
    answer = daemon.answers["template_import"]

    def ask_and_not_read(call: Call) -> Any:
        call.progress("receiving", "MiB")
        cancelled.wait(DEADLINE_SECONDS)
        return answer(call)

    def cancel(_call: Call) -> dict[str, Any]:
        cancelled.set()
        return {**JOB, "state": "CANCELLED"}

    daemon.answers |= {"template_import": ask_and_not_read, "job_cancel": cancel}
    with Running(daemon, tmp_path, "template-import", str(image)) as running:
        running.see("receiving: MiB")
        running.interrupt()
        running.see("Cancelling job 7")
        status, _, stderr = running.end()
    assert (status, cancelled.is_set()) == (130, True)
    assert "was cancelled" in stderr


def test_what_is_no_file_is_refused_before_the_daemon_is_asked(
    ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name, words in (
        ("none", "No such file"), ("fifo", "no ordinary file"), ("empty", "is empty"),
        (".", "no ordinary file"), ("/dev/null", "no ordinary file"),
    ):  # fmt: skip
        assert words in ctl("template-import", name, "--name", "x", status=2).stderr
    assert "can't be left alone" in ctl("template-import", "none", "--no-wait", status=2).stderr
    assert daemon.calls == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("debian-12.qcow2", "debian-12"), ("/a/b/Disk 1.img", "Disk-1"), ("a.raw", "a"),
        ("http://h/x/ubuntu_22.04.img?a=/b", "ubuntu_22.04"), ("./.hidden.img", "hidden"),
        ("x" * 99, "x" * 63), ("ä.img", ""),
    ],
)  # fmt: skip
def test_a_name_is_made_of_the_files(source: str, name: str) -> None:
    assert suggest_name(source) == name


def test_deleting_goes_on_after_a_failure(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def delete(call: Call) -> Any:
        if call.params["template"] == "used":
            raise InUseError("disks stand on template 'used': web-1")
        return {"name": call.params["template"]}

    daemon.answers["template_delete"] = delete
    done = ctl("template-delete", "a", "used", "b", status=6)
    assert done.stdout == "a: deleted\nb: deleted\n"
    assert done.stderr == "Error: disks stand on template 'used': web-1\n"
    assert ctl("template-delete", "-y", "a", "-q").stdout == "a\n"
    assert json.loads(ctl("template-delete", "a", "--json").stdout) == {"name": "a"}
    assert "which template" in ctl("template-delete", status=2).stderr


def test_an_interrupt_before_there_is_a_job_ends_it(
    daemon: StubDaemon, image: Path, tmp_path: Path
) -> None:
    daemon.answers["template_import"] = lambda call: call.wait_until_gone()
    with Running(daemon, tmp_path, "template-import", str(image)) as running:
        for _ in range(2000):
            if daemon.calls:
                break
            signal.sigtimedwait([], 0.01)
        running.interrupt()
        assert running.end()[0] == 130
