"""Clones over the socket, with a qemu that runs no machine: what they share, and refusals."""

from typing import Any

from cloud_accounts import check_accounted
from daemon_process import Box
from test_rpc_snapshots import run_again, settled, written
from test_rpc_suspend import refused


def clone(box: Box, name: str, **params: Any) -> dict[str, Any]:
    vm: dict[str, Any] = box.call("vm_clone", vm="web", name=name, wait="started", **params)
    identified = "SELECT identified FROM vm WHERE id = ?"
    box.until(lambda: box.rows(identified, vm["id"]) == [(1,)], "the clone's identity")
    return vm


def layers_of(box: Box, vm: dict[str, Any]) -> int:
    layers: int = box.call("disk_info", disk=vm["disk"])["layers"]
    return layers


def test_a_clone_has_what_its_original_had_and_is_another(box: Box) -> None:
    web = settled(box, "web", cpus=2, autostart="yes")
    for _ in range(3):
        run_again(box)
    before = written(box)
    copy = clone(box, "copy")
    assert (copy["state"], copy["cpus"], copy["mem_size"]) == ("RUNNING", 2, web["mem_size"])
    assert (copy["autostart"], copy["disk_size"], copy["started"]) == ("no", 16 << 20, "cold")
    for key in ("ip", "mac", "uuid", "serial_port", "ssh_host_keys", "disk", "id"):
        assert copy[key] != web[key], key
    log = box.call("vm_log", vm="copy", source="console", lines=100)["text"]
    assert "oscloud-identity: ready" in log  # its disk has one, and it asks all the same
    run_again(box, "copy")
    log = box.call("vm_log", vm="copy", source="console", lines=100)["text"]
    assert log.count("oscloud-identity: ready") == 1
    assert written(box) == before
    run_again(box)
    check_accounted(box)


def test_an_original_may_go_before_its_clones(box: Box) -> None:
    settled(box, "web")
    copy = clone(box, "copy")
    run_again(box, "copy")
    box.call("vm_delete", vm="web", force=True)
    check_accounted(box)
    assert layers_of(box, copy) == 1
    error = refused(box, "template_delete", template="fake_1")
    assert error.kind == "in_use"
    run_again(box, "copy")
    box.call("vm_delete", vm="copy", force=True)
    assert not list(box.root.glob("state/layers/*"))


def test_clones_of_a_snapshot_and_of_a_vm_that_is_off_add_no_layers(box: Box) -> None:
    web = settled(box, "web")
    box.call("snapshot_create", vm="web", name="a")
    run_again(box)
    of_snapshot = clone(box, "one", snapshot="a", mem_size="128M", disk_size="32M")
    assert (of_snapshot["mem_size"], of_snapshot["disk_size"]) == (128 << 20, 32 << 20)
    assert (layers_of(box, of_snapshot), layers_of(box, web)) == (1, 1)
    box.call("vm_stop", vm="web", force=True)
    for name in ("two", "three"):
        assert layers_of(box, clone(box, name)) == 2
    assert layers_of(box, web) == 2
    box.call("snapshot_delete", vm="web", snapshot="a")
    # A vm that was made by cloning is one like others.
    box.call("vm_suspend", vm="two")
    box.call("vm_resume", vm="two")
    for name in ("one", "two", "three"):
        run_again(box, name)
    check_accounted(box)


def test_a_clone_is_as_large_as_its_original_is_by_now(box: Box) -> None:
    web = settled(box, "web")
    box.call("vm_stop", vm="web", force=True)
    box.call("snapshot_create", vm="web", name="a")
    box.call("disk_resize", disk=web["disk"], size="64M")
    assert clone(box, "copy")["disk_size"] == 64 << 20
    assert refused(box, "vm_clone", vm="web", name="more", disk_size="32M").kind == (
        "invalid_argument"
    )
    assert clone(box, "then", snapshot="a")["disk_size"] == web["disk_size"]


def test_what_can_not_be_cloned(box: Box) -> None:
    web = settled(box, "web")
    for params, kind in (
        ({"name": "web"}, "already_exists"),
        ({"name": "copy", "snapshot": "nope"}, "not_found"),
        ({"name": "copy", "disk_size": "1M"}, "invalid_argument"),
        ({"name": "copy", "mem_size": "1M"}, "invalid_argument"),
        ({"name": "copy", "mem_size": "100T"}, "exhausted"),
        ({"name": "copy", "cpus": 0}, "invalid_argument"),
        ({"name": "a/b"}, "invalid_argument"),
        ({"name": "copy", "ip": "10.0.0.1"}, "invalid_argument"),
    ):
        assert refused(box, "vm_clone", vm="web", **params).kind == kind, params
    assert [vm["name"] for vm in box.call("vm_list")] == ["web"]
    assert layers_of(box, web) == 0
    box.call("vm_suspend", vm="web")
    error = refused(box, "vm_clone", vm="web", name="copy")
    assert (error.kind, "vm-resume web" in error.data["hint"]) == ("invalid_state", True)
    check_accounted(box)


def test_a_clone_that_fails_leaves_its_original_alone(box: Box) -> None:
    web = settled(box, "web")
    error = refused(box, "vm_clone", vm="web", name="copy-exit_at_start")
    assert (error.kind, "strike" in error.message) == ("host_failure", True)
    seen = box.call("vm_info", vm="web")
    assert (seen["pid"], seen["state"]) == (web["pid"], "RUNNING")
    run_again(box)
    check_accounted(box)
