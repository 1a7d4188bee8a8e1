"""What systemd hands the daemon and what it is asked for: sockets, scopes, transient services.

With a real systemd all of this runs in test_system_package.py.
"""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oscloudd.errors import HostError
from oscloudd.host import activation
from oscloudd.host.activation import is_service, take_listener
from oscloudd.host.journal import choose_formatter
from oscloudd.host.scopes import (
    VmScope,
    build_scope_arguments,
    ensure_scope,
    find_missing_controllers,
    is_in_unit,
)
from oscloudd.host.transient_services import build_service_arguments, run_apart

SCOPE = VmScope(7, "web", 1 << 30, 2)

# What comes before it has put descriptor 3 in place; it is told so as systemd would tell it.
_TAKE = """
import os
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=COUNT)
from oscloudd.errors import HostError
from oscloudd.host.activation import take_listener
try:
    listener = take_listener()
except HostError as error:
    print(error.message)
else:
    print(listener.getsockname(), os.get_inheritable(3), "LISTEN_FDS" in os.environ)
"""


def test_a_socket_of_systemds_is_taken(tmp_path: Path) -> None:
    script = f"""
import os, socket
bound = socket.socket(socket.AF_UNIX)
bound.bind({str(tmp_path / "sock")!r})
os.dup2(bound.fileno(), 3)
"""
    assert run_with_descriptor(script) == f"{tmp_path / 'sock'} False False"


def run_with_descriptor(prepare: str, count: str = "1") -> str:
    """Give what `take_listener` makes of the descriptor 3 that `prepare` has put there."""
    program = f"{prepare}\nCOUNT = {count!r}\n{_TAKE}"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("prepare", "count", "complaint"),
    [
        ("", "2", "systemd passed 2 sockets"),
        (
            "import os, socket\nkept = socket.socket()\nos.dup2(kept.fileno(), 3)",
            "1",
            "systemd passed a socket of AF_INET, SOCK_STREAM",
        ),
    ],
)
def test_what_else_is_passed_is_refused(prepare: str, count: str, complaint: str) -> None:
    assert run_with_descriptor(prepare, count) == complaint


def test_sockets_for_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert take_listener() is None
    assert "LISTEN_FDS" not in os.environ


def test_only_what_systemd_itself_started_is_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "_BOOTED", tmp_path)
    assert not is_service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    assert is_service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))
    assert not is_service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setattr(activation, "_BOOTED", tmp_path / "none")
    assert not is_service()


def test_the_journal_gets_priorities_and_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(level: int, text: str) -> str:
        record = logging.LogRecord("oscloudd", level, "", 0, text, None, None)
        return choose_formatter(stream.fileno()).format(record)

    with (tmp_path / "stream").open("w") as stream:
        assert say(logging.WARNING, "no tap").endswith(" WARNING oscloudd: no tap")
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert say(logging.WARNING, "no tap") == "<4>oscloudd: no tap"
        assert say(logging.CRITICAL, "a\nb") == "<3>oscloudd: a\n<3>b"
        assert say(logging.DEBUG, "x") == "<7>oscloudd: x"
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:1")
        assert not say(logging.INFO, "x").startswith("<")


def test_a_scope_has_its_vms_name_and_limits_of_its_size() -> None:
    arguments = build_scope_arguments(4711, SCOPE)
    text = " ".join(arguments)
    assert arguments[:2] == ["oscloud-vm-7.scope", "fail"]
    assert "Description s OS Cloud vm web" in text
    assert "PIDs au 1 4711" in text
    assert f"MemoryMax t {(1 << 30) + (16 << 20) + (256 << 20)}" in text
    assert "CPUQuotaPerSecUSec t 3000000" in text
    assert "CPUWeight t 200" in text
    assert "TasksMax t 130" in text
    assert "Before as 1 oscloud-guests.service" in text


def test_the_number_of_properties_is_what_follows() -> None:
    words = build_scope_arguments(1, SCOPE)[2:]
    left = words[1:]
    for _ in range(int(words[0])):
        kind = left[1]
        in_array = {"s": None, "t": None, "au": 1, "as": 1, "a(ss)": 2}[kind]
        length = 1 if in_array is None else 1 + in_array * int(left[2])
        left = left[2 + length :]
    assert left == ["0"]


def test_heaviest_weight_is_systemds() -> None:
    assert "CPUWeight t 10000" in " ".join(build_scope_arguments(1, VmScope(1, "a", 1, 500)))


def test_a_process_is_found_in_its_unit() -> None:
    line = Path("/proc/self/cgroup").read_text().splitlines()[0]
    assert is_in_unit(os.getpid(), line.rpartition("/")[2])
    assert not is_in_unit(os.getpid(), "oscloud-vm-7.scope")
    assert not is_in_unit(0, "oscloud-vm-7.scope")


def test_what_limits_need_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_BOOTED", tmp_path)
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    assert find_missing_controllers(tmp_path) == ["memory", "pids", "cpu"]
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory\n")
    assert find_missing_controllers(tmp_path) == ["pids"]


def test_outside_systemd_there_is_no_scope(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    assert find_missing_controllers() is None
    asyncio.run(ensure_scope(os.getpid(), SCOPE))
    assert caplog.text == ""


def test_outside_systemd_a_build_is_a_child() -> None:
    lines: list[str] = []
    said = asyncio.run(
        run_apart(["echo", "hello"], "x.service", timeout_seconds=10, on_line=lines.append)
    )
    assert (said, lines) == ("hello\n", ["hello"])
    with pytest.raises(HostError, match="status 1"):
        asyncio.run(run_apart(["false"], "x.service", timeout_seconds=10))


def test_a_build_is_a_service_with_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    arguments = build_service_arguments(["/t/build", "/out"], "oscloud-build-tiny.service")
    assert arguments[0] == "systemd-run"
    assert arguments[-3:] == ["--", "/t/build", "/out"]
    assert "--unit=oscloud-build-tiny.service" in arguments
    assert "--setenv=https_proxy=http://proxy.example:3128" in arguments
