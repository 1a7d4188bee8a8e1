"""Layers that are merged when snapshots are deleted, with a qemu that runs no machine.

What a disk and its snapshots hold is read with qemu-img, by what the images say of themselves.
"""

import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import check_accounted
from daemon_process import Box
from test_rpc_clones import clone, layers_of
from test_rpc_leftovers import put_back, save
from test_rpc_snapshots import layers, run_again, settled, tree, written
from test_rpc_suspend import refused, remembered

from oscloudd.cloud.layers import MAX_LAYERS

KEPT, TAKEN = 3, 42
BLOCK = 4096
SIZE = 16 << 20


def write(box: Box, vm: dict[str, Any], offset: int, byte: int) -> None:
    """Write a block to a vm's disk, as its guest would; a byte of 0 is written as zeros."""
    what = f"-P {byte}" if byte else "-z"
    disk = box.root / f"state/disks/{vm['disk']}/disk.qcow2"
    argv = ["qemu-io", "-f", "qcow2", "-c", f"write {what} {offset} {BLOCK}", disk]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def read(path: Path) -> bytes:
    """Read what was written from 1 MiB on; before that is the guest's own."""
    raw = path.with_name("read.raw")
    subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    content = raw.read_bytes()
    raw.unlink()
    assert len(content) == SIZE
    return content[1 << 20 :]


def disk_of(box: Box, vm: dict[str, Any]) -> bytes:
    return read(box.root / f"state/disks/{vm['disk']}/disk.qcow2")


def snapshots_of(box: Box) -> dict[str, bytes]:
    found = box.rows("SELECT name, layer_id FROM snapshot")
    return {name: read(box.root / f"state/layers/{layer}/disk.qcow2") for name, layer in found}


def take(box: Box, vm: dict[str, Any], number: int) -> bytes:
    """Write something, over what was written before too, and take a snapshot; give what it has."""
    write(box, vm, (1 << 20) + number % 7 * BLOCK, number)
    write(box, vm, (2 << 20) + number * (BLOCK // 2), 0 if number % 3 else number)
    write(box, vm, (3 << 20) + number % 16 * 65536, number)
    content = disk_of(box, vm)
    box.call("snapshot_create", vm=vm["name"], name=f"s{number}")
    return content


def without_names(box: Box, kept: str) -> None:
    """Have a database as one was when layers were never merged."""
    box.end()
    with sqlite3.connect(box.root / "state/oscloud.db") as database:
        database.execute("DELETE FROM snapshot WHERE name != ?", (kept,))
    database.close()
    box.start()


def test_snapshots_come_and_go_for_ever(box: Box) -> None:
    vm = settled(box, "web")
    held: dict[str, bytes] = {}
    for number in range(1, TAKEN + 1):
        held[f"s{number}"] = take(box, vm, number)
        if number % 10 == 0:
            box.call("vm_pause", vm="web")
            box.call("vm_resume", vm="web")
        if len(held) > KEPT:
            # The oldest, and one in the middle now and then.
            gone = list(held)[number % 2]
            assert box.call("snapshot_delete", vm="web", snapshot=gone)["kept"]
            del held[gone]
            assert layers_of(box, vm) == KEPT
    assert snapshots_of(box) == held
    assert list(tree(box).items()) == list(zip(held, [None, *held], strict=False))
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]
    before = disk_of(box, vm), written(box)
    run_again(box)
    assert (disk_of(box, vm), written(box)) == (before[0], before[1] + 1)
    for name, content in held.items():
        box.call("snapshot_restore", vm="web", snapshot=name, force=True)
        assert disk_of(box, vm) == content
    check_accounted(box)


def test_a_vm_without_snapshots_stands_on_one_layer(box: Box) -> None:
    vm = settled(box, "web")
    for _ in range(4):
        box.call("snapshot_create", vm="web", name="a")
        box.call("snapshot_delete", vm="web", snapshot="a")
        assert layers_of(box, vm) == 1
    run_again(box)
    check_accounted(box)


def test_what_an_older_program_has_left_is_merged(box: Box) -> None:
    vm = settled(box, "web")
    contents = [take(box, vm, number) for number in range(1, 7)]
    without_names(box, "s4")
    assert layers_of(box, vm) == 6
    box.call("snapshot_create", vm="web", name="last")
    box.call("snapshot_delete", vm="web", snapshot="last")
    assert layers(box) == [4, 7]
    assert snapshots_of(box) == {"s4": contents[3]}
    assert disk_of(box, vm) == contents[5]
    run_again(box)
    check_accounted(box)


def test_where_there_are_as_many_as_may_be_they_are_merged_first(box: Box) -> None:
    vm = settled(box, "web")
    fill_up(box)
    contents = snapshots_of(box)
    assert layers_of(box, vm) == MAX_LAYERS
    box.call("snapshot_create", vm="web", name="more")
    assert layers_of(box, vm) == MAX_LAYERS
    merged = box.rows("SELECT id FROM job WHERE kind = 'layers_merge' AND state = 'DONE'")
    assert len(merged) == 1
    assert contents.items() < snapshots_of(box).items()
    error = refused(box, "vm_clone", vm="web", name="copy")
    assert (error.kind, error.data["resource"]) == ("exhausted", "layers")
    assert "snapshot-delete web" in error.data["hint"]
    clone(box, "copy", snapshot="s1")


def fill_up(box: Box) -> None:
    """Have a vm stand on as many layers as it may, of which the lowest two can become one."""
    clone(box, "copy")
    box.call("vm_delete", vm="copy", force=True)
    for number in range(1, MAX_LAYERS):
        box.call("snapshot_create", vm="web", name=f"s{number}")


def test_clones_stand_on_what_they_were_made_of(box: Box) -> None:
    vm = settled(box, "web")
    contents = {f"s{number}": take(box, vm, number) for number in range(1, 5)}
    copy = clone(box, "copy", snapshot="s2")
    for name in ("s1", "s2", "s3"):
        box.call("snapshot_delete", vm="web", snapshot=name)
    # s1 is a part of s2, on which the clone stands, and s3 one of s4.
    assert layers(box) == [2, 4]
    assert disk_of(box, copy) == contents["s2"]
    for name in ("web", "copy"):
        run_again(box, name)
    assert disk_of(box, copy) == contents["s2"]
    assert snapshots_of(box) == {"s4": contents["s4"]}
    check_accounted(box)
    box.call("vm_delete", vm="copy", force=True)
    box.call("snapshot_create", vm="web", name="b")
    box.call("snapshot_delete", vm="web", snapshot="b")
    assert layers(box) == [4, 5]
    assert disk_of(box, vm) == contents["s4"]
    check_accounted(box)


def test_the_memory_of_a_snapshot_goes_with_it_as_before(box: Box) -> None:
    vm = settled(box, "web")
    take(box, vm, 1)
    memory, runs = remembered(box, "web"), written(box)
    box.call("snapshot_create", vm="web", name="b", memory=True)
    run_again(box)
    box.call("snapshot_delete", vm="web", snapshot="s1")
    assert layers(box) == [2]
    box.call("snapshot_restore", vm="web", snapshot="b", force=True)
    assert (remembered(box, "web"), written(box)) == (memory, runs + 1)
    check_accounted(box)


def test_an_older_copy_of_the_database_does_not_find_what_was_merged(box: Box) -> None:
    vm = settled(box, "web")
    for number in (1, 2):
        take(box, vm, number)
    box.call("vm_stop", vm="web", force=True)
    box.end()
    save(box, "older.db")
    box.start()
    box.call("snapshot_delete", vm="web", snapshot="s1")
    box.end()
    save(box, "newer.db")
    put_back(box, "older.db")
    box.start()
    error = refused(box, "vm_start", vm="web")
    assert (error.kind, "layers/1/disk.qcow2" in error.message) == ("host_failure", True)
    box.end()
    put_back(box, "newer.db")
    box.start()
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


@pytest.mark.parametrize("trouble", ["no room", "damaged", "missing", "missing above"])
def test_what_can_not_be_merged_stays(box: Box, trouble: str) -> None:
    vm = settled(box, "web")
    contents = [take(box, vm, number) for number in (1, 2, 3)]
    config = box.root / "oscloud.toml"
    told = config.read_text()
    # What a layer further up says that it stands on must be known, too.
    layer = box.root / f"state/layers/{3 if trouble == 'missing above' else 1}/disk.qcow2"
    if trouble == "no room":
        box.end()
        config.write_text(told.replace("[warm]", '[limits]\nmin_free_disk = "900T"\n[warm]'))
        box.start()
    elif trouble == "damaged":
        whole = layer.read_bytes()
        layer.write_bytes(whole[: 1 << 16] + bytes(1 << 16) + whole[2 << 16 :])
    else:
        layer.rename(box.root / "kept")
    pid = box.call("vm_info", vm="web")["pid"]
    assert box.call("snapshot_delete", vm="web", snapshot="s1")["kept"]
    assert tree(box) == {"s2": None, "s3": "s2"}
    assert "layer 1 stays below layer 2 for now" in box.log()
    assert (layers(box), layers_of(box, vm)) == ([1, 2, 3], 3)
    assert box.call("vm_info", vm="web")["pid"] == pid
    if trouble == "no room":
        box.end()
        config.write_text(told)
        box.start()
    elif trouble == "damaged":
        layer.write_bytes(whole)
    else:
        (box.root / "kept").rename(layer)
    box.call("snapshot_delete", vm="web", snapshot="s2")
    assert layers(box) == [3]
    assert snapshots_of(box) == {"s3": contents[2]}
    run_again(box)
    check_accounted(box)
