"""Data disks plugged in and out: the nodes and devices, and machines that do not play along."""

import asyncio
import subprocess
from pathlib import Path

import pytest
from test_machine_qemu import Bench, bench, fake, files, run

from oscloudd.errors import HostError, InvalidStateError, OperationTimeoutError
from oscloudd.host.images import create_empty, virtual_size_bytes
from oscloudd.machine import arguments
from oscloudd.machine.hotplug import (
    DataDisk,
    build_disk_device,
    build_disk_nodes,
    is_plugged,
    plug_disk,
    unplug_disk,
)
from oscloudd.machine.qemu import Qemu

__all__ = ["bench", "fake", "files"]

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> DataDisk:
    path = tmp_path / "data.qcow2"
    asyncio.run(create_empty(path, MIB))
    return DataDisk(3, "data", 2 * MIB, path)


def test_the_nodes_of_an_empty_disk_read_nothing_else() -> None:
    file_node, node = build_disk_nodes(DataDisk(3, "data", MIB, Path("/d")))
    assert file_node["filename"] == "/dev/fdset/106"
    assert (node["node-name"], node["file"], node["backing"]) == ("data3", "data3-file", None)
    assert not node["read-only"]


def test_a_disk_on_a_template_reads_it_and_does_not_write_it() -> None:
    disk = DataDisk(3, "data", MIB, Path("/d"), Path("/t"), "raw")
    base_file, base, _file_node, node = build_disk_nodes(disk)
    assert (base_file["filename"], base_file["read-only"]) == ("/dev/fdset/107", True)
    assert (base["driver"], base["read-only"]) == ("raw", True)
    assert node["backing"] == base["node-name"]


def test_a_guest_knows_a_disk_by_the_beginning_of_its_name() -> None:
    device = build_disk_device(DataDisk(3, "a" * 63, MIB, Path("/d")))
    assert (device["serial"], device["bus"], device["drive"]) == ("a" * 20, "port3", "data3")


def test_a_disk_is_plugged_in_once_and_grown_and_out_again(bench: Bench, disk: DataDisk) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        for _ in range(2):
            await plug_disk(machine, disk)
        assert await is_plugged(machine, 3)
        assert virtual_size_bytes(disk.path, "qcow2") == 2 * MIB
        for _ in range(2):
            await unplug_disk(machine, 3)
        assert not await is_plugged(machine, 3)
        await plug_disk(machine, disk)

    run(bench, scene())


def test_a_disk_that_is_not_let_go_of_stays(bench: Bench, disk: DataDisk) -> None:
    async def scene() -> None:
        machine = await bench.launch("keeps_disks")
        await plug_disk(machine, disk)
        with pytest.raises(OperationTimeoutError, match="has not let go"):
            await unplug_disk(machine, 3, timeout_seconds=0.1)
        assert await is_plugged(machine, 3)

    run(bench, scene())


def test_a_disk_whose_file_is_gone_leaves_the_machine_as_it_was(
    bench: Bench, disk: DataDisk
) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        disk.path.rename(disk.path.with_name("away"))
        with pytest.raises(HostError, match="can't be opened"):
            await plug_disk(machine, disk)
        disk.path.with_name("away").rename(disk.path)
        await plug_disk(machine, disk)

    run(bench, scene())


def test_what_a_dead_daemon_had_begun_is_in_nobodys_way(bench: Bench, disk: DataDisk) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        for node in build_disk_nodes(disk):
            await machine.monitor.execute("blockdev-add", node)
        await plug_disk(machine, disk)
        assert await is_plugged(machine, 3)

    run(bench, scene())


def test_a_machine_of_an_older_version_has_no_ports(
    bench: Bench, disk: DataDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "PORTS", 0)

    async def scene() -> None:
        machine = await bench.launch()
        with pytest.raises(InvalidStateError, match="older version"):
            await plug_disk(machine, disk)

    run(bench, scene())


def test_the_real_qemu_does_what_the_fake_one_does(bench: Bench, disk: DataDisk) -> None:
    """Nobody runs in it who could let go of a disk: that is shown with guests."""

    async def grows(machine: Qemu, size_bytes: int) -> None:
        nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
        assert sizes["data3"] == size_bytes

    async def scene() -> None:
        bench.spec = arguments.MachineSpec(**{**vars(bench.spec), "binary": "qemu-system-x86_64"})
        machine = await bench.launch()
        for _ in range(2):
            await plug_disk(machine, disk)
        await grows(machine, 2 * MIB)
        with pytest.raises(OperationTimeoutError):
            await unplug_disk(machine, 3, timeout_seconds=0.1)
        await machine.stop(force=True)
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk.path], check=True)

    run(bench, scene())
