"""Real guests whose disks are frozen, restored and cloned, running and off."""

from collections.abc import Iterator
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud
from test_guest_suspend import LEAVE_TRACES, READ_TRACES

pytestmark = pytest.mark.guest

WHO = "hostname; cat /etc/machine-id; cat /etc/oscloud/network; cat /var/lib/oscloud/identity"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def web(cloud: GuestCloud) -> dict[str, Any]:
    return cloud.create("web")


def write(cloud: GuestCloud, vm: dict[str, Any], text: str) -> None:
    cloud.ssh(vm, f"echo {text} >/root/note; sync")


def note(cloud: GuestCloud, vm: dict[str, Any]) -> str:
    return cloud.ssh(vm, "cat /root/note")


def test_a_running_guest_goes_on_and_comes_back_to_its_snapshots(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    pid = cloud.info(web)["pid"]
    for text in ("first", "second"):
        write(cloud, web, text)
        cloud.control("snapshot-create", "web", text)
    write(cloud, web, "third")
    # More than qemu keeps in memory, through both overlays.
    cloud.ssh(web, "dd if=/dev/urandom of=/root/data bs=1M count=20; sync; md5sum /root/data")
    assert cloud.info(web)["pid"] == pid
    assert note(cloud, web) == "third"
    assert "second *" in cloud.control("snapshot-list", "web")
    cloud.control("snapshot-restore", "web", "first", "--force")
    cloud.wait(web)
    assert note(cloud, web) == "first"
    assert cloud.ssh(web, "ls /root/data 2>/dev/null || echo none") == "none"
    cloud.control("snapshot-restore", "web", "second", "--force")
    cloud.wait(web)
    assert note(cloud, web) == "second"


def test_a_guest_goes_on_from_the_memory_of_a_snapshot(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    cloud.ssh(web, LEAVE_TRACES)
    traces = cloud.ssh(web, READ_TRACES)
    write(cloud, web, "on-disk")
    cloud.control("snapshot-create", "web", "awake", "--memory")
    assert cloud.ssh(web, READ_TRACES) == traces
    cloud.ssh(web, "rm /mnt/note; kill $(cat /mnt/pid)")
    write(cloud, web, "later")
    for _ in range(2):
        cloud.control("snapshot-restore", "web", "awake", "--force")
        cloud.wait(web)
        assert cloud.ssh(web, READ_TRACES) == traces
        assert note(cloud, web) == "on-disk"
        write(cloud, web, "later")
    cloud.call("vm_restart", vm="web")
    cloud.wait(web)
    assert note(cloud, web) == "later"


def fill(cloud: GuestCloud, vm: dict[str, Any], text: str) -> str:
    """Write the note, and 8 MiB partly over what was there before; give their sums."""
    write(cloud, vm, text)
    seek = len(text) % 5
    command = f"dd if=/dev/urandom of=/root/fill bs=1M count=8 seek={seek} conv=notrunc; sync"
    cloud.ssh(vm, command)
    return sums(cloud, vm)


def sums(cloud: GuestCloud, vm: dict[str, Any]) -> str:
    cloud.ssh(vm, "echo 3 >/proc/sys/vm/drop_caches")
    return cloud.ssh(vm, "md5sum /root/note /root/fill")


def test_snapshots_around_one_that_is_deleted_stay_as_they_are(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    cloud.ssh(web, LEAVE_TRACES)
    traces = cloud.ssh(web, READ_TRACES)
    seen = {}
    for name in ("older", "middle", "remembering", "newer"):
        seen[name] = fill(cloud, web, name)
        memory = ["--memory"] if name == "remembering" else []
        cloud.control("snapshot-create", "web", name, *memory)
    seen["now"] = fill(cloud, web, "now")
    pid, layers = cloud.info(web)["pid"], cloud.call("disk_info", disk=web["disk"])["layers"]
    cloud.control("snapshot-delete", "web", "middle")
    assert cloud.call("disk_info", disk=web["disk"])["layers"] < layers
    # The guest reads what its qemu has open, and a qemu that is started what is there now.
    assert (cloud.info(web)["pid"], sums(cloud, web)) == (pid, seen["now"])
    cloud.call("vm_restart", vm="web")
    cloud.wait(web)
    assert sums(cloud, web) == seen["now"]
    for name in ("newer", "older", "remembering"):
        cloud.control("snapshot-restore", "web", name, "--force")
        cloud.wait(web)
        assert sums(cloud, web) == seen[name]
    assert cloud.ssh(web, READ_TRACES) == traces


def test_a_guest_that_is_off_comes_back_to_its_snapshot(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    write(cloud, web, "before")
    cloud.call("vm_stop", vm="web")
    cloud.call("snapshot_create", vm="web", name="off")
    cloud.call("vm_start", vm="web")
    cloud.wait(web)
    write(cloud, web, "after")
    cloud.call("vm_stop", vm="web")
    assert cloud.call("snapshot_restore", vm="web", snapshot="off")["state"] == "STOPPED"
    cloud.call("vm_start", vm="web")
    cloud.wait(web)
    assert note(cloud, web) == "before"


def test_a_clone_of_a_running_guest_is_somebody_else(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    write(cloud, web, "shared")
    who, boot = cloud.ssh(web, WHO), cloud.ssh(web, "cat /proc/sys/kernel/random/boot_id")
    cloud.control("vm-clone", "web", "copy", "--cpus", "2")
    copy = cloud.call("vm_info", vm="copy")
    assert (copy["ready"], copy["cpus"], copy["mem_size"]) == (True, 2, web["mem_size"])
    for key in ("ip", "mac", "uuid", "ssh_host_keys", "disk"):
        assert copy[key] != web[key], key
    # It lets in the key that its original lets in, and shows the host key that is its own.
    assert note(cloud, copy) == "shared"
    others = cloud.ssh(copy, WHO)
    assert others.splitlines()[0] == "copy"
    assert f"address={copy['ip']}" in others
    machine_ids = {text.splitlines()[1] for text in (who, others)}
    assert len(machine_ids) == 2
    # Neither sees what the other writes, and the original has not noticed.
    write(cloud, copy, "of-the-copy")
    assert note(cloud, web) == "shared"
    write(cloud, web, "of-the-original")
    assert note(cloud, copy) == "of-the-copy"
    assert cloud.ssh(web, WHO) == who
    assert cloud.ssh(web, "cat /proc/sys/kernel/random/boot_id") == boot
    # It is asked once: a reset by itself, and a start, find it told.
    copy_boot = cloud.ssh(copy, "cat /proc/sys/kernel/random/boot_id")
    cloud.ssh(copy, "reboot", check=False)
    cloud.wait_for_boot(copy, copy_boot)
    cloud.call("vm_restart", vm="copy")
    cloud.wait(copy)
    assert cloud.ssh(copy, WHO) == others
    # What it stands on stays when its original goes.
    cloud.call("vm_delete", vm="web", force=True)
    cloud.call("vm_restart", vm="copy")
    cloud.wait(copy)
    assert note(cloud, copy) == "of-the-copy"
    cloud.call("vm_delete", vm="copy", force=True)
    assert not list(cloud.root.glob("state/layers/*"))
