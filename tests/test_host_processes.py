"""Processes: identities that survive pid reuse, handles that see the end."""

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from oscloudd.errors import HostError, NotFoundError, OperationTimeoutError
from oscloudd.host.processes import (
    ExitStatus,
    ProcessHandle,
    boot_id,
    find_process,
    find_processes_below,
    find_processes_in,
    is_same_process,
    open_process,
    peer_pid,
    resource_usage,
    start_process,
)


@pytest.fixture
def sleeper() -> Iterator[ProcessHandle]:
    handle = start_process(["sleep", "1000"])
    yield handle
    if handle.is_alive():
        handle.send_signal(signal.SIGKILL)
        asyncio.run(handle.wait_exit(10))
    handle.close()


def test_a_started_process_is_found_by_its_identity(sleeper: ProcessHandle) -> None:
    assert find_process(sleeper.identity.pid) == sleeper.identity
    again = open_process(sleeper.identity)
    assert again.is_alive()
    again.close()


def test_it_leads_a_session_of_its_own(sleeper: ProcessHandle) -> None:
    assert os.getsid(sleeper.identity.pid) == sleeper.identity.pid


def test_the_boot_is_what_systemd_says_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCLOUD_BOOT_ID", "abc")
    assert boot_id.__wrapped__() == "abc"
    monkeypatch.delenv("OSCLOUD_BOOT_ID")
    assert boot_id.__wrapped__() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("field", ["start_time_ticks", "boot_id"])
def test_a_reused_pid_is_not_taken_for_the_process(sleeper: ProcessHandle, field: str) -> None:
    other = dataclasses.replace(sleeper.identity, **{field: 1 if field[0] == "s" else "other"})
    with pytest.raises(NotFoundError, match="another may have its number"):
        open_process(other)


def test_a_zombie_is_no_process() -> None:
    handle = start_process(["true"])
    os.waitid(os.P_PID, handle.identity.pid, os.WEXITED | os.WNOWAIT)
    assert not handle.is_alive()
    assert find_process(handle.identity.pid) is None
    with pytest.raises(NotFoundError):
        open_process(handle.identity)
    assert asyncio.run(handle.wait_exit(5)) == ExitStatus(code=0)
    handle.close()


def test_exit_codes_and_signals_are_told_apart(sleeper: ProcessHandle) -> None:
    failing = start_process(["sh", "-c", "exit 7"])
    assert asyncio.run(failing.wait_exit(10)) == ExitStatus(code=7)
    failing.close()
    sleeper.send_signal(signal.SIGTERM)
    assert asyncio.run(sleeper.wait_exit(10)) == ExitStatus(signal=signal.SIGTERM)
    with pytest.raises(NotFoundError):
        sleeper.send_signal(signal.SIGTERM)


def test_several_may_wait_and_one_may_give_up(sleeper: ProcessHandle) -> None:
    async def scenario() -> list[ExitStatus]:
        waiters = [asyncio.create_task(sleeper.wait_exit(10)) for _ in range(3)]
        with pytest.raises(OperationTimeoutError, match="has not ended within"):
            await sleeper.wait_exit(0.01)
        sleeper.send_signal(signal.SIGKILL)
        return await asyncio.gather(*waiters)

    assert asyncio.run(scenario()) == [ExitStatus(signal=signal.SIGKILL)] * 3


def test_starting_another_does_not_steal_the_exit_status() -> None:
    first = start_process(["sh", "-c", "exit 5"])
    os.waitid(os.P_PID, first.identity.pid, os.WEXITED | os.WNOWAIT)
    subprocess.run(["true"], check=True)  # its _cleanup() reaps what it knows
    assert asyncio.run(first.wait_exit(5)) == ExitStatus(code=5)
    first.close()


def test_the_end_of_a_process_that_is_not_our_child_is_seen() -> None:
    # The shell leaves its child behind, which then is no child of ours.
    with subprocess.Popen(
        ["sh", "-c", "sleep 1000 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
    identity = find_process(pid)
    assert identity is not None
    handle = open_process(identity)
    handle.send_signal(signal.SIGKILL)
    assert asyncio.run(handle.wait_exit(10)) == ExitStatus()
    handle.close()


def test_close_wakes_who_waits(sleeper: ProcessHandle) -> None:
    async def scenario() -> None:
        other = open_process(sleeper.identity)
        waiter = asyncio.create_task(other.wait_exit(60))
        await asyncio.sleep(0)
        other.close()
        other.close()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(scenario())
    assert sleeper.is_alive()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_user_is_dropped_after_the_directory_is_entered(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    read_end, write_end = os.pipe()
    script = "id -u; id -g; id -G; umask; grep CapEff /proc/self/status; readlink /proc/self/cwd"
    handle = start_process(
        ["sh", "-c", script], cwd=private, user="nobody", extra_groups=(12345,), stdout_fd=write_end
    )
    os.close(write_end)
    with os.fdopen(read_end) as output:
        lines = output.read().splitlines()
    assert asyncio.run(handle.wait_exit(10)) == ExitStatus(code=0)
    handle.close()
    assert lines[:2] == ["65534", "65534"]
    assert set(lines[2].split()) == {"65534", "12345"}
    assert lines[3] == "0077"
    assert int(lines[4].split()[1], 16) == 0
    assert lines[5] == str(private)


def test_only_passed_descriptors_arrive_under_their_numbers(tmp_path: Path) -> None:
    passed = os.open(tmp_path, os.O_RDONLY)
    read_end, write_end = os.pipe()
    handle = start_process(
        ["sh", "-c", f"readlink /proc/$$/fd/{passed}; ls /proc/$$/fd | wc -l"],
        pass_fds=[passed],
        stdout_fd=write_end,
    )
    os.close(write_end)
    os.close(passed)
    with os.fdopen(read_end) as output:
        assert output.read().split() == [str(tmp_path), "4"]
    asyncio.run(handle.wait_exit(10))
    handle.close()


def test_unknown_user_and_missing_command_are_host_errors() -> None:
    with pytest.raises(HostError, match="no user 'nobody-knows'"):
        start_process(["true"], user="nobody-knows")
    with pytest.raises(HostError, match="can't be started") as caught:
        start_process(["qemu-system-none"])
    assert caught.value.hint is not None


def test_peer_of_a_socket_is_us() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_pid(left) == (os.getpid(), os.getuid(), os.getgid())


def test_resource_usage_of_ourselves_and_of_nobody() -> None:
    usage = resource_usage(os.getpid())
    assert usage is not None
    assert usage.resident_bytes > 1 << 20
    assert usage.cpu_seconds > 0
    assert resource_usage(1 << 22) is None


def test_the_same_process_is_told_from_another_of_its_number(sleeper: ProcessHandle) -> None:
    assert is_same_process(sleeper.identity)
    assert not is_same_process(dataclasses.replace(sleeper.identity, start_time_ticks=1))
    assert not is_same_process(dataclasses.replace(sleeper.identity, boot_id="other"))
    sleeper.send_signal(signal.SIGKILL)
    asyncio.run(sleeper.wait_exit(10))
    assert not is_same_process(sleeper.identity)


def test_processes_are_found_by_where_they_work(tmp_path: Path) -> None:
    link = tmp_path / "link"
    top = tmp_path / "vms"
    for name in ("1", "2", "2/deeper", "12"):
        (top / name).mkdir(parents=True, exist_ok=True)
    link.symlink_to(top)
    assert find_processes_in(top / "1") == []
    handles = [
        start_process(["sleep", "1000"], cwd=directory)
        for directory in (top / "1", top / "2" / "deeper", top / "12", top, tmp_path)
    ]
    one, deeper, twelve = (handle.identity for handle in handles[:3])
    try:
        (top / "12").rmdir()
        for seen in (top, link):
            assert set(find_processes_below(seen)) == {
                (one, seen / "1"),
                (deeper, seen / "2"),
                (twelve, seen / "12"),
            }
            assert find_processes_in(seen / "1") == [one]
            assert find_processes_in(seen / "12") == [twelve]
        assert find_processes_below(tmp_path / "none") == []
    finally:
        for handle in handles:
            handle.send_signal(signal.SIGKILL)
            asyncio.run(handle.wait_exit(10))
            handle.close()
    assert find_processes_below(top) == []
