"""Snapshots over the socket, with a qemu that runs no machine: the tree, states and refusals."""

import os
import subprocess
from pathlib import Path
from typing import Any

from cloud_accounts import check_accounted
from daemon_process import Box
from test_rpc_leftovers import put_back, save
from test_rpc_suspend import create, refused, remembered

from oscloudd.cloud.layers import MAX_LAYERS


def settled(box: Box, name: str, **params: Any) -> dict[str, Any]:
    """Make a vm whose disk knows who it is."""
    vm = create(box, name, **params)
    document = "SELECT seed_document FROM vm WHERE id = ?"
    box.until(lambda: box.rows(document, vm["id"]) == [("",)], "the guest's disk to have it")
    return vm


def written(box: Box, vm: str = "web") -> Any:
    """Give what the guest has on its disk: a number that each start of it counts up."""
    return box.call("vm_qemu_command", vm=vm, command="x-runs")


def run_again(box: Box, vm: str = "web") -> None:
    box.call("vm_restart", vm=vm, force=True)


def tree(box: Box, vm: str = "web") -> dict[str, Any]:
    return {each["name"]: each["parent"] for each in box.call("snapshot_list", vm=vm)}


def current(box: Box, vm: str = "web") -> list[str]:
    return [each["name"] for each in box.call("snapshot_list", vm=vm) if each["current"]]


def test_a_vm_that_is_off_comes_back_to_a_snapshot(box: Box) -> None:
    settled(box, "web")
    run_again(box)
    before = written(box)
    box.call("vm_stop", vm="web", force=True)
    made = box.call("snapshot_create", vm="web", name="a", description="before")
    assert (made["kind"], made["parent"], made["current"]) == ("disk", None, True)
    assert (made["description"], made["size"]) == ("before", 16 << 20)
    assert made["allocated"] > 0
    assert box.call("vm_info", vm="web")["state"] == "STOPPED"
    box.call("vm_start", vm="web")
    assert written(box) == before + 1
    box.call("vm_stop", vm="web", force=True)
    seen = box.call("snapshot_restore", vm="web", snapshot="a")
    assert (seen["state"], seen["wanted_state"]) == ("STOPPED", "STOPPED")
    assert "'a'" in seen["reason"]
    box.call("vm_start", vm="web")
    assert written(box) == before + 1  # this start, and none of those before
    check_accounted(box)


def test_a_running_guest_goes_on_and_is_restored_by_force(box: Box) -> None:
    vm = settled(box, "web")
    before = written(box)
    box.call("snapshot_create", vm="web", name="a")
    seen = box.call("vm_info", vm="web")
    assert (seen["pid"], seen["state"]) == (vm["pid"], "RUNNING")
    box.call("vm_pause", vm="web")
    box.call("vm_resume", vm="web")
    assert written(box) == before + 1  # into the overlay it was given while it ran
    layer = next(iter(box.root.glob("state/layers/*/disk.qcow2")))
    assert layer.stat().st_mode & 0o777 == 0o400
    error = refused(box, "snapshot_restore", vm="web", snapshot="a")
    assert (error.kind, "--force" in error.data["hint"]) == ("invalid_state", True)
    seen = box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    assert (seen["state"], seen["wanted_state"]) == ("RUNNING", "RUNNING")
    assert seen["pid"] != vm["pid"]
    assert written(box) == before + 1
    check_accounted(box)


def test_snapshots_make_a_tree_and_layers_go_with_the_last_that_stands_on_them(box: Box) -> None:
    settled(box, "web")
    for name in ("a", "b"):
        box.call("snapshot_create", vm="web", name=name)
    box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    box.call("snapshot_create", vm="web", name="c")
    assert tree(box) == {"a": None, "b": "a", "c": "a"}
    assert current(box) == ["c"]
    assert box.call("disk_info", disk=1)["layers"] == 2
    assert box.call("snapshot_delete", vm="web", snapshot="a") == {
        "deleted": "a", "vm": "web", "kept": True,
    }  # fmt: skip
    assert tree(box) == {"b": None, "c": None}
    check_accounted(box)
    assert not box.call("snapshot_delete", vm="web", snapshot="b")["kept"]
    assert box.call("snapshot_delete", vm="web", snapshot="c")["kept"]
    # What a had and nobody else stands on became a part of what c had.
    assert (tree(box), box.call("disk_info", disk=1)["layers"]) == ({}, 1)
    check_accounted(box)
    box.call("vm_delete", vm="web", force=True)
    check_accounted(box)
    assert not list(box.root.glob("state/layers/*"))


def test_the_chain_is_one_that_qemu_img_finds_sound(box: Box) -> None:
    vm = settled(box, "web")
    box.call("vm_stop", vm="web", force=True)
    for name in ("a", "b"):
        box.call("snapshot_create", vm="web", name=name)
    disk = box.root / f"state/disks/{vm['disk']}/disk.qcow2"
    shown = subprocess.check_output(["qemu-img", "info", "--backing-chain", disk], text=True)
    files = [line.split()[1] for line in shown.splitlines() if line.startswith("image:")]
    layers = [str(box.root / f"state/layers/{number}/disk.qcow2") for number in (2, 1)]
    assert files[:3] == [str(disk), *layers]
    assert len(files) == 4


def test_what_can_not_be_done(box: Box) -> None:
    settled(box, "web")
    box.call("snapshot_create", vm="web", name="a")
    error = refused(box, "snapshot_create", vm="web", name="a")
    assert (error.kind, "snapshot-delete web a" in error.data["hint"]) == ("already_exists", True)
    for method in ("snapshot_restore", "snapshot_delete"):
        error = refused(box, method, vm="web", snapshot="nope")
        assert (error.kind, "snapshot-list web" in error.data["hint"]) == ("not_found", True)
    for name in ("", "a/b", "x" * 64):
        assert refused(box, "snapshot_create", vm="web", name=name).kind == "invalid_argument"
    error = refused(box, "snapshot_create", vm="web", name="b", description="x" * 1001)
    assert error.kind == "invalid_argument"
    box.call("vm_suspend", vm="web")
    error = refused(box, "snapshot_create", vm="web", name="b")
    assert (error.kind, "vm-resume web" in error.data["hint"]) == ("invalid_state", True)
    assert refused(box, "snapshot_restore", vm="web", snapshot="a").kind == "invalid_state"
    seen = box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    assert seen["state"] == "STOPPED"
    check_accounted(box)
    box.create("new-identity_silent")
    error = refused(box, "snapshot_create", vm="new-identity_silent", name="a")
    assert (error.kind, "who it is" in error.message) == ("invalid_state", True)


def test_layers_are_bounded(box: Box) -> None:
    settled(box, "web")
    box.call("vm_stop", vm="web", force=True)
    for number in range(MAX_LAYERS):
        box.call("snapshot_create", vm="web", name=f"s{number}")
    error = refused(box, "snapshot_create", vm="web", name="more")
    assert (error.kind, error.data["resource"]) == ("exhausted", "layers")
    assert "snapshot-delete web" in error.data["hint"]
    box.call("snapshot_delete", vm="web", snapshot="s0")
    box.call("snapshot_create", vm="web", name="more")
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"
    check_accounted(box)


def test_a_qemu_that_refuses_leaves_its_guest_as_it_was(box: Box) -> None:
    vm = settled(box, "web-disk_fails")
    before = written(box, vm["name"])
    error = refused(box, "snapshot_create", vm=vm["name"], name="a")
    assert (error.kind, "ould not open" in error.message) == ("host_failure", True)
    seen = box.call("vm_info", vm=vm["name"])
    assert (seen["pid"], seen["state"]) == (vm["pid"], "RUNNING")
    assert tree(box, vm["name"]) == {}
    run_again(box, vm["name"])
    check_accounted(box)
    assert written(box, vm["name"]) == before + 1


def test_an_overlay_that_can_not_be_made_changes_nothing(box: Box) -> None:
    vm = settled(box, "web")
    layers = box.root / "state/layers"
    layers.touch()
    error = refused(box, "snapshot_create", vm="web", name="a")
    assert (error.kind, str(layers) in error.message) == ("host_failure", True)
    layers.unlink()
    seen = box.call("vm_info", vm="web")
    assert (seen["pid"], seen["state"], tree(box)) == (vm["pid"], "RUNNING", {})
    assert box.rows("SELECT id FROM layer") == []
    box.call("snapshot_create", vm="web", name="a")
    missing = box.root / "missing"
    layers.rename(missing)
    error = refused(box, "snapshot_restore", vm="web", snapshot="a", force=True)
    assert error.kind == "host_failure"
    missing.rename(layers)
    seen = box.call("vm_info", vm="web")
    assert (seen["pid"], seen["state"]) == (vm["pid"], "RUNNING")
    box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    check_accounted(box)


def test_what_is_left_of_a_deleted_layer_is_swept_out(box: Box) -> None:
    settled(box, "web")
    box.call("snapshot_create", vm="web", name="a")
    box.call("snapshot_create", vm="web", name="b")
    box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    box.call("snapshot_delete", vm="web", snapshot="b")
    left = box.root / "state/layers/2"
    foreign = box.root / "state/layers/77"
    for directory in (left, foreign):
        directory.mkdir()
        (directory / "disk.qcow2").touch()
    box.end()
    box.start()
    box.until(lambda: not left.exists(), "the sweep")
    assert foreign.exists()
    assert layers(box) == [1, 77]
    box.call("snapshot_create", vm="web", name="c")
    assert layers(box) == [1, 77, 78]
    remove(foreign)
    check_accounted(box)


def layers(box: Box) -> list[int]:
    return sorted(int(path.name) for path in box.root.glob("state/layers/*"))


def remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    os.rmdir(directory)


def test_a_guest_goes_on_from_the_memory_of_a_snapshot(box: Box) -> None:
    vm = settled(box, "web")
    memory, before = remembered(box, "web"), written(box)
    made = box.call("snapshot_create", vm="web", name="a", memory=True)
    assert made["kind"] == "memory"
    seen = box.call("vm_info", vm="web")
    assert (seen["pid"], seen["state"], seen["reason"]) == (vm["pid"], "RUNNING", "")
    assert (remembered(box, "web"), written(box)) == (memory, before + 1)
    for path in box.root.glob("state/layers/1/memory/*"):
        assert path.stat().st_mode & 0o077 == 0, path
    run_again(box)
    assert remembered(box, "web") != memory
    # From a vm that is off, from one that runs, and once more.
    box.call("vm_stop", vm="web", force=True)
    for _ in range(2):
        seen = box.call("snapshot_restore", vm="web", snapshot="a", force=True)
        assert (seen["state"], seen["wanted_state"]) == ("RUNNING", "RUNNING")
        assert (remembered(box, "web"), written(box)) == (memory, before + 1)
        check_accounted(box)
    box.call("snapshot_restore", vm="web", snapshot="a", force=True, disk_only=True)
    assert remembered(box, "web") != memory
    assert box.call("snapshot_delete", vm="web", snapshot="a")["kept"]
    check_accounted(box)


def test_a_paused_guest_stays_so(box: Box) -> None:
    settled(box, "web")
    box.call("vm_pause", vm="web")
    memory = remembered(box, "web")
    for name, with_memory in (("a", False), ("b", True)):
        box.call("snapshot_create", vm="web", name=name, memory=with_memory)
        seen = box.call("vm_info", vm="web")
        assert (seen["state"], seen["reason"]) == ("PAUSED", "paused by the user")
    box.call("vm_resume", vm="web")
    assert remembered(box, "web") == memory


def test_memory_that_is_of_no_use_is_refused_before_anything_is_lost(box: Box) -> None:
    vm = settled(box, "web")
    box.call("vm_stop", vm="web", force=True)
    error = refused(box, "snapshot_create", vm="web", name="a", memory=True)
    assert (error.kind, error.data["state"]) == ("invalid_state", "STOPPED")
    box.call("vm_start", vm="web")
    box.call("snapshot_create", vm="web", name="a", memory=True)
    pid = box.call("vm_info", vm="web")["pid"]
    manifest = box.root / "state/layers/1/memory/suspended.json"
    text = manifest.read_text()
    for damaged, words in ((text.replace("7.2.22", "7.2.1"), "7.2.1"), ("{", "damaged")):
        manifest.write_text(damaged)
        error = refused(box, "snapshot_restore", vm="web", snapshot="a", force=True)
        assert (words in error.message, "--disk-only" in error.data["hint"]) == (True, True)
    assert box.call("vm_info", vm="web")["pid"] == pid
    seen = box.call("snapshot_restore", vm="web", snapshot="a", force=True, disk_only=True)
    assert (seen["state"], seen["ip"]) == ("RUNNING", vm["ip"])
    check_accounted(box)


def test_a_guest_that_can_not_be_saved_goes_on(box: Box) -> None:
    vm = settled(box, "web-save_fails")
    memory, before = remembered(box, vm["name"]), written(box, vm["name"])
    error = refused(box, "snapshot_create", vm=vm["name"], name="a", memory=True)
    assert (error.kind, "No space left" in error.message) == ("host_failure", True)
    seen = box.call("vm_info", vm=vm["name"])
    assert (seen["pid"], seen["state"]) == (vm["pid"], "RUNNING")
    assert (remembered(box, vm["name"]), tree(box, vm["name"])) == (memory, {})
    assert written(box, vm["name"]) == before + 1
    run_again(box, vm["name"])
    assert written(box, vm["name"]) == before + 2
    check_accounted(box)


def test_an_older_copy_of_the_database_mixes_no_two_disks(box: Box) -> None:
    vm = settled(box, "web")
    box.call("vm_stop", vm="web", force=True)
    box.end()
    save(box, "older.db")
    box.start()
    box.call("snapshot_create", vm="web", name="a")
    box.end()
    save(box, "newer.db")
    put_back(box, "older.db")
    box.start()
    before = (box.root / f"state/disks/{vm['disk']}/disk.qcow2").read_bytes()
    for method, params in (
        ("snapshot_create", {"vm": "web", "name": "b"}),
        ("disk_export", {"disk": vm["disk"]}),
        ("vm_start", {"vm": "web"}),
    ):
        error = refused(box, method, **params)
        assert error.kind == "host_failure"
        assert "stands on layers/1/disk.qcow2" in error.message
        assert "older copy of the database" in error.data["hint"]
    assert (box.root / f"state/disks/{vm['disk']}/disk.qcow2").read_bytes() == before
    box.end()
    put_back(box, "newer.db")
    box.start()
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


def test_memory_that_can_not_be_put_in_place_leaves_the_disk_restored(box: Box) -> None:
    vm = settled(box, "web")
    box.call("snapshot_create", vm="web", name="a", memory=True)
    before = written(box)
    box.call("snapshot_create", vm="web", name="b")
    state = box.root / "state/layers/1/memory/state"
    state.rename(box.root / "kept")
    error = refused(box, "snapshot_restore", vm="web", snapshot="a", force=True)
    assert error.kind == "host_failure"
    seen = box.call("vm_info", vm="web")
    assert (seen["state"], seen["pid"]) == ("ERROR", None)
    assert current(box) == ["a"]
    (box.root / "kept").rename(state)
    assert box.call("vm_start", vm="web")["started"] == "cold"
    assert written(box) == before
    check_accounted(box)
    assert vm["disk"] == box.call("vm_info", vm="web")["disk"]
