"""What a firmware remembers, over the socket: it goes with the disk in snapshots and clones."""

from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import check_accounted
from daemon_process import Box
from test_rpc_copied_disks import variables_of
from test_rpc_exports import export, stopped
from test_rpc_vm_copies import build, take, without_kernel

from oscloudd.host.firmware import UEFI_VARIABLES

SIZE = UEFI_VARIABLES.stat().st_size


def remember(box: Box, vm: dict[str, Any], what: str) -> None:
    """Write the vm's variables as its firmware does: in place."""
    with variables_of(box, vm).open("r+b") as file:
        file.write(what.encode().ljust(SIZE, b"\xff"))


def remembered(box: Box, vm: dict[str, Any]) -> str:
    content = variables_of(box, vm).read_bytes()
    assert len(content) == SIZE
    return content.rstrip(b"\xff").decode()


def kept_in_layers(box: Box) -> list[str]:
    found = sorted(
        box.root.glob("state/layers/*/variables.fd"), key=lambda path: int(path.parent.name)
    )
    return [path.read_bytes().rstrip(b"\xff").decode() for path in found]


def make_archive(box: Box) -> bytes:
    """Make an archive of a vm that boots by UEFI, is off, and whose disk knows who it is.

    It is one that was imported: such a guest would be told by cloud-init, which the fake has not.
    """
    stopped(box)
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm="web")
    manifest, *others = without_kernel(content)
    members = [manifest, ("variables.fd", UEFI_VARIABLES.read_bytes()), *others]
    return build(members, template={"firmware": "uefi"})


@pytest.fixture
def web(box: Box) -> dict[str, Any]:
    """A vm that boots by UEFI, and runs."""
    take(box, make_archive(box))
    vm: dict[str, Any] = box.call("vm_start", vm="web")
    return vm


def test_a_snapshot_keeps_them_and_a_restore_brings_them_back(
    box: Box, web: dict[str, Any]
) -> None:
    remember(box, web, "first")
    box.call("snapshot_create", vm="web", name="a")
    remember(box, web, "second")
    box.call("vm_stop", vm="web", force=True)
    box.call("snapshot_create", vm="web", name="b")
    assert kept_in_layers(box) == ["first", "second"]
    remember(box, web, "third")
    for name, what in (("a", "first"), ("b", "second"), ("a", "first")):
        box.call("snapshot_restore", vm="web", snapshot=name)
        assert remembered(box, web) == what
    box.call("vm_start", vm="web")
    remember(box, web, "fourth")
    box.call("snapshot_restore", vm="web", snapshot="b", force=True)
    assert remembered(box, web) == "second"
    assert [
        path.name for path in variables_of(box, web).parent.iterdir() if "next" in path.name
    ] == []
    check_accounted(box)


def test_a_clone_begins_with_its_originals(box: Box, web: dict[str, Any]) -> None:
    remember(box, web, "first")
    box.call("snapshot_create", vm="web", name="a")
    remember(box, web, "second")
    copy = box.call("vm_clone", vm="web", name="copy", wait="started")
    assert remembered(box, copy) == "second"
    remember(box, copy, "third")
    assert remembered(box, web) == "second"
    old = box.call("vm_clone", vm="web", name="old", snapshot="a", wait="started")
    assert remembered(box, old) == "first"
    for vm in (copy, old):
        box.call("vm_delete", vm=vm["id"], force=True)
    check_accounted(box)


def test_a_disk_that_is_as_it_was_frozen_may_have_other_variables(
    box: Box, web: dict[str, Any]
) -> None:
    box.call("vm_stop", vm="web", force=True)
    box.call("snapshot_create", vm="web", name="a")
    layers = box.call("disk_info", disk=web["disk"])["layers"]
    box.call("vm_clone", vm="web", name="same", wait="started")
    assert box.call("disk_info", disk=web["disk"])["layers"] == layers
    remember(box, web, "other")
    other = box.call("vm_clone", vm="web", name="other", wait="started")
    assert remembered(box, other) == "other"
    assert box.call("disk_info", disk=web["disk"])["layers"] == layers + 1


def test_a_layer_of_an_older_version_has_none(box: Box, web: dict[str, Any]) -> None:
    remember(box, web, "first")
    box.call("snapshot_create", vm="web", name="a")
    for kept in box.root.glob("state/layers/*/variables.fd"):
        Path(kept).unlink()
    copy = box.call("vm_clone", vm="web", name="old", snapshot="a", wait="started")
    assert variables_of(box, copy).read_bytes() == UEFI_VARIABLES.read_bytes()
    # A power cut may bring back what was made for another restore, which was undone.
    stale = variables_of(box, web).with_name("next.fd")
    stale.write_bytes(b"stale".ljust(SIZE, b"\xff"))
    box.call("snapshot_restore", vm="web", snapshot="a", force=True)
    assert remembered(box, web) == "first"
    assert not stale.exists()
