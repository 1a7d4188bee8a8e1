"""Ctrl-C and SIGTERM while a job is waited for: real signals, with a terminal and without."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import (
    DEADLINE_SECONDS,
    HANG_UP,
    JOB,
    VM,
    Call,
    Running,
    ScriptedJob,
    StubDaemon,
    Terminal,
)

from oscloudctl import main
from oscloudd.errors import HostError, InvalidStateError, PermissionDeniedError

CANCELLING = "Cancelling job 7 … (Ctrl-C again leaves it running)"
CANCELLED = "Error: job 7 (vm_create web) was cancelled\n"
GOES_ON = "job 7 goes on: oscloudctl job-wait 7\n"
CREATE = ("vm-create", "web", "--no-ssh-key")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    stub.answers.update(vm_list=[VM], vm_info=VM)
    yield stub
    stub.close()


@pytest.fixture
def start(daemon: StubDaemon, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*arguments: str, begun: bool = True) -> Running:
        started.append(Running(daemon, tmp_path, *arguments))
        if begun:
            started[-1].see("booting: kernel\n")
        return started[-1]

    yield begin
    for each in started:
        each.__exit__()


@pytest.fixture
def terminal(daemon: StubDaemon, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(daemon, tmp_path, *arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (CREATE, "vm_create"),
        (("vm-start", "web"), "vm_start"),
        (("vm-stop", "web"), "vm_stop"),
        (("vm-restart", "web"), "vm_restart"),
        (("vm-delete", "web", "-y"), "vm_delete"),
        (("template-build", "tiny"), "template_build"),
        (("template-download", "tiny"), "template_download"),
        (("template-import", "http://h/x.img"), "template_import"),
    ],
)
def test_ctrl_c_cancels_the_job_over_another_connection(
    daemon: StubDaemon, start: Callable[..., Running], arguments: tuple[str, ...], method: str
) -> None:
    job = ScriptedJob(daemon, method)
    running = start(*arguments)
    running.interrupt()
    assert running.end() == (130, "", f"{CANCELLING}\n{CANCELLED}")
    assert daemon.params_of("job_cancel") == [{"job": 7}]
    assert job.connections[0] is not job.connections[1]


def test_on_a_terminal(daemon: StubDaemon, terminal: Callable[..., Terminal]) -> None:
    ScriptedJob(daemon, "vm_create")
    window = terminal(*CREATE)
    window.see(b"booting: kernel")
    window.type(b"\x03")
    before = window.see(CANCELLING.encode())
    assert before.endswith(b"\r\x1b[K"), "the line is wiped, and the ^C with it"
    window.see(b"Error: job 7 (vm_create web) was cancelled")
    assert window.wait() == 130
    assert daemon.params_of("job_cancel") == [{"job": 7}]


def test_a_second_ctrl_c_leaves_the_job_running(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    job, asked = ScriptedJob(daemon, "vm_create"), threading.Event()

    def cancel_for_ever(call: Call) -> Any:
        asked.set()
        return call.wait_until_gone()

    daemon.answers["job_cancel"] = cancel_for_ever
    window = terminal(*CREATE)
    window.see(b"booting: kernel")
    window.type(b"\x03")
    assert asked.wait(DEADLINE_SECONDS)
    window.type(b"\x03")
    window.see(b"job 7 goes on: oscloudctl job-wait 7\r\n")
    assert window.wait() == 130
    assert job.gone.wait(DEADLINE_SECONDS)
    assert len(daemon.params_of("job_cancel")) == 1


def test_too_late_to_cancel(daemon: StubDaemon, start: Callable[..., Running]) -> None:
    job = ScriptedJob(daemon, "vm_start")

    def finish(_call: Call) -> Any:
        job.end.set()
        return {**JOB, "state": "DONE"}

    daemon.answers["job_cancel"] = finish
    running = start("vm-start", "web")
    running.interrupt()
    late = "It was too late to cancel job 7: it is done.\n"
    assert running.end() == (0, "web: RUNNING\n", f"{CANCELLING}\n{late}")


@pytest.mark.parametrize(
    "refusal", [InvalidStateError("job 7 is past that"), PermissionDeniedError("not yours")]
)
def test_a_refusal_is_told_and_the_wait_goes_on(
    daemon: StubDaemon, start: Callable[..., Running], refusal: Any
) -> None:
    job = ScriptedJob(daemon, "vm_create")
    job.refusal = refusal
    running = start(*CREATE)
    running.interrupt()
    running.see(f"It goes on: {refusal.message}. (Ctrl-C leaves it running)\n")
    job.end.set()
    status, stdout, stderr = running.end()
    assert status == 0
    assert "192.168.0.2" in stdout
    assert stderr.startswith("Next: "), "nothing about too late"


def test_ctrl_c_after_a_refusal_leaves(daemon: StubDaemon, start: Callable[..., Running]) -> None:
    job = ScriptedJob(daemon, "vm_create")
    job.refusal = InvalidStateError("job 7 is past that")
    running = start(*CREATE)
    running.interrupt()
    running.see("leaves it running)\n")
    running.see("leaves it running)\n")
    running.interrupt()
    assert running.end() == (130, "", GOES_ON)
    assert job.gone.wait(DEADLINE_SECONDS)


def test_a_job_that_fails_while_it_is_cancelled(
    daemon: StubDaemon, start: Callable[..., Running]
) -> None:
    job = ScriptedJob(daemon, "vm_create")

    def fail(call: Call) -> Any:
        job.error = HostError("qemu is gone")
        job.end.set()
        return call.wait_until_gone()

    daemon.answers["job_cancel"] = fail
    running = start(*CREATE)
    running.interrupt()
    assert running.end() == (10, "", f"{CANCELLING}\nError: qemu is gone\n")


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGINT, 130, "\nInterrupted.\n"), (signal.SIGTERM, 143, "")],
)
def test_before_there_is_a_job_both_just_leave(
    daemon: StubDaemon,
    start: Callable[..., Running],
    number: signal.Signals,
    status: int,
    words: str,
) -> None:
    asked, left = threading.Event(), threading.Event()

    def hang(call: Call) -> Any:
        asked.set()
        call.wait_until_gone()
        left.set()
        return HANG_UP

    daemon.answers["vm_stop"] = hang
    running = start("vm-stop", "web", begun=False)
    assert asked.wait(DEADLINE_SECONDS)
    running.process.send_signal(number)
    assert running.end() == (status, "", words)
    assert left.wait(DEADLINE_SECONDS)
    assert daemon.params_of("job_cancel") == []


def test_sigterm_leaves_the_job_running(daemon: StubDaemon, start: Callable[..., Running]) -> None:
    job = ScriptedJob(daemon, "vm_create")
    running = start(*CREATE)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == (128 + signal.SIGTERM, "", GOES_ON)
    assert job.gone.wait(DEADLINE_SECONDS)
    assert daemon.params_of("job_cancel") == []


def test_the_vms_after_the_cancelled_one_are_left_alone(
    daemon: StubDaemon, start: Callable[..., Running]
) -> None:
    ScriptedJob(daemon, "vm_stop")
    running = start("vm-stop", "web", "db", "2")
    running.interrupt()
    assert running.end() == (130, "", f"{CANCELLING}\n{CANCELLED}Not begun: db, 2\n")
    assert len(daemon.params_of("vm_stop")) == 1


def test_job_wait_is_only_left(daemon: StubDaemon, start: Callable[..., Running]) -> None:
    job = ScriptedJob(daemon, "job_wait")
    daemon.answers["job_info"] = JOB
    running = start("job-wait", "7")
    running.interrupt()
    assert running.end() == (130, "", GOES_ON)
    assert job.gone.wait(DEADLINE_SECONDS)
    assert daemon.params_of("job_cancel") == []


def test_a_daemon_that_dies_under_a_job_leaves_word_of_it(
    daemon: StubDaemon, start: Callable[..., Running]
) -> None:
    job = ScriptedJob(daemon, "vm_create")
    running = start(*CREATE)
    job.answer = HANG_UP
    job.end.set()
    status, _, stderr = running.end()
    assert status == 12
    assert "Hint: the next daemon goes on with it: oscloudctl job-wait 7\n" in stderr


def test_ctrl_c_in_the_middle_of_the_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", run)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            main.main()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ignored_sigint_stays_ignored(daemon: StubDaemon, tmp_path: Path) -> None:
    # What `oscloudctl … &` in a script gets: Ctrl-C is not meant for it.
    job = ScriptedJob(daemon, "vm_stop")
    running = Running(daemon, tmp_path, "vm-stop", "web", sigint="SIG_IGN")
    with running:
        running.see("booting: kernel\n")
        running.interrupt()
        job.end.set()
        assert running.end() == (0, "web: RUNNING\n", "")
    assert daemon.params_of("job_cancel") == []


def test_many_interrupts_never_show_a_traceback(daemon: StubDaemon, tmp_path: Path) -> None:
    for _ in range(3):
        ScriptedJob(daemon, "vm_create")
        with Running(daemon, tmp_path, *CREATE) as running:
            running.see("booting: kernel\n")
            for _ in range(20):
                running.interrupt()
            status, stdout, stderr = running.end()
        assert (status, stdout) == (130, "")
        assert "Traceback" not in stderr
        assert "job 7" in stderr
