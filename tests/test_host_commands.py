"""Commands: output, errors that tell the story, children that never outlive their time."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oscloudd.errors import HostError
from oscloudd.host.commands import CommandLimits, run
from oscloudd.host.processes import session_pids


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-c", program]


def children() -> set[str]:
    """The children of this process, zombies included: the suite's other fixtures may have some."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def test_output_is_given_back() -> None:
    assert asyncio.run(run(["printf", "a\\nb"])) == "a\nb"


def test_input_larger_than_a_pipe_is_read_whole() -> None:
    text = "x" * 300_000
    assert asyncio.run(run(["cat"], input_text=text)) == text


def test_standard_input_is_empty_without_input() -> None:
    assert asyncio.run(run(["cat"], timeout_seconds=5)) == ""


def test_lines_of_any_length_and_both_outputs_are_reported() -> None:
    lines: list[str] = []
    program = (
        "import sys; print('x' * 200_000, flush=True); sys.stderr.write('5%\\r10%\\r\\n');"
        "sys.stdout.write('no end')"
    )
    asyncio.run(run(python(program), on_line=lines.append))
    assert sorted(line[:8] for line in lines) == ["10%", "5%", "no end", "xxxxxxxx"]


def test_what_a_line_callback_raises_is_raised() -> None:
    def refuse(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match="one"):
        asyncio.run(run(["echo", "one"], on_line=refuse))


def test_failure_names_command_status_and_last_line() -> None:
    with pytest.raises(HostError) as caught:
        asyncio.run(run(["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"]))
    assert caught.value.message == "sh failed with status 3: the reason"
    assert caught.value.details["status"] == 3
    assert caught.value.details["output"] == "first\nthe reason"


def test_failure_by_signal_is_named() -> None:
    with pytest.raises(HostError, match="killed by SIGTERM"):
        asyncio.run(run(["sh", "-c", "kill $$"]))


def test_missing_command_comes_with_its_package() -> None:
    with pytest.raises(HostError) as caught:
        asyncio.run(run(["/nowhere/qemu-img", "info"]))
    assert caught.value.hint is not None
    assert "apt-get install qemu-utils" in caught.value.hint


def test_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    monkeypatch.setenv("PATH", "/evil")
    text = asyncio.run(run(["env"], environment={"MORE": "1"}))
    variables = dict(line.split("=", 1) for line in text.splitlines())
    assert variables["TMPDIR"] == "/var/tmp"
    assert variables["MORE"] == "1"
    assert "NOTIFY_SOCKET" not in variables
    assert "/evil" not in variables["PATH"]


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        listed = asyncio.run(run(["ls", "-l", "/proc/self/fd"]))
    assert "secret" not in listed


# A child of another process group in the same session, which a killpg would miss.
FAMILY = "set -m; sleep 1000 & echo $$; wait"


def run_until_started(stop: Callable[[asyncio.Task[str]], None], timeout_seconds: float) -> int:
    """Run FAMILY, call `stop` once it is up, and give its session's id."""
    session_ids: list[int] = []

    async def scenario() -> None:
        task: asyncio.Task[str]

        def started(line: str) -> None:
            session_ids.append(int(line))
            stop(task)

        task = asyncio.create_task(
            run(["bash", "-c", FAMILY], on_line=started, timeout_seconds=timeout_seconds)
        )
        await task

    try:
        asyncio.run(scenario())
    finally:
        assert session_ids
        assert session_pids(session_ids[0]) == []
    return session_ids[0]


def test_timeout_kills_the_whole_session() -> None:
    with pytest.raises(HostError, match=r"bash not done after 0\.5 s"):
        run_until_started(lambda task: None, 0.5)


def test_cancellation_kills_the_whole_session() -> None:
    with pytest.raises(asyncio.CancelledError):
        run_until_started(lambda task: task.cancel() and None, 60)


def test_a_grandchild_with_the_pipe_does_not_keep_us() -> None:
    async def scenario() -> str:
        async with asyncio.timeout(20):
            return await run(["sh", "-c", "sleep 1000 & echo $!"], timeout_seconds=60)

    pid = int(asyncio.run(scenario()))
    os.kill(pid, signal.SIGKILL)


def test_limits_stop_a_greedy_command() -> None:
    limits = CommandLimits(cpu_seconds=5, address_space_bytes=256 << 20)
    with pytest.raises(HostError, match="MemoryError"):
        asyncio.run(run(python("b'x' * (1 << 30)"), limits=limits))


def test_nothing_is_left_open() -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    asyncio.run(run(["true"], input_text="x"))
    with pytest.raises(HostError):
        asyncio.run(run(["/nowhere/at-all"]))
    assert descriptors() == before
