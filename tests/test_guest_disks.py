"""Disks that real guests see come, grow and go."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud

from oscloudd.errors import InvalidStateError

pytestmark = pytest.mark.guest

GIB = 1 << 30
# What is written to a disk, so that another guest can tell it.
TEXT = "written by one guest and read by another"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


def size_seen(cloud: GuestCloud, vm: dict[str, Any], device: str) -> int:
    return 512 * int(cloud.ssh(vm, f"cat /sys/block/{device}/size"))


def test_a_disk_goes_from_guest_to_guest(cloud: GuestCloud) -> None:
    one, other = cloud.create("one"), cloud.create("other")
    cloud.call("disk_create", name="data", size="1G")
    cloud.call("disk_attach", vm="one", disk="data")
    assert cloud.ssh(one, "cat /sys/block/vdb/serial") == "data"
    assert size_seen(cloud, one, "vdb") == GIB
    cloud.ssh(one, f"echo {TEXT} | dd of=/dev/vdb seek=2000000 conv=fsync 2>/dev/null")

    cloud.call("disk_resize", disk="data", size="2G")
    assert size_seen(cloud, one, "vdb") == 2 * GIB

    cloud.end(signal.SIGKILL)
    cloud.start()
    cloud.call("disk_detach", vm="one", disk="data")
    assert cloud.ssh(one, "ls /sys/block | grep -c vdb", check=False) == "0"
    cloud.call("disk_attach", vm="other", disk="data")
    assert TEXT in cloud.ssh(other, "dd if=/dev/vdb skip=2000000 count=1 2>/dev/null")

    cloud.call("vm_restart", vm="other")
    cloud.wait(other)
    assert cloud.ssh(other, "cat /sys/block/vdb/serial") == "data"
    assert size_seen(cloud, other, "vdb") == 2 * GIB
    cloud.call("vm_delete", vm="other", force=True)
    cloud.call("disk_attach", vm="one", disk="data")
    assert TEXT in cloud.ssh(one, "dd if=/dev/vdb skip=2000000 count=1 2>/dev/null")


def test_a_root_disk_grows_under_its_guest_and_its_file_system_with_it(cloud: GuestCloud) -> None:
    vm = cloud.create("grows")
    cloud.call("disk_resize", disk=vm["disk"], size="2G")
    assert size_seen(cloud, vm, "vda") == 2 * GIB
    cloud.ssh(vm, "resize2fs /dev/vda")
    assert int(cloud.ssh(vm, "df -k / | tail -1 | awk '{print $2}'")) > 1_800_000

    cloud.call("vm_stop", vm="grows")
    cloud.call("disk_resize", disk=vm["disk"], size="3G")
    cloud.call("vm_start", vm="grows")
    cloud.wait(vm)
    assert size_seen(cloud, vm, "vda") == 3 * GIB
    # The guest makes its file system larger as it boots, and nobody has to wait for it.
    enough = "df -k / | tail -1 | awk '{print ($2 > 2800000)}'"
    cloud.until(lambda: cloud.ssh(vm, enough) == "1", "the file system's growth")


def test_a_guest_boots_from_a_disk_made_before_and_leaves_it(cloud: GuestCloud) -> None:
    cloud.call("disk_create", name="root", template="tiny", size="1G")
    public = cloud.key.with_suffix(".pub").read_text().strip()
    vm = cloud.call("vm_create", name="on-disk", disk="root", mem_size="256M", ssh_key=[public])
    assert vm["ready"]
    cloud.ssh(vm, f"echo {TEXT} >/root/left && sync")
    cloud.call("vm_delete", vm="on-disk", force=True)

    reader = cloud.create("reader")
    cloud.call("disk_attach", vm="reader", disk="root")
    # A copy of tiny's own: two file systems of one uuid may both be mounted, for ext4 allows it.
    cloud.ssh(reader, "mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt")
    assert cloud.ssh(reader, "cat /mnt/root/left") == TEXT
    cloud.ssh(reader, "umount /mnt")
    cloud.call("disk_detach", vm="reader", disk="root")


def test_a_suspended_guest_has_its_disk_again(cloud: GuestCloud) -> None:
    vm = cloud.create("sleeps")
    cloud.call("disk_create", name="kept", size="1G")
    cloud.call("disk_attach", vm="sleeps", disk="kept")
    cloud.ssh(vm, f"echo {TEXT} | dd of=/dev/vdb 2>/dev/null")  # perhaps in its memory only
    cloud.call("vm_suspend", vm="sleeps")
    cloud.call("vm_resume", vm="sleeps")
    assert TEXT in cloud.ssh(vm, "dd if=/dev/vdb count=1 2>/dev/null")
    cloud.ssh(vm, "sync; echo 3 >/proc/sys/vm/drop_caches")
    assert TEXT in cloud.ssh(vm, "dd if=/dev/vdb count=1 2>/dev/null")
    cloud.call("disk_detach", vm="sleeps", disk="kept")


def test_a_guest_that_is_held_still_does_not_let_go(cloud: GuestCloud) -> None:
    cloud.create("still")
    cloud.call("disk_create", name="held", size="1G")
    cloud.call("disk_attach", vm="still", disk="held")
    cloud.call("vm_pause", vm="still")
    with pytest.raises(InvalidStateError, match="PAUSED"):
        cloud.call("disk_detach", vm="still", disk="held")
    cloud.call("vm_resume", vm="still")
    cloud.call("disk_detach", vm="still", disk="held")
