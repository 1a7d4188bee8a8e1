"""Spare clones: new vms take them over, and none is left where nobody keeps it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest_cloud import LIMIT_SECONDS, GuestCloud, is_alive, open_cloud, wait_for_end
from test_guest_warm_cloud import SHAPE, identity_of, wait_rested

from oscloudd.host.processes import find_processes_below

pytestmark = pytest.mark.guest

SIZE = 2
MEMINFO = Path("/proc/meminfo")


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny", warm="auto", config=f"pool = {SIZE}\n") as cloud:
        cloud.call("template_warm", template="tiny", **SHAPE)
        yield cloud


@pytest.fixture(autouse=True)
def full_pool(cloud: GuestCloud) -> None:
    wait_full(cloud)


def spares(cloud: GuestCloud) -> set[int]:
    """Give the processes that are spares: their working directories say so."""
    below = find_processes_below(cloud.root / "run/spares")
    return {found.identity.pid for found in below}


def count_ready(cloud: GuestCloud) -> int:
    warm = cloud.call("template_info", template="tiny")["warm"]
    return sum(image["spares"] for image in warm)


def until(look: Callable[[], bool], what: str) -> None:
    """Wait for what has no event outside of the daemon."""
    end = time.monotonic() + LIMIT_SECONDS
    while not look():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)


def wait_full(cloud: GuestCloud) -> set[int]:
    until(lambda: count_ready(cloud) == SIZE, f"{SIZE} spares")
    found = spares(cloud)
    assert len(found) == SIZE
    return found


def files_of_spares(cloud: GuestCloud) -> list[str]:
    patterns = ("run/spares/*", "state/spares/*", "log/spare-*")
    return sorted(path.name for pattern in patterns for path in cloud.root.glob(pattern))


def taps(cloud: GuestCloud) -> dict[str, str]:
    """Give the bridge of each tap, "" for none."""
    shown = cloud.run("ip", "-o", "link", "show", "type", "tun").splitlines()
    return {
        line.split(":")[1].strip(): line.partition(" master ")[2].partition(" ")[0]
        for line in shown
    }  # fmt: skip


def test_new_vms_take_spares_and_are_somebody_each(cloud: GuestCloud) -> None:
    there = spares(cloud)
    one = cloud.create("one", disk_size="3G")
    others = wait_full(cloud)
    other = cloud.create("other")
    for vm in (one, other):
        assert vm["started"] == "warm"
        assert set(vm["timings"]) == {"take", "identity", "banner"}
    assert one["pid"] in there
    assert other["pid"] in others
    assert one["pid"] not in spares(cloud)
    for vm in (one, other):
        wait_rested(cloud, vm)
    seen = [identity_of(cloud, vm) for vm in (one, other)]
    for name in seen[0]:
        assert seen[0][name] != seen[1][name], name
    assert [each["hostname"] for each in seen] == ["one", "other"]
    assert [each["mac"] for each in seen] == [one["mac"], other["mac"]]
    print({vm["name"]: vm["timings"] for vm in (one, other)})
    kilobytes = [int(cloud.ssh(vm, "df -k / | tail -n 1 | awk '{ print $2 }'")) for vm in
                 (one, other)]  # fmt: skip
    assert kilobytes[0] > 2.7 * (1 << 20)
    assert 0.9 * (1 << 20) < kilobytes[1] < 1 << 20  # as large as the image's from the first


def test_what_a_vm_took_is_where_a_vm_has_it(cloud: GuestCloud) -> None:
    vm = cloud.create("placed")
    root = cloud.root
    assert os.readlink(f"/proc/{vm['pid']}/cwd") == str(root / f"run/vms/{vm['id']}")
    assert sorted(os.listdir(root / f"run/vms/{vm['id']}")) == [
        "channel.sock", "qemu.pid", "qmp.sock", "serial.sock",
    ]  # fmt: skip
    assert "login:" in cloud.call("vm_log", vm="placed", source="console", lines=50)["text"]
    wait_full(cloud)
    kept = files_of_spares(cloud)
    assert len(kept) == 4 * SIZE  # two directories and two logs each
    assert not [name for name in kept if vm["uuid"] in name]
    ports = taps(cloud)
    assert sorted(ports.values())[:SIZE] == [""] * SIZE
    assert "" not in sorted(ports.values())[SIZE:]
    # Nothing of a spare is anybody's whom the daemon does not know.
    report = cloud.call("daemon_doctor")
    [leftovers] = [check for check in report["checks"] if check["check"] == "leftovers"]
    assert leftovers["verdict"] == "ok", leftovers


def test_it_is_an_ordinary_vm_from_then_on(cloud: GuestCloud) -> None:
    vm = cloud.create("ordinary")
    before = identity_of(cloud, vm)
    cloud.ssh(vm, "echo kept >/root/kept; sync")
    cloud.call("vm_stop", vm="ordinary", force=False)
    cloud.call("vm_start", vm="ordinary")
    again = cloud.wait(vm)
    assert again["started"] == "cold"
    assert cloud.ssh(again, "cat /root/kept") == "kept"
    after = identity_of(cloud, again)
    for name in ("hostname", "address", "mac", "machine-id"):
        assert after[name] == before[name]
    cloud.call("vm_delete", vm="ordinary", force=True)
    assert not (cloud.root / f"state/disks/{vm['disk']}").exists()


def test_a_request_that_is_refused_leaves_the_spares_as_they_are(cloud: GuestCloud) -> None:
    there = spares(cloud)
    for params in ({"name": "one"}, {"name": "new", "network": "none"}):
        with pytest.raises(Exception, match=r"already exists|not found"):
            cloud.create(**params)
    assert count_ready(cloud) == SIZE
    assert spares(cloud) == there


def test_more_at_once_than_there_are_spares(cloud: GuestCloud) -> None:
    jobs = [
        cloud.call("vm_create", name=f"many{number}", image="tiny", wait="none",
                   ip=f"192.168.9.{number + 2}", **SHAPE)
        for number in range(SIZE + 2)
    ]  # fmt: skip
    done = [cloud.call("job_wait", job=job["id"], timeout=LIMIT_SECONDS) for job in jobs]
    assert [job["state"] for job in done] == ["DONE"] * len(done)
    vms = [cloud.call("vm_info", vm=f"many{number}") for number in range(len(done))]
    assert {vm["started"] for vm in vms} == {"warm"}
    assert [("take" in vm["timings"]) for vm in vms[:SIZE]] == [True] * SIZE
    for key in ("pid", "mac", "uuid", "ip", "serial_port"):
        assert len({vm[key] for vm in vms}) == len(vms), key
    for vm in vms:
        cloud.call("vm_delete", vm=vm["id"], force=True)


def test_a_spare_that_ends_is_replaced(cloud: GuestCloud) -> None:
    gone, kept = spares(cloud)
    kill(gone)
    until(lambda: gone not in spares(cloud) and count_ready(cloud) == SIZE, "another spare")
    assert kept in spares(cloud)
    assert len(files_of_spares(cloud)) == 4 * SIZE


def test_a_vm_does_without_a_spare_that_does_not_answer(cloud: GuestCloud) -> None:
    stopped = spares(cloud)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    vm = cloud.create("patient", disk_size="2G")
    assert vm["started"] == "warm"
    assert "restore" in vm["timings"]
    assert vm["pid"] not in stopped
    [gone] = [pid for pid in stopped if not is_alive(pid)]
    wait_rested(cloud, vm)
    kilobytes = int(cloud.ssh(vm, "df -k / | tail -n 1 | awk '{ print $2 }'"))
    assert 1.7 * (1 << 20) < kilobytes < 2 * (1 << 20)
    assert "its spare clone can't be used" in cloud.log()
    [other] = stopped - {gone}
    os.kill(other, signal.SIGCONT)


def test_a_killed_daemon_leaves_no_spare_to_anybody(cloud: GuestCloud) -> None:
    vm = cloud.create("survivor")
    left = wait_full(cloud)
    old = files_of_spares(cloud)
    cloud.end(signal.SIGKILL)
    assert all(is_alive(pid) for pid in left)
    cloud.start()
    assert not [pid for pid in left if is_alive(pid)]
    assert not set(old) & set(files_of_spares(cloud))
    assert cloud.wait(vm)["pid"] == vm["pid"]
    assert not wait_full(cloud) & left
    assert cloud.create("later")["started"] == "warm"


def test_a_daemon_that_stops_ends_its_spares(cloud: GuestCloud) -> None:
    left = spares(cloud)
    cloud.end()
    try:
        assert not [pid for pid in left if is_alive(pid)]
        assert files_of_spares(cloud) == []
    finally:
        cloud.start()


def test_spares_give_way_when_memory_is_short(cloud: GuestCloud) -> None:
    with own_meminfo(cloud) as pretend:
        pretend(0.05)
        until(lambda: not spares(cloud), "the end of the spares")
        until(lambda: not files_of_spares(cloud), "the end of their files")
        assert "started" in cloud.create("frugal")
        pretend(0.9)
        wait_full(cloud)


def test_spares_give_way_to_a_vm_that_would_be_refused(cloud: GuestCloud) -> None:
    there = wait_full(cloud)
    with own_meminfo(cloud) as pretend:
        # Enough for the pool, and less than the vm wants.
        pretend(0.15, total=4 << 30)
        with pytest.raises(Exception, match="available"):
            cloud.create("greedy", mem_size="768M")
        assert not spares(cloud) & there


@contextmanager
def own_meminfo(cloud: GuestCloud) -> Iterator[Callable[..., None]]:
    """Show the daemon another /proc/meminfo than there is; give what changes it.

    `ip netns exec` has given it mounts of its own, as a container's runtime would.
    """
    assert cloud.daemon is not None
    shown = cloud.root / "meminfo"
    inside = ["nsenter", "--mount", "--target", str(cloud.daemon.pid)]

    def pretend(available: float, total: int = 16 << 30) -> None:
        free = int(total * available) >> 10
        shown.write_text(f"MemTotal: {total >> 10} kB\nMemAvailable: {free} kB\n")

    shown.write_bytes(MEMINFO.read_bytes())
    subprocess.run([*inside, "mount", "--bind", shown, MEMINFO], check=True)
    try:
        yield pretend
    finally:
        subprocess.run([*inside, "umount", MEMINFO], check=True)


def kill(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)
