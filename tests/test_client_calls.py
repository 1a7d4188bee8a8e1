"""client.py against a socket that behaves well, badly, and not at all."""

import grp
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_daemon import HANG_UP, ROOT, VM, Call, Raw, StubDaemon, build_event, no_vm

from oscloudctl import unreachable
from oscloudctl.client import Client, build_error
from oscloudctl.unreachable import explain
from oscloudd.errors import (
    ERRORS_BY_KIND,
    DaemonUnreachableError,
    InternalError,
    NotFoundError,
    OperationTimeoutError,
    UnavailableError,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    yield stub
    stub.close()


@pytest.fixture
def client(daemon: StubDaemon) -> Iterator[Client]:
    with Client(str(daemon.path)) as opened:
        yield opened


def test_gives_the_result_and_sends_named_parameters(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["vm_info"] = VM
    assert client.call("vm_info", {"vm": 1}) == VM
    assert client.call("vm_info", {"vm": "web"}) == VM
    assert daemon.calls == [("vm_info", {"vm": 1}), ("vm_info", {"vm": "web"})]


def test_hands_progress_over_and_skips_other_lines_without_an_id(
    daemon: StubDaemon, client: Client
) -> None:
    def create(call: Call) -> dict[str, int]:
        call.progress("booting", "kernel", 0.5)
        call.send({"jsonrpc": "2.0", "method": "event", "params": {"x": 1}})
        call.send({"jsonrpc": "2.0", "id": 999, "result": "somebody else's"})
        return {"id": 1}

    daemon.answers["vm_create"] = create
    seen: list[dict[str, object]] = []
    assert client.call("vm_create", {"name": "web"}, on_progress=seen.append) == {"id": 1}
    assert seen == [{"job": 7, "stage": "booting", "message": "kernel", "fraction": 0.5}]
    assert client.call("vm_create") == {"id": 1}, "a client that does not care skips them"


def test_a_listener_that_fails_is_not_a_lost_connection(daemon: StubDaemon, client: Client) -> None:
    def create(call: Call) -> dict[str, int]:
        call.progress("booting", "kernel")
        return {"id": 1}

    def fail(_progress: object) -> None:
        raise BrokenPipeError("standard error is closed")

    daemon.answers.update(vm_create=create, vm_list=[])
    with pytest.raises(BrokenPipeError, match="standard error"):
        client.call("vm_create", on_progress=fail)
    assert client.call("vm_list") == [], "and the answer is not taken for another call's"


def test_streams_events_until_the_answer(daemon: StubDaemon, client: Client) -> None:
    def watch(call: Call) -> dict[str, int]:
        call.progress("not", "an event")
        call.event(1)
        call.send({"method": "event", "params": [1]})
        call.event(2)
        return {"latest": 2}

    daemon.answers.update(event_watch=watch, vm_list=[])
    assert list(client.stream("event_watch", {"since": 0})) == [build_event(1), {}, build_event(2)]
    assert daemon.params_of("event_watch") == [{"since": 0}]
    stream = client.stream("event_watch")
    assert next(stream) == build_event(1)
    stream.close()
    assert client.call("vm_list") == [], "on a connection of its own"


def test_a_stream_ends_with_the_error_it_is_answered(daemon: StubDaemon, client: Client) -> None:
    def watch(call: Call) -> None:
        call.event(1)
        raise UnavailableError("cut off", since=1)

    daemon.answers["event_watch"] = watch
    seen: list[object] = []
    with pytest.raises(UnavailableError) as caught:
        seen.extend(client.stream("event_watch"))
    assert caught.value.details == {"since": 1}
    daemon.answers["event_watch"] = lambda call: call.event(1) or HANG_UP
    with pytest.raises(DaemonUnreachableError, match="before it answered event_watch"):
        list(client.stream("event_watch"))


def test_reads_an_answer_of_a_thousand_vms(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["vm_list"] = [{**VM, "id": number} for number in range(1000)]
    assert len(client.call("vm_list")) == 1000


@pytest.mark.parametrize("kind", sorted(set(ERRORS_BY_KIND) - {"unreachable"}))
def test_raises_the_class_the_daemon_named(daemon: StubDaemon, client: Client, kind: str) -> None:
    daemon.fail("vm_info", ERRORS_BY_KIND[kind]("no", hint="try", object="vm", name="9"))
    with pytest.raises(ERRORS_BY_KIND[kind]) as caught:
        client.call("vm_info")
    assert (caught.value.message, caught.value.hint) == ("no", "try")
    assert caught.value.details == {"object": "vm", "name": "9"}


@pytest.mark.parametrize(
    "error",
    [
        {"code": -32601, "message": "no such method", "data": {"kind": "method_not_found"}},
        {"code": -32600, "message": "no such method"},
        {"code": 1, "message": "no such method", "data": {"message": "x", "self": "y"}},
        "no such method",
    ],
)
def test_an_error_of_no_known_kind_is_internal(error: object) -> None:
    built = build_error(error)
    assert isinstance(built, InternalError)
    assert built.message == "no such method"


def test_goes_on_after_an_error(daemon: StubDaemon, client: Client) -> None:
    daemon.fail("vm_info", no_vm(9))
    daemon.answers["vm_list"] = []
    with pytest.raises(NotFoundError):
        client.call("vm_info", {"vm": 9})
    assert client.call("vm_list") == []


def test_an_error_without_an_id_is_meant_for_us(daemon: StubDaemon, client: Client) -> None:
    error = {"code": 11, "message": "too many connections", "data": {"kind": "unavailable"}}
    daemon.answers["vm_list"] = lambda call: call.send({"id": None, "error": error}) or HANG_UP
    with pytest.raises(UnavailableError, match="too many connections"):
        client.call("vm_list")


def test_reads_why_it_was_turned_away_before_it_asked(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = Client(str(path))
        stream = client._connected()
        peer, _ = listener.accept()
        data = b'{"id":null,"error":{"message":"full","data":{"kind":"unavailable"}}}\n'
        peer.sendall(data)
        peer.close()
        with pytest.raises(UnavailableError, match="full"):
            client.call("vm_list")
        stream.close()


def test_silence_ends_in_a_timeout_and_the_late_answer_is_not_mixed_up(
    daemon: StubDaemon, client: Client
) -> None:
    daemon.answers["vm_info"] = lambda call: call.stream.recv(1).decode() + "late"
    daemon.answers["vm_list"] = ["new"]
    with pytest.raises(OperationTimeoutError, match=r"vm_info for 0\.05 seconds"):
        client.call("vm_info", timeout_seconds=0.05)
    assert client.call("vm_list") == ["new"]


def test_a_connection_closed_before_the_answer(daemon: StubDaemon, client: Client) -> None:
    daemon.answers["vm_list"] = HANG_UP
    with pytest.raises(DaemonUnreachableError, match="before it answered vm_list"):
        client.call("vm_list")


@pytest.mark.parametrize("text", ["SSH-2.0-OpenSSH", "[1]", "[" * 200_000, "NaN"])
def test_something_else_on_the_socket(daemon: StubDaemon, client: Client, text: str) -> None:
    daemon.answers["vm_list"] = lambda call: call.send_text(text) or HANG_UP
    with pytest.raises(DaemonUnreachableError, match="not oscloudd"):
        client.call("vm_list")


def test_no_socket_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a checkout with a cloud of its own is told another hint
    with pytest.raises(DaemonUnreachableError, match=r"no socket .*/none\.sock") as caught:
        Client(str(tmp_path / "none.sock")).call("vm_list")
    assert "systemctl start oscloudd" in str(caught.value.hint)


def test_no_socket_there_but_a_checkout_has_one(
    daemon: StubDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run/oscloudd.sock").symlink_to(daemon.path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DaemonUnreachableError) as caught:
        Client("/nowhere/oscloudd.sock").call("vm_list")
    assert f"OSCLOUD_SOCKET={tmp_path}/.run/oscloudd.sock" in str(caught.value.hint)


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "left-over.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(DaemonUnreachableError, match="nobody listens") as caught:
        Client(str(path)).call("vm_list")
    assert "systemctl start oscloudd" in str(caught.value.hint)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_not_allowed(daemon: StubDaemon) -> None:
    daemon.path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    code = f"""
import os, socket
from oscloudctl.unreachable import explain
try:
    os.setuid(65534)
    socket.socket(socket.AF_UNIX).connect({str(daemon.path)!r})
except OSError as error:
    built = explain(error, {str(daemon.path)!r})
    os.write(1, f"{{built.message}}|{{built.hint}}".encode())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    message, hint = done.stdout.split("|")
    assert message.startswith(f"you may not open {daemon.path}")
    assert "usermod -aG oscloud nobody" in hint


def test_another_socket_than_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "oscloudd.sock"
    monkeypatch.setattr(unreachable, "DEFAULT_SOCKET", str(system))
    monkeypatch.chdir(tmp_path)
    assert "systemctl start" in str(explain(FileNotFoundError(), "/run/other.sock").hint)
    system.touch()
    assert f"the system's is {system}" in str(explain(FileNotFoundError(), "/run/other.sock").hint)


def test_a_member_whose_login_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    name = pwd.getpwuid(os.geteuid()).pw_name
    group = grp.struct_group(("oscloud", "x", 4_000_000, [name]))
    monkeypatch.setattr(unreachable.grp, "getgrnam", lambda _name: group)
    hint = str(explain(PermissionError(), "/run/oscloud/oscloudd.sock").hint)
    assert "log in again, or: newgrp oscloud" in hint
    assert "usermod" not in hint


def test_a_path_longer_than_a_socket_address_holds(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    short = StubDaemon(tmp_path / "s")
    try:
        (tmp_path / "s").rename(directory / "oscloudd.sock")
        short.answers["vm_list"] = []
        with Client(str(directory / "oscloudd.sock")) as client:
            assert client.call("vm_list") == []
    finally:
        short.close()


def test_upgrade_hands_over_what_came_behind_the_answer(daemon: StubDaemon, client: Client) -> None:
    def console(call: Call) -> object:
        call.send({"id": call.id, "result": {"escape": None, "log_tail": "tail"}})
        call.stream.sendall(call.stream.recv(100).upper())
        return HANG_UP

    def at_once(call: Call) -> object:
        answer = json.dumps({"id": call.id, "result": {"log_tail": ""}})
        call.stream.sendall(f"{answer}\nlogin: ".encode())
        return Raw({}, lambda stream: None)

    daemon.answers["vm_console"] = console
    raw = client.upgrade("vm_console", {"vm": 1})
    with raw.stream:
        assert raw.answer == {"escape": None, "log_tail": "tail"}
        raw.stream.sendall(b"hello")
        assert raw.stream.recv(100) == b"HELLO"
    daemon.answers["vm_console"] = at_once
    raw = client.upgrade("vm_console", {"vm": 1})
    with raw.stream:
        received = raw.unread
        while chunk := raw.stream.recv(100):
            received += chunk
        assert received.startswith(b"login: ")


def test_the_client_needs_the_standard_library_only() -> None:
    code = (
        "import sys, oscloudctl.client; "
        "print([name for name in sys.modules if 'site-packages' in "
        "str(getattr(sys.modules[name], '__file__', ''))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    outside = [name for name in eval(done.stdout) if not name.startswith(("_distutils", "__ed"))]
    assert outside == []
