"""Warm images of templates with cloud-init, over the socket; `test_guest_warm_cloud_init` has real
guests.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_images import qcow2
from cloud_accounts import check_accounted
from daemon_process import Box, RpcError
from test_rpc_templates import send

ADDRESS = "192.168.7.7"
SHAPE = {"mem_size": "128M", "disk_size": "64M"}
VM = {"image": "vendor", "ip": ADDRESS, "wait": "ready", **SHAPE}


@pytest.fixture(scope="module")
def cloud(shared_box: Box) -> Iterator[Box]:
    send(shared_box, "vendor", qcow2())
    shared_box.call("template_warm", template="vendor", **SHAPE)
    with shared_box.sshd_at(ADDRESS):
        yield shared_box


def images(box: Box, template: str = "vendor") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = box.call("template_info", template=template)["warm"]
    return found


def seed_of(box: Box, vm: dict[str, Any]) -> bytes:
    return (box.root / "state/disks" / str(vm["disk"]) / "seed.iso").read_bytes()


def gone(box: Box, vm: dict[str, Any]) -> None:
    check_accounted(box)
    box.call("vm_delete", vm=vm["id"], force=True)


def test_a_vm_begins_where_the_saved_one_stood_with_a_seed_of_its_own(cloud: Box) -> None:
    vm = cloud.create("web", warm="only", **VM)
    assert vm["started"] == "warm"
    assert "cloud_init" not in vm["timings"]
    [image] = images(cloud)
    assert image["used_by"] == 1
    seed = seed_of(cloud, vm)
    assert vm["uuid"].encode() in seed
    assert b"oscloud-saved" not in seed
    arguments = Path(f"/proc/{vm['pid']}/cmdline").read_text()
    assert '"seed-file"' in arguments
    assert "-incoming" in arguments
    cloud.until(lambda: cloud.rows("SELECT seed_document FROM vm") == [("",)], "keeping")
    cloud.call("vm_stop", vm="web", force=True)
    cloud.call("vm_start", vm="web")
    assert cloud.call("vm_wait", vm="web", state="ready", timeout=60)["started"] == "cold"
    gone(cloud, vm)


def test_nothing_of_the_making_is_left(cloud: Box) -> None:
    run = cloud.root / "run/warm"
    assert not run.exists() or not list(run.iterdir())
    [directory] = (cloud.root / "state/warm").glob("[!.]*")
    assert not (directory / "seed.iso").exists()


def test_user_data_are_for_a_first_boot(cloud: Box) -> None:
    with pytest.raises(RpcError, match="user_data can't begin warm") as refused:
        cloud.create("web", warm="only", user_data="#cloud-config\n", **VM)
    assert (refused.value.kind, refused.value.data["parameter"]) == ("invalid_argument", "warm")
    vm = cloud.create("web", warm="auto", user_data="#cloud-config\n", **VM)
    assert vm["started"] == "cold"
    gone(cloud, vm)


@pytest.mark.parametrize("fault", ["crash_when_told", "restore_fails"])
def test_one_that_can_not_be_told_is_started_cold_by_its_seed(cloud: Box, fault: str) -> None:
    vm = cloud.create(f"web-{fault}", warm="only", **VM)
    assert (vm["state"], vm["ready"], vm["started"]) == ("RUNNING", True, "cold")
    assert cloud.rows("SELECT identified, seed_document FROM vm") == [(1, "")]
    gone(cloud, vm)


def test_none_is_made_unasked(cloud: Box) -> None:
    vm = cloud.create("web", warm="auto", **{**VM, "mem_size": "130M"})
    assert vm["started"] == "cold"
    gone(cloud, vm)
    assert len(images(cloud)) == 1
    assert "template_warm" not in [job["kind"] for job in cloud.call("job_list", limit=3)]


def test_firmware_of_another_kind_is_refused(cloud: Box) -> None:
    send(cloud, "modern", qcow2(), firmware="uefi")
    with pytest.raises(RpcError, match="can't be kept warm: it boots by UEFI") as refused:
        cloud.call("template_warm", template="modern", **SHAPE)
    assert (refused.value.kind, refused.value.data["parameter"]) == ("invalid_argument", "template")
    assert images(cloud, "modern") == []


def test_a_killed_daemon_leaves_the_clone_to_the_next(cloud: Box) -> None:
    vm = cloud.create("web", warm="only", **VM)
    cloud.end(signal.SIGKILL)
    cloud.start()
    again = cloud.call("vm_wait", vm="web", state="ready", timeout=60)
    assert (again["pid"], again["started"]) == (vm["pid"], "warm")
    gone(cloud, vm)
