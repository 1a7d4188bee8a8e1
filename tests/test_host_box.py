"""Small questions to the box: memory, disk space, qemu's version and user; telling systemd."""

import asyncio
import gc
import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from oscloudd.errors import HostError
from oscloudd.host.notify import Notifier
from oscloudd.host.resources import (
    disk_free_bytes,
    memory_available_bytes,
    memory_total_bytes,
    qemu_version,
)
from oscloudd.host.users import resolve_qemu_user


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\n")
    assert memory_total_bytes(meminfo) == 2 << 20
    assert memory_available_bytes(meminfo) == 1 << 20
    assert 0 < memory_available_bytes() < memory_total_bytes()
    meminfo.write_text("")
    with pytest.raises(HostError, match="has no MemTotal"):
        memory_total_bytes(meminfo)


def test_free_space_of_a_directory_yet_to_be_made(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = disk_free_bytes(tmp_path / "not" / "yet")
    assert abs(free - status.f_bavail * status.f_frsize) < 1 << 30


def test_qemu_version_is_a_number_or_an_error(tmp_path: Path) -> None:
    binary = tmp_path / "qemu"
    binary.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2)'\n")
    binary.chmod(0o755)
    assert asyncio.run(qemu_version(str(binary))) == "7.2.22"
    binary.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(HostError, match="does not answer --version like qemu"):
        asyncio.run(qemu_version(str(binary)))


def test_qemu_user_is_unprivileged() -> None:
    user = resolve_qemu_user("")
    assert user.name in ("oscloud-qemu", "nobody")
    assert (user.uid, user.gid) == (pwd.getpwnam(user.name).pw_uid, pwd.getpwnam(user.name).pw_gid)
    assert resolve_qemu_user("daemon").name == "daemon"


def test_qemu_user_gets_the_group_of_the_kvm_device_unless_it_is_roots(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    assert resolve_qemu_user("nobody", kvm_device=device).extra_groups == ()
    device.touch(mode=0o660)
    assert resolve_qemu_user("nobody", kvm_device=device).extra_groups == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_qemu_user_gets_the_kvm_group(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    group = pwd.getpwnam("daemon").pw_gid
    os.chown(device, 0, group)
    device.chmod(0o660)
    assert resolve_qemu_user("nobody", kvm_device=device).extra_groups == (group,)
    device.chmod(0o600)
    assert resolve_qemu_user("nobody", kvm_device=device).extra_groups == ()


@pytest.mark.parametrize(("name", "reason"), [("root", "that is root"), ("no-one", "no user")])
def test_qemu_user_that_can_not_be(name: str, reason: str) -> None:
    with pytest.raises(HostError, match=reason):
        resolve_qemu_user(name)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield server


def close(notifier: Notifier) -> None:
    if notifier._systemd is not None:
        notifier._systemd.socket.close()


def test_systemd_is_told_everything(systemd: socket.socket) -> None:
    notifier = Notifier()
    notifier.ready()
    notifier.status("3 vms\n→ ready é")
    notifier.watchdog()
    notifier.stopping()
    told = [systemd.recv(200) for _ in range(4)]
    assert told == [
        b"READY=1",
        "STATUS=3 vms ? ready é".encode("latin-1"),
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]
    close(notifier)


def test_children_do_not_inherit_the_line_to_systemd(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert notifier.watchdog_interval_seconds == 10
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    close(notifier)


def test_a_watchdog_meant_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier().watchdog_interval_seconds is None


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ready()


def test_a_systemd_that_is_gone_is_logged(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier()
    systemd.close()
    notifier.ready()
    assert "systemd was not told 'READY=1'" in caplog.text
    close(notifier)


# sdnotify drops the socket it could not connect without closing it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_socket_that_is_not_there_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    Notifier().ready()
    gc.collect()
    assert "can't be reached" in caplog.text
