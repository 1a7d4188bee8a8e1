"""Real guests that are saved to disk with their memory, and go on where they stood."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_cloud import GuestCloud, is_alive, open_cloud

from oscloudd.errors import CloudError, HostError, InvalidStateError

pytestmark = pytest.mark.guest

# A process and a file that are nowhere but in memory.
LEAVE_TRACES = (
    "mkdir -p /mnt; mount -t tmpfs none /mnt; echo only-in-memory >/mnt/note;"
    " (sleep 100000 >/dev/null 2>&1 </dev/null & echo $! >/mnt/pid)"
)
READ_TRACES = (
    "cat /mnt/note /proc/sys/kernel/random/boot_id; tr '\\0' ' ' </proc/$(cat /mnt/pid)/cmdline"
)


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny", warm="auto") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def web(cloud: GuestCloud) -> dict[str, Any]:
    """A vm that has booted, with traces in its memory."""
    vm = cloud.create("web", warm="off")
    cloud.ssh(vm, LEAVE_TRACES)
    return vm


def suspended_path(cloud: GuestCloud, vm: dict[str, Any]) -> Path:
    return cloud.root / f"state/disks/{vm['disk']}/suspended"


def suspend(cloud: GuestCloud, vm: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = cloud.call("vm_suspend", vm=vm["id"])
    assert (seen["state"], seen["wanted_state"], seen["pid"]) == ("SUSPENDED", "STOPPED", None)
    assert suspended_path(cloud, vm).is_dir()
    return seen


def check_goes_on(cloud: GuestCloud, vm: dict[str, Any], traces: str, started: str) -> None:
    seen = cloud.wait(vm)
    assert (seen["state"], seen["started"]) == ("RUNNING", started)
    assert cloud.ssh(vm, READ_TRACES) == traces
    assert not list(suspended_path(cloud, vm).parent.glob("suspended*"))


def test_a_vm_goes_on_where_it_stood(cloud: GuestCloud, web: dict[str, Any]) -> None:
    traces = cloud.ssh(web, READ_TRACES)
    assert "only-in-memory" in traces
    assert "sleep 100000" in traces
    pid = cloud.info(web)["pid"]
    suspend(cloud, web)
    assert not is_alive(pid)
    for path in (suspended_path(cloud, web), *suspended_path(cloud, web).iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    assert cloud.call("vm_resume", vm="web")["state"] == "RUNNING"
    check_goes_on(cloud, web, traces, "cold")
    # Its reset is an ordinary one, with the kernel it had.
    boot = cloud.ssh(web, "cat /proc/sys/kernel/random/boot_id")
    cloud.ssh(web, "reboot", check=False)
    cloud.wait_for_boot(web, boot)
    cloud.ssh(web, LEAVE_TRACES)


def test_a_clone_goes_on_after_daemons_have_come_and_gone(cloud: GuestCloud) -> None:
    cloud.call("template_warm", template="tiny", mem_size="256M", disk_size="1G")
    vm = cloud.create("clone", warm="only")
    assert vm["started"] == "warm"
    cloud.ssh(vm, LEAVE_TRACES)
    traces = cloud.ssh(vm, READ_TRACES)
    suspend(cloud, vm)
    cloud.end(signal.SIGTERM)
    cloud.start()
    assert cloud.info(vm)["state"] == "SUSPENDED"
    assert cloud.call("vm_start", vm="clone")["state"] == "RUNNING"
    check_goes_on(cloud, vm, traces, "warm")
    # Once more: its memory is no clone's any longer, and its state is.
    suspend(cloud, vm)
    cloud.end(signal.SIGKILL)
    cloud.start()
    cloud.control("vm-resume", "clone")
    check_goes_on(cloud, vm, traces, "warm")
    cloud.call("vm_delete", vm="clone", force=True)


def test_a_daemon_killed_while_it_saves_leaves_the_rest_to_the_next(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    traces = cloud.ssh(web, READ_TRACES)
    for wait_for in ("suspended.part", "suspended"):
        job = cloud.call("vm_suspend", vm="web", wait=False)
        path = suspended_path(cloud, web).with_name(wait_for)
        cloud.until(path.exists, f"{wait_for} to be there")
        cloud.end(signal.SIGKILL)
        cloud.start()
        ended = cloud.call("job_wait", job=job["id"], timeout=60)
        assert (ended["state"], cloud.info(web)["state"]) == ("DONE", "SUSPENDED")
        cloud.call("vm_resume", vm="web")
        check_goes_on(cloud, web, traces, "cold")


def test_a_cancelled_save_lets_the_guest_go_on(cloud: GuestCloud, web: dict[str, Any]) -> None:
    traces = cloud.ssh(web, READ_TRACES)
    before = cloud.info(web)
    job = cloud.call("vm_suspend", vm="web", wait=False)
    path = suspended_path(cloud, web).with_name("suspended.part")
    cloud.until(path.exists, "the save to begin")
    assert cloud.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
    after = cloud.info(web)
    for key in ("state", "wanted_state", "pid", "ready"):
        assert after[key] == before[key], key
    check_goes_on(cloud, web, traces, "cold")
    # Nothing of the first attempt is in the way of the next.
    suspend(cloud, web)
    cloud.call("vm_resume", vm="web")
    check_goes_on(cloud, web, traces, "cold")


def test_another_qemu_does_not_take_it_up(cloud: GuestCloud, web: dict[str, Any]) -> None:
    traces = cloud.ssh(web, READ_TRACES)
    suspend(cloud, web)
    config = cloud.root / "oscloud.toml"
    text = config.read_text()
    other = cloud.root / "other-qemu"
    real = shutil.which("qemu-system-x86_64")
    words = "QEMU emulator version 9.9.9 (another)"
    other.write_text(f'#!/bin/sh\n[ "$1" = -version ] && echo "{words}" || exec {real} "$@"\n')
    other.chmod(0o755)
    config.write_text(f'{text}\n[qemu]\nbinary = "{other}"\n')
    cloud.end(signal.SIGTERM)
    cloud.start()
    with pytest.raises(InvalidStateError) as refused:
        cloud.call("vm_resume", vm="web")
    assert "qemu 9.9.9 (another)" in refused.value.message
    assert "qemu 7.2" in refused.value.message
    assert "vm-stop --force web" in str(refused.value.hint)
    assert cloud.info(web)["state"] == "SUSPENDED"
    config.write_text(text)
    cloud.end(signal.SIGTERM)
    cloud.start()
    cloud.call("vm_resume", vm="web")
    check_goes_on(cloud, web, traces, "cold")


def test_a_damaged_state_is_refused_until_it_is_dropped(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    suspend(cloud, web)
    state = suspended_path(cloud, web) / "state"
    with state.open("r+b") as file:
        file.seek(state.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(HostError, match="is damaged") as refused:
        cloud.call("vm_start", vm="web")
    assert "vm-stop --force web" in str(refused.value.hint)
    seen = cloud.info(web)
    assert (seen["state"], seen["wanted_state"], seen["pid"]) == ("SUSPENDED", "STOPPED", None)
    assert "is damaged" in seen["reason"]
    with pytest.raises(CloudError, match="it is SUSPENDED"):
        cloud.call("vm_stop", vm="web")
    assert json.loads((state.parent / "suspended.json").read_text())["state_bytes"] > 0
    assert cloud.call("vm_stop", vm="web", force=True)["state"] == "STOPPED"
    assert not state.parent.exists()
    cloud.call("vm_start", vm="web")
    assert cloud.wait(web)["started"] == "cold"
    assert cloud.ssh(web, "cat /mnt/note 2>&1 || echo none").endswith("none")
