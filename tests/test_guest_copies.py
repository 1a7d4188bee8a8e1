"""A real guest that moves to another cloud in one file, with what it wrote and who it is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_cloud import BOOT_ID, BOOT_SECONDS, GuestCloud, open_cloud

pytestmark = pytest.mark.guest

IDENTITY = (
    "hostname; cat /etc/machine-id 2>/dev/null; cat /sys/class/net/eth0/address;"
    " ip -4 addr show eth0 | grep inet"
)


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny", warm="auto") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def other(cloud: GuestCloud) -> Iterator[GuestCloud]:
    """Another machine, with no template at all."""
    with open_cloud() as other:
        other.key = cloud.key
        yield other


def test_a_clone_moves_to_another_machine(
    cloud: GuestCloud, other: GuestCloud, tmp_path: Path
) -> None:
    # Its disk is an overlay on a frozen one on the template's.
    cloud.call("template_warm", template="tiny", mem_size="256M", disk_size="1G")
    vm = cloud.create("web", warm="only")
    cloud.ssh(vm, "dd if=/dev/urandom of=/root/data bs=64k count=40 2>/dev/null; sync")
    data = cloud.ssh(vm, "sha256sum /root/data")
    identity = cloud.ssh(vm, IDENTITY)
    cloud.call("vm_stop", vm="web")
    file = tmp_path / "web.oscloud"
    said = cloud.control("vm-export", "web", str(file))
    assert said.startswith(f"{file}: ")
    names = subprocess.check_output(["tar", "tf", file], text=True).split()
    assert names == ["manifest.json", "kernel", "initrd", "disk.qcow2", "SHA256SUMS"]
    cloud.call("vm_delete", vm="web")

    assert "STOPPED" in other.control("vm-import", str(file))
    other.control("vm-start", "web")
    moved = other.wait(vm | {"id": 1})
    assert (moved["name"], moved["ip"], moved["uuid"]) == ("web", vm["ip"], vm["uuid"])
    # ssh takes the host key it had, and no other.
    assert moved["ssh_host_keys"] == vm["ssh_host_keys"]
    assert other.ssh(moved, "sha256sum /root/data") == data
    assert other.ssh(moved, IDENTITY) == identity

    other.call("vm_stop", vm="web")
    other.control("vm-export", "web", str(file), "--force")
    assert "STOPPED" in cloud.control("vm-import", str(file), "--name", "back")
    cloud.control("vm-start", "back")
    back = cloud.wait(cloud.call("vm_info", vm="back"))
    assert cloud.ssh(back, "sha256sum /root/data") == data
    assert back["os"] == moved["os"]

    # Beside the one it is a copy of, as somebody else.
    cloud.control("vm-import", str(file), "--name", "twin", "--new-identity")
    cloud.control("vm-start", "twin")
    twin = cloud.wait(cloud.call("vm_info", vm="twin"))
    assert cloud.ssh(twin, "sha256sum /root/data") == data
    for key in ("ip", "mac", "uuid", "ssh_host_keys"):
        assert twin[key] != back[key], key
    assert cloud.ssh(twin, IDENTITY).splitlines()[0] == "twin"
    assert not {*cloud.ssh(twin, IDENTITY).splitlines()} & {*identity.splitlines()}
    assert cloud.ssh(back, IDENTITY) == identity
    # It is told once: a reset finds who it is on its disk.
    boot = cloud.ssh(twin, f"cat {BOOT_ID}")
    cloud.ssh(twin, "reboot", check=False)
    cloud.wait_for_boot(twin, boot)

    # What was done to it by hand others begin with.
    cloud.call("vm_stop", vm="twin")
    assert "READY" in cloud.control("vm-publish", "twin", "by-hand")
    fresh = cloud.create("fresh", image="by-hand")
    assert fresh["started"] == "cold"
    assert cloud.ssh(fresh, "sha256sum /root/data") == data
    assert not {*cloud.ssh(fresh, IDENTITY).splitlines()} & {*identity.splitlines()}
    assert cloud.ssh_by_password(fresh, "123456", "hostname").endswith("fresh")


def test_a_vm_takes_its_data_disk_along_through_a_pipe(
    cloud: GuestCloud, other: GuestCloud
) -> None:
    vm = cloud.create("whole")
    for name in ("first", "data"):
        cloud.call("disk_create", name=name, size="1G")
        cloud.call("disk_attach", vm="whole", disk=name)
    cloud.call("disk_detach", vm="whole", disk="first")
    fill = "dd if=/dev/urandom of=/dev/vdc bs=64k count=40 seek=8000 conv=fsync 2>/dev/null"
    read = (
        "cat /sys/block/vd?/serial; dd if=/dev/vd{} bs=64k count=50 skip=8000 2>/dev/null | md5sum"
    )
    cloud.ssh(vm, fill)
    data = cloud.ssh(vm, read.format("c"))
    assert data.startswith("data")
    cloud.call("vm_stop", vm="whole")

    send_through_a_pipe(cloud, other, "whole")
    cloud.call("vm_delete", vm="whole")
    for disk in ("first", "data"):
        cloud.call("disk_delete", disk=disk)
    other.control("vm-start", "whole")
    moved = other.wait(other.call("vm_info", vm="whole"))
    assert moved["uuid"] == vm["uuid"]
    # In its slot, which is the second one, but the only one that its guest finds now.
    found = other.call("disk_info", disk="data")
    assert (found["vm"], found["slot"], found["size"]) == ("whole", 2, 1 << 30)
    assert other.ssh(moved, read.format("b")) == data
    other.ssh(moved, "dd if=/dev/zero of=/dev/vdb count=1 conv=fsync 2>/dev/null")
    other.call("vm_delete", vm="whole", force=True)
    other.call("disk_delete", disk="data")


def send_through_a_pipe(cloud: GuestCloud, other: GuestCloud, name: str) -> None:
    program = (sys.executable, "-m", "oscloudctl")
    giving = subprocess.Popen(
        [*program, "vm-export", name, "-"], env=cloud.environment(), stdout=subprocess.PIPE
    )
    taken = subprocess.run(
        [*program, "vm-import", "-"], env=other.environment(), stdin=giving.stdout,
        capture_output=True, text=True, timeout=BOOT_SECONDS, check=False,
    )  # fmt: skip
    assert (giving.wait(BOOT_SECONDS), taken.returncode) == (0, 0), taken.stderr
    assert giving.stdout is not None
    giving.stdout.close()
    assert "STOPPED" in taken.stdout
