"""Vms with data disks, or with a firmware that remembers, exported and imported over the socket."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_images import backed_by
from daemon_process import Box, RpcError
from test_rpc_exports import as_raw, export, left, stopped
from test_rpc_templates import RAW, machine_of, send
from test_rpc_vm_copies import build, footprint, members_of, take, without_kernel

from oscloudd.host.firmware import UEFI_VARIABLES

MIB = 1 << 20
CHANGED = b"what its firmware has learned".ljust(UEFI_VARIABLES.stat().st_size, b"\xff")


def disk_of(box: Box, name: str) -> dict[str, Any]:
    disk: dict[str, Any] = box.call("disk_info", disk=name)
    return disk


def variables_of(box: Box, vm: dict[str, Any]) -> Path:
    return box.root / "state/disks" / str(vm["disk"]) / "variables.fd"


def write_to(disk: dict[str, Any], pattern: int, offset: int) -> None:
    command = f"write -P {pattern} {offset} 64k"
    argv = ["qemu-io", "-f", "qcow2", "-c", command, disk["path"]]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def contents(box: Box, name: str) -> bytes:
    content, _answer = export(box, "disk_export", disk=name, format="raw")
    return content


def manifest_of(archive: bytes) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(dict(members_of(archive))["manifest.json"])
    return manifest


def make_disks(box: Box) -> dict[str, Any]:
    """Make `web`, off, with a disk in slots 1 and 3 that hold something."""
    vm = stopped(box)
    for number, name in enumerate(("data", "none", "more"), 1):
        box.call("disk_create", name=name, size="8M")
        write_to(disk_of(box, name), number, number * MIB)
        box.call("disk_attach", vm="web", disk=name)
    box.call("disk_detach", vm="web", disk="none")
    box.call("disk_delete", disk="none")
    return vm


def delete_all(box: Box) -> None:
    box.call("vm_delete", vm="web", force=True)
    for disk in box.call("disk_list"):
        box.call("disk_delete", disk=disk["id"])


@pytest.fixture
def archive(box: Box) -> bytes:
    """An exported vm with two data disks, which is not there any more."""
    make_disks(box)
    content, _answer = export(box, "vm_export", vm="web")
    delete_all(box)
    return build(without_kernel(content))


def test_data_disks_come_with_their_vm(box: Box) -> None:
    make_disks(box)
    was = {name: contents(box, name) for name in ("data", "more")}
    before = footprint(box)
    content, _answer = export(box, "vm_export", vm="web")
    assert footprint(box) == before
    assert left(box) == []
    members = members_of(content)
    assert [name for name, _data in members if name != "kernel"] == [
        "manifest.json", "disk.qcow2", "data1.qcow2", "data3.qcow2", "SHA256SUMS",
    ]  # fmt: skip
    assert manifest_of(content)["disks"] == [
        {"slot": 1, "name": "data", "size": 8 * MIB}, {"slot": 3, "name": "more", "size": 8 * MIB},
    ]  # fmt: skip
    assert as_raw(box, dict(members)["data1.qcow2"]) == was["data"]
    delete_all(box)
    vm = take(box, content)
    for name, slot in (("data", 1), ("more", 3)):
        disk = disk_of(box, name)
        path = Path(disk["path"])
        assert (disk["vm"], disk["role"], disk["slot"], disk["kept"]) == ("web", "data", slot, True)
        assert (disk["size"], disk["template"], disk["layers"]) == (8 * MIB, None, 0)
        assert [each.stat().st_mode & 0o777 for each in (path.parent, path)] == [0o700, 0o600]
        assert contents(box, name) == was[name]
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"
    box.call("vm_delete", vm=vm["id"], force=True)
    # They are disks like others: they stay, and may be given to another.
    assert [disk["name"] for disk in box.call("disk_list")] == ["data", "more"]
    again = take(box, content)
    names = {disk["slot"]: disk["name"] for disk in box.call("disk_list") if disk["role"] == "data"}
    assert names == {slot: f"{name}-{again['uuid'][:8]}-{slot}"
                     for name, slot in (("data", 1), ("more", 3))}  # fmt: skip
    assert contents(box, names[3]) == was["more"]


def test_a_disk_on_a_template_is_whole_afterwards(box: Box) -> None:
    stopped(box)
    send(box, "mine", RAW)
    size = disk_of(box, box.call("disk_create", name="data", template="mine")["name"])["size"]
    box.call("disk_attach", vm="web", disk="data")
    box.call("disk_resize", disk="data", size=size + MIB)
    content, _answer = export(box, "vm_export", vm="web")
    delete_all(box)
    box.call("template_delete", template="mine")
    take(box, content)
    assert contents(box, "data") == RAW + bytes(MIB)


@pytest.mark.parametrize("new_identity", [False, True])
def test_cards_come_into_the_ports_that_disks_leave(box: Box, *, new_identity: bool) -> None:
    make_disks(box)
    box.call("network_create", name="lab", subnet="10.20.0.0/24")
    vm = box.call("nic_add", vm="web", network="lab")
    assert [nic["slot"] for nic in vm["nics"]] == [0, 2]
    content, _answer = export(box, "vm_export", vm="web")
    delete_all(box)
    taken = take(box, content, new_identity=new_identity)
    assert [nic["slot"] for nic in taken["nics"]] == [0, 2]
    assert box.call("vm_start", vm="web", wait=False)


def test_what_has_nothing_new_in_it_is_as_it_always_was(box: Box, archive: bytes) -> None:
    stopped(box)
    content, _answer = export(box, "vm_export", vm="web")
    manifest = manifest_of(content)
    assert (manifest["version"], manifest.keys() & {"disks", "firmware"}) == (1, set())
    assert "firmware" not in manifest["template"]


def card(number: int) -> dict[str, str]:
    return {"network": f"lab{number}", "ip": "10.20.0.2", "mac": f"52:54:00:00:00:{number:02x}"}


def bad_archives(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Give what is refused, and a piece of the reason."""
    members = members_of(good)
    manifest, root, first, third, sums = members
    disks = manifest_of(good)["disks"]
    cards = [card(number) for number in range(7)]
    yield "7 further network cards and 2 data disks", build(members, vm={"nics": cards})
    for key, value, words in (
        ("slot", 0, "slots 1 to 8"), ("slot", 9, "slots 1 to 8"), ("slot", 3, "slots 1 to 8"),
        ("slot", -1, "slots 1 to 8"), ("slot", 2, "other files"), ("slot", "1", "can't be read"),
        ("name", "../x", "can't be used"), ("name", "more", "of one name"), ("name", "7", "digits"),
        ("size", 0, "impossible size"), ("size", 2 << 40, "impossible size"),
        ("size", 8 * MIB + 1, "impossible size"), ("size", 4 * MIB, "its manifest says"),
        ("path", "/etc/passwd", "can't be read"),
    ):  # fmt: skip
        yield words, build(members, disks=[disks[0] | {key: value}, disks[1]])
    yield "slots 1 to 8", build(members, disks=disks[::-1])
    yield "slots 1 to 8", build(members, disks=disks * 5000)
    yield "other files", build([manifest, root, first, sums])
    yield "other files", build(members, disks=disks[:1])
    yield "other files", build([manifest, root, third, first, sums])
    yield "other files", build([manifest, first, third, root, sums])
    yield "other files", build([manifest, ("variables.fd", b"x"), root, first, third, sums])
    yield "data3.qcow2 is refused", build([*members[:3], ("data3.qcow2", b"no image"), sums])
    overlay = backed_by("/etc/passwd")
    yield "data3.qcow2 is refused", build([*members[:3], ("data3.qcow2", overlay), sums])
    uefi = {"firmware": "uefi"}
    yield "other files", build(members, template=uefi)
    yield (
        "another firmware",
        build([manifest, ("variables.fd", CHANGED[1:]), root, first, third, sums], template=uefi),
    )
    yield (
        "impossible size",
        build([manifest, ("variables.fd", bytes((8 << 20) + 1)), *members[1:]], template=uefi),
    )
    yield (
        "other files",
        build([manifest, ("kernel", b"k"), ("variables.fd", CHANGED), *members[1:]], template=uefi),
    )
    yield "can't be read", build(members, template={"firmware": "coreboot"})


def test_every_bad_disk_is_refused_and_leaves_nothing(box: Box, archive: bytes) -> None:
    seen = 0
    for words, content in bad_archives(archive):
        with pytest.raises(RpcError) as refused:
            take(box, content)
        assert refused.value.kind == "invalid_argument", (refused.value.message, words)
        assert words in refused.value.message, (refused.value.message, words)
        assert box.traces() == {}, words
        assert box.call("disk_list") == [], words
        assert list((box.root / "state/disks").iterdir()) == [], words
        seen += 1
    assert seen > 25
    take(box, archive)


def test_a_guest_that_boots_by_uefi_brings_what_its_firmware_knows(box: Box) -> None:
    send(box, "mine", RAW, firmware="uefi")
    vm = stopped(box, image="mine", mem_size="128M")
    variables_of(box, vm).write_bytes(CHANGED)
    content, _answer = export(box, "vm_export", vm="web")
    assert left(box) == []
    names = [name for name, _data in members_of(content)]
    assert names == ["manifest.json", "seed.iso", "variables.fd", "disk.qcow2", "SHA256SUMS"]
    delete_all(box)
    box.call("template_delete", template="mine")
    taken = take(box, content)
    assert variables_of(box, taken).read_bytes() == CHANGED
    started = box.call("vm_start", vm="web", wait=False) and box.wait("web", "RUNNING")
    assert machine_of(started).endswith(",pflash0=firmware,pflash1=variables")
    box.call("vm_stop", vm="web", force=True)
    again, _answer = export(box, "vm_export", vm="web")
    assert manifest_of(again)["template"]["firmware"] == "uefi"
    twin = take(box, again, name="twin", new_identity=True)
    assert variables_of(box, twin).read_bytes() == CHANGED
    assert twin["os"] == taken["os"]


def test_a_disk_that_no_import_takes_is_not_exported(box: Box) -> None:
    stopped(box)
    box.call("disk_create", name="huge", size="2T")
    box.call("disk_attach", vm="web", disk="huge")
    with pytest.raises(RpcError) as refused:
        export(box, "vm_export", vm="web")
    assert (refused.value.kind, "'huge' has 2T" in refused.value.message) == ("invalid_state", True)
    assert left(box) == []
