"""New vms that begin where a template that was booted once stands."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud

pytestmark = pytest.mark.guest

SHAPE = {"mem_size": "256M", "cpus": 1}


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny", warm="auto") as cloud:
        cloud.call("template_warm", template="tiny", **SHAPE)
        yield cloud


def identity_of(cloud: GuestCloud, vm: dict[str, Any]) -> dict[str, str]:
    """What of a guest must be its own."""
    commands = {
        "hostname": "hostname",
        "address": "ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4",
        "mac": "cat /sys/class/net/eth0/address",
        "machine-id": "cat /etc/machine-id",
        "random": "head -c 64 /dev/urandom | od -An -tx1",
        "boot-id": "cat /proc/sys/kernel/random/boot_id",
    }
    return {name: cloud.ssh(vm, command) for name, command in commands.items()}


def test_a_clone_is_a_vm_of_its_own(cloud: GuestCloud) -> None:
    one, other = cloud.create("one"), cloud.create("other")
    assert [vm["started"] for vm in (one, other)] == ["warm", "warm"]
    seen = [identity_of(cloud, vm) for vm in (one, other)]
    for name in seen[0]:
        assert seen[0][name] != seen[1][name], name
    assert [each["hostname"] for each in seen] == ["one", "other"]
    assert [each["mac"] for each in seen] == [one["mac"], other["mac"]]
    print({vm["name"]: vm["timings"] for vm in (one, other)})
    # What one writes the other does not see, and a cold start keeps it.
    cloud.ssh(one, "echo kept >/root/kept; sync")
    assert cloud.ssh(other, "ls /root/kept 2>&1 || echo none").endswith("none")
    cloud.call("vm_restart", vm="one")
    again = cloud.wait(one)
    assert again["started"] == "cold"
    assert cloud.ssh(one, "cat /root/kept") == "kept"
    after = identity_of(cloud, one)
    for name in ("hostname", "address", "mac", "machine-id"):
        assert after[name] == seen[0][name]


def test_a_killed_daemon_leaves_warm_images_and_clones(cloud: GuestCloud) -> None:
    vm = cloud.create("survivor")
    cloud.end(signal.SIGKILL)
    cloud.start()
    assert cloud.wait(vm)["pid"] == vm["pid"]
    assert cloud.create("later")["started"] == "warm"


def test_a_damaged_image_gives_a_cold_start(cloud: GuestCloud) -> None:
    [image] = cloud.call("template_info", template="tiny")["warm"]
    state = cloud.root / "state/warm" / image["name"] / "state"
    whole = state.read_bytes()
    os.chmod(state, 0o600)
    state.write_bytes(whole[:100] + bytes(len(whole) - 100))
    try:
        vm = cloud.create("cold")
        assert vm["started"] == "cold"
        assert cloud.ssh(vm, "hostname") == "cold"
    finally:
        state.write_bytes(whole)
