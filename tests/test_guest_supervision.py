"""Real qemus that are killed, hang, are found again by dozens, and meet a full disk."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_cloud import GuestCloud, is_alive, open_cloud

pytestmark = pytest.mark.guest

VMS = 50
SIGNALS = (
    signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
)  # fmt: skip
# qemu ends in order when it gets one of these, and says so before.
ORDERLY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


def started(cloud: GuestCloud, name: str, **params: Any) -> dict[str, Any]:
    """Make a vm and don't wait for its guest."""
    given = {"image": "tiny", "mem_size": "128M", "disk_size": "1G", "wait": "started", **params}
    vm: dict[str, Any] = cloud.call("vm_create", name=name, **given)
    return vm


@pytest.mark.parametrize("state", ["booting", "paused", "adopted"])
def test_a_qemu_that_is_killed_is_seen_and_said_to_be(cloud: GuestCloud, state: str) -> None:
    vms = {number: started(cloud, f"{state}-{number.name}") for number in SIGNALS}
    if state == "paused":
        for vm in vms.values():
            cloud.call("vm_pause", vm=vm["id"])
    if state == "adopted":
        cloud.end(signal.SIGKILL)
        cloud.start()
        for vm in vms.values():
            assert cloud.call("vm_qemu_command", vm=vm["id"], command="query-status")["running"]
    for number, vm in vms.items():
        began = time.monotonic()
        os.kill(vm["pid"], number)
        seen = cloud.wait(vm, "STOPPED" if number in ORDERLY else "CRASHED")
        print(f"{state} {number.name}: {time.monotonic() - began:.3f} s: {seen['reason']}")
        assert seen["pid"] is None
        if number in ORDERLY:
            assert seen["reason"] == "qemu was ended by a signal from the host"
        elif state == "adopted":  # whose parent is somebody else, and the kernel tells only that
            assert seen["reason"] == "qemu is gone and nobody saw why"
        else:
            assert seen["reason"] == f"qemu was ended by {number.name}, which was not ours"
    for vm in vms.values():
        cloud.call("vm_delete", vm=vm["id"])


def test_a_hung_qemu_is_told_and_can_be_ended(cloud: GuestCloud) -> None:
    vm = started(cloud, "hung")
    os.kill(vm["pid"], signal.SIGSTOP)
    began = time.monotonic()
    assert "does not answer" in cloud.wait(vm, "UNRESPONSIVE")["reason"]
    print(f"UNRESPONSIVE after {time.monotonic() - began:.1f} s")
    os.kill(vm["pid"], signal.SIGCONT)
    assert cloud.wait(vm, "RUNNING")["pid"] == vm["pid"]
    os.kill(vm["pid"], signal.SIGSTOP)
    cloud.wait(vm, "UNRESPONSIVE")
    assert cloud.call("vm_stop", vm=vm["id"], force=True)["state"] == "STOPPED"
    assert not is_alive(vm["pid"])
    cloud.call("vm_delete", vm=vm["id"])


def test_fifty_real_qemus_are_found_again(cloud: GuestCloud) -> None:
    vms = []
    for number in range(VMS):
        vms.append(started(cloud, f"many{number}"))
        # Fifty guests that boot at once on an emulator would take the machine for minutes.
        cloud.call("vm_pause", vm=vms[-1]["id"])
    cloud.end(signal.SIGKILL)
    began = time.monotonic()
    cloud.start()
    ready = time.monotonic()
    for vm in vms:
        status = cloud.call("vm_qemu_command", vm=vm["id"], command="query-status")
        assert status["status"] == "paused"
    print(f"{VMS} qemus: READY {ready - began:.2f} s, all {time.monotonic() - ready:.2f} s later")
    found = {vm["id"]: vm for vm in cloud.call("vm_list")}
    for vm in vms:
        assert (found[vm["id"]]["state"], found[vm["id"]]["pid"]) == ("PAUSED", vm["pid"])
    for vm in vms:
        cloud.call("vm_delete", vm=vm["id"], force=True)
    assert not any(is_alive(vm["pid"]) for vm in vms)


FILESYSTEM_BYTES = 320 << 20
# Not zeroes: those take no space in the image.
TEXT = "yes oscloud | head -c 104857600"


@pytest.fixture
def small_cloud(tmp_path: Path) -> Iterator[GuestCloud]:
    """A cloud whose state is on a small filesystem of its own."""
    image = tmp_path / "small.ext4"
    with image.open("wb") as file:
        file.truncate(FILESYSTEM_BYTES)
    # No reserve for root: full shall be full for the daemon, too.
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", image], check=True)
    with open_cloud("tiny", state_image=image, config='[limits]\nmin_free_disk = "32M"\n') as cloud:
        yield cloud


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def fill(path: Path, leave_bytes: int) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while free_bytes(path.parent) > leave_bytes:
            file.write(b"x" * min(1 << 20, max(4096, free_bytes(path.parent) - leave_bytes)))


def test_a_full_disk_pauses_the_guest_until_there_is_space(small_cloud: GuestCloud) -> None:
    cloud, state = small_cloud, small_cloud.root / "state"
    vm = cloud.create("writer", mem_size="128M")
    for name in ("other0", "other1"):
        started(cloud, name)
    filler = state / "filler"
    fill(filler, 40 << 20)
    before = cloud.ssh(vm, "cat /proc/sys/kernel/random/boot_id")
    write = f"{TEXT} >/big && sync && md5sum </big"
    written: list[str] = []
    writer = threading.Thread(target=lambda: written.append(cloud.ssh(vm, write)))
    writer.start()
    paused = cloud.wait(vm, "PAUSED")
    assert "the host's disk is full" in paused["reason"]

    fill(state / "rest", 0)
    assert free_bytes(state) < 1 << 20
    with pytest.raises(Exception, match="free: a new vm needs") as refused:
        started(cloud, "another")
    assert getattr(refused.value, "details", {})["resource"] == "disk"
    assert {each["name"] for each in cloud.call("vm_list")} == {"writer", "other0", "other1"}
    assert cloud.call("vm_stop", vm="other0", force=True)["state"] == "STOPPED"
    assert cloud.call("vm_delete", vm="other1", force=True)["name"] == "other1"

    (state / "rest").unlink()
    filler.unlink()
    cloud.wait(vm, "RUNNING")
    writer.join(120)
    assert written, "the guest did not go on"
    assert written[0].splitlines()[-1] == cloud.ssh(vm, f"{TEXT} | md5sum")
    assert cloud.ssh(vm, "cat /proc/sys/kernel/random/boot_id") == before


def test_a_guest_that_a_full_disk_paused_goes_on_under_another_daemon(
    small_cloud: GuestCloud,
) -> None:
    cloud, state = small_cloud, small_cloud.root / "state"
    vm = cloud.create("writer", mem_size="128M")
    fill(state / "filler", 40 << 20)
    write = f"{TEXT} >/big && sync && echo written"
    written: list[str] = []
    writer = threading.Thread(target=lambda: written.append(cloud.ssh(vm, write)))
    writer.start()
    cloud.wait(vm, "PAUSED")
    cloud.end(signal.SIGKILL)
    cloud.start()
    assert cloud.wait(vm, "PAUSED")["pid"] == vm["pid"]
    (state / "filler").unlink()
    cloud.wait(vm, "RUNNING")
    writer.join(120)
    assert written[0].splitlines()[-1] == "written"
