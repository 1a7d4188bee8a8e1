"""What happens on a terminal: the console, the redrawn line, questions, Ctrl-C. A real pty each."""

import signal
import socket
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import (
    DEADLINE_SECONDS,
    VM,
    Call,
    Oscloudctl,
    Raw,
    StubDaemon,
    Terminal,
)

CTRL_BRACKET = b"\x1d"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    stub.answers.update(vm_list=[VM], vm_info=VM)
    yield stub
    stub.close()


@pytest.fixture
def terminal(daemon: StubDaemon, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str, columns: int = 80) -> Terminal:
        opened.append(Terminal(daemon, tmp_path, *arguments, columns=columns))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def echo_upper(stream: socket.socket) -> None:
    """Talks like a guest that shouts; hangs up on `logout`."""
    while (received := stream.recv(1024)) and received != b"logout":
        stream.sendall(received.upper())
    stream.sendall(b"bye")


@pytest.fixture
def console(daemon: StubDaemon) -> StubDaemon:
    daemon.answers["vm_console"] = Raw({"escape": None, "log_tail": "web login: "}, echo_upper)
    return daemon


def test_console_carries_raw_bytes_and_ctrl_bracket_leaves(
    console: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    window = terminal("vm-console", "web")
    window.see(b"Ctrl-] leaves.")
    window.see(b"web login: ")
    window.type(b"root")
    window.see(b"ROOT")
    window.type(b"\x03\x04\x1a")  # Ctrl-C, Ctrl-D, Ctrl-Z belong to the guest
    window.see(b"\x03\x04\x1a")
    window.type(b"x" + CTRL_BRACKET + b"never sent")
    window.see(b"Left the console.")
    assert window.wait() == 0
    assert termios.tcgetattr(window.slave) == window.mode
    assert console.calls == [("vm_console", {"vm": "web"})]


def test_console_ends_when_the_guest_is_gone(
    console: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    window = terminal("vm-console", "web")
    window.see(b"login: ")
    window.type(b"a")
    window.see(b"A")
    window.type(b"logout")
    window.see(b"bye")
    window.see(b"The console was closed.")
    assert window.wait() == 0
    assert termios.tcgetattr(window.slave) == window.mode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_console_gives_the_terminal_back_when_killed(
    console: StubDaemon, terminal: Callable[..., Terminal], number: signal.Signals
) -> None:
    window = terminal("vm-console", "web")
    window.see(b"login: ")
    window.type(b"a")
    window.see(b"A")
    assert termios.tcgetattr(window.slave) != window.mode
    window.process.send_signal(number)
    assert window.wait() == 128 + number
    assert termios.tcgetattr(window.slave) == window.mode


def test_console_copies_an_input_that_is_no_terminal(console: StubDaemon, tmp_path: Path) -> None:
    done = Oscloudctl(console, tmp_path)("vm-console", "web", input_text="who\x1dami")
    assert done.stdout == "web login: WHO\x1dAMIbye"


def test_log_follow_shows_the_console_and_sends_nothing(daemon: StubDaemon, tmp_path: Path) -> None:
    tail = {"escape": None, "log_tail": "one\ntwo\nthree\n"}
    daemon.answers["vm_console"] = Raw(tail, lambda stream: stream.sendall(b"four\n"))
    done = Oscloudctl(daemon, tmp_path)("vm-log", "web", "-f", "-n", "2", input_text="typed")
    assert done.stdout == "two\nthree\nfour\n"


def test_progress_is_one_redrawn_line(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    def create(call: Call) -> Any:
        call.progress("disk", "overlay")
        assert seen.wait(DEADLINE_SECONDS)
        call.progress("booting", "the kernel " * 20, 0.5)
        return VM

    seen = threading.Event()
    daemon.answers["vm_create"] = create
    window = terminal("vm-create", "web", "--no-ssh-key", columns=60)
    drawn = window.see(b"overlay") + b"overlay"
    seen.set()
    drawn += window.see(b"192.168.0.2")
    window.see(b"Next: oscloudctl vm-ssh web")
    assert window.wait() == 0
    lines = drawn.partition(b"\r\x1b[K\x1b")[0].split(b"\r\x1b[K")
    assert lines[1] == b"[   0 s] disk: overlay"
    assert lines[2].startswith(b"[   0 s] booting: the kernel")
    assert len(lines[2]) == 59, "as wide as the terminal, less the corner"
    assert lines[3].startswith(b"id "), "the line is wiped before the answer"


def test_the_elapsed_time_moves_while_nothing_is_said(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    def create(call: Call) -> Any:
        call.progress("booting", "kernel")
        return call.wait_until_gone()

    daemon.answers["vm_create"] = create
    window = terminal("vm-create", "web", "--no-ssh-key")
    window.see(b"[   0 s] booting: kernel")
    window.see(b"[   1 s] booting: kernel")


def test_ctrl_c_is_130(daemon: StubDaemon, terminal: Callable[..., Terminal]) -> None:
    asked = socket.socketpair()

    def hang(call: Call) -> Any:
        asked[0].sendall(b"!")
        call.stream.recv(1)

    daemon.answers["vm_list"] = hang
    window = terminal("vm-list")
    asked[1].settimeout(DEADLINE_SECONDS)
    assert asked[1].recv(1) == b"!"
    window.type(b"\x03")
    assert window.wait() == 130
    window.see(b"Interrupted.")
    for end in asked:
        end.close()


def test_a_table_is_cut_to_the_terminal(terminal: Callable[..., Terminal]) -> None:
    window = terminal("vm-list", columns=20)
    window.see("ID  NAME  STATE    …".encode())
    assert window.wait() == 0


@pytest.mark.parametrize(("answer", "status", "calls"), [(b"y", 0, 1), (b"n", 1, 0), (b"", 1, 0)])
def test_delete_asks_first(
    daemon: StubDaemon,
    terminal: Callable[..., Terminal],
    answer: bytes,
    status: int,
    calls: int,
) -> None:
    daemon.answers["vm_delete"] = {"deleted": 1, "name": "web"}
    window = terminal("vm-delete", "web", "1")
    window.see(b"Delete web, 1 with all that is on their disks?")
    window.type(answer + b"\n")
    window.see(b"deleted")
    assert window.wait() == status
    assert len(daemon.params_of("vm_delete")) == calls * 2


def test_delete_with_yes_does_not_ask(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    daemon.answers["vm_delete"] = {"deleted": 1, "name": "web"}
    window = terminal("vm-delete", "-y", "web")
    assert b"?" not in window.see(b"web: deleted")
    assert window.wait() == 0


def test_a_password_is_asked_for_twice_and_not_shown(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    daemon.answers["vm_create"] = VM
    window = terminal("vm-create", "web", "--no-ssh-key", "--password", "-")
    for prompt in (b"Root's password: ", b"confirmation: "):
        window.see(prompt)
        window.type(b"se cret\n")
    assert b"cret" not in window.see(b"Next:")
    assert window.wait() == 0
    assert daemon.params_of("vm_create")[0]["password"] == "se cret"


def test_a_log_on_a_terminal_is_harmless(
    daemon: StubDaemon, terminal: Callable[..., Terminal]
) -> None:
    daemon.answers["vm_log"] = {"text": "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2Jz\rq\n"}
    window = terminal("vm-log", "web")
    window.see(b"aredzq")
    assert window.wait() == 0
