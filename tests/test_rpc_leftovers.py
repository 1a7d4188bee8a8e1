"""What a daemon makes of things on its host that its database does not know."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Box

Stray = Callable[[Path], "subprocess.Popen[bytes]"]


@pytest.fixture
def stray() -> Iterator[Stray]:
    """Start processes that work in a directory; what is still there is ended."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(directory: Path) -> "subprocess.Popen[bytes]":
        directory.mkdir(parents=True, exist_ok=True)
        processes.append(subprocess.Popen(["sleep", "1000"], cwd=directory))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def decoy(stray: Stray, tmp_path: Path) -> Iterator[None]:
    """A process that works elsewhere, in a directory of the same name, and is never signalled."""
    process = stray(tmp_path / "run" / "vms" / "1")
    yield
    assert process.poll() is None, "the decoy was signalled"


def make_files(box: Box, *paths: str) -> list[Path]:
    made = [box.root / path for path in paths]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something")
    return made


def warnings(box: Box) -> list[tuple[str, str]]:
    rows = box.rows("SELECT name, data FROM event WHERE kind = 'warning' ORDER BY id")
    return [(name, json.loads(data)["message"]) for name, data in rows]


def warned_of(box: Box, *names: str) -> None:
    box.until(
        lambda: {name for name, _ in warnings(box)} >= set(names), f"warnings of {', '.join(names)}"
    )


def leftovers(box: Box) -> dict[str, Any]:
    checks = box.call("daemon_doctor")["checks"]
    found: dict[str, Any] = next(check for check in checks if check["check"] == "leftovers")
    return found


def delete(box: Box, name: str) -> None:
    box.call("vm_delete", vm=name, force=True)


@pytest.mark.usefixtures("decoy")
def test_what_is_left_of_a_deleted_vm_is_removed(box: Box, stray: Stray) -> None:
    vm = box.create("web")
    delete(box, "web")
    assert leftovers(box)["message"] == "everything here is in the database"
    box.end()
    process = stray(box.root / "run" / "vms" / "1")
    make_files(
        box,
        "run/vms/1/qmp.sock",
        "state/disks/1/disk.qcow2",
        "log/vm-1.log",
        "log/vm-1.console.log",
    )
    neighbour = ["neighbour", "add", vm["ip"], "lladdr", vm["mac"], "dev", "oscbr0"]
    box._ip(*neighbour, "nud", "permanent")
    box.start()
    warned_of(box, "vm 1", "disk 1", "neighbours")
    assert process.wait(5) == -signal.SIGKILL
    assert box.traces() == {}
    told = dict(warnings(box))
    assert told["vm 1"] == (
        "vm 1 was deleted from this database; what was left of it has been removed:"
        f" process {process.pid}, {box.root}/run/vms/1, {box.root}/log/vm-1.console.log,"
        f" {box.root}/log/vm-1.log"
    )
    assert f"{box.root}/state/disks/1" in told["disk 1"]
    assert f"{vm['ip']} on oscbr0" in told["neighbours"]
    assert box.create("next")["id"] == 2


@pytest.mark.usefixtures("decoy")
def test_what_has_an_id_never_given_is_told_of_and_left_alone(box: Box, stray: Stray) -> None:
    box.create("web")
    box.end()
    process = stray(box.root / "run" / "vms" / "7")
    kept = make_files(
        box,
        "run/vms/7/qmp.sock",
        "state/disks/9/disk.qcow2",
        "log/vm-8.log",
        "run/vms/of-somebody/file",
    )
    for _ in range(2):  # that the ids are foreign must outlive the daemon that set them aside
        box.start()
        warned_of(box, "vm 7", "vm 8", "disk 9", "leftovers")
        doctor = leftovers(box)
        assert doctor["verdict"] == "warning"
        for part in ("vm 7 (process", "vm 8 (", "disk 9 (", f"({box.root}/run/vms/of-somebody)"):
            assert part in doctor["message"]
        assert "put the newer one back" in doctor["hint"]
        box.end()
        box.rows("DELETE FROM event")
    box.start()
    warned_of(box, "leftovers")
    assert process.poll() is None
    assert all(path.exists() for path in kept)
    new = box.create("next")
    assert new["id"] == 9
    assert new["disk"] == 10
    delete(box, "next")
    # What is made from here on is ours again.
    box.end()
    make_files(box, "state/disks/10/disk.qcow2")
    box.start()
    warned_of(box, "disk 10")
    assert not (box.root / "state/disks/10").exists()
    assert all(path.exists() for path in kept)
    process.kill()
    process.wait()
    for path in kept:
        shutil.rmtree(path.parent) if path.parent.name != "log" else path.unlink()
    assert leftovers(box)["verdict"] == "ok"


def save(box: Box, name: str) -> None:
    """Copy the database, of which the daemon has let go."""
    shutil.copy2(box.root / "state" / "oscloud.db", box.root / name)


def put_back(box: Box, name: str) -> None:
    shutil.copy2(box.root / name, box.root / "state" / "oscloud.db")
    for ending in ("-wal", "-shm"):
        (box.root / "state" / f"oscloud.db{ending}").unlink(missing_ok=True)


def test_an_older_copy_of_the_database_costs_no_newer_vm(box: Box) -> None:
    old = box.create("old")
    box.create("gone")
    box.end()
    save(box, "older.db")
    box.start()
    delete(box, "gone")
    newer = box.create("newer")
    disk = box.root / "state" / "disks" / str(newer["disk"]) / "disk.qcow2"
    box.end()
    save(box, "newer.db")

    put_back(box, "older.db")
    given = {newer["id"]}
    for _ in range(3):  # that it is not ours must outlive the daemon that has found it
        box.start()
        warned_of(box, "vm 3", "disk 3")
        assert box.wait("old", "RUNNING")["pid"] == old["pid"]
        doctor = leftovers(box)
        assert f"vm 3 (process {newer['pid']}, {box.root}/run/vms/3" in doctor["message"]
        assert f"disk 3 ({disk.parent})" in doctor["message"]
        given.add(box.create("later")["id"])
        delete(box, "later")
        assert sorted(box.qemus()) == sorted([old["pid"], newer["pid"]])
        assert disk.exists()
        box.end()
        box.rows("DELETE FROM event")
    assert given == {3, 4, 5, 6}

    put_back(box, "newer.db")
    box.start()
    assert box.wait("newer", "RUNNING")["pid"] == newer["pid"]
    assert leftovers(box)["verdict"] == "ok"


def test_a_new_vm_gets_nothing_that_one_without_a_row_has(box: Box) -> None:
    box.end()
    save(box, "older.db")
    box.start()
    newer = box.create("newer")
    box.end()
    save(box, "newer.db")
    put_back(box, "older.db")
    box.start()
    later = box.create("later")
    assert later["id"] > newer["id"]
    assert later["ip"] != newer["ip"]
    assert sorted(box.qemus()) == sorted([later["pid"], newer["pid"]])
    delete(box, "later")
    box.end()
    put_back(box, "newer.db")
    box.start()
    assert box.wait("newer", "RUNNING")["pid"] == newer["pid"]


def test_a_vm_that_ends_with_its_directory_gone_is_still_found(box: Box, stray: Stray) -> None:
    box.create("web")
    delete(box, "web")
    box.end()
    process = stray(box.root / "run" / "vms" / "1")
    os.rmdir(box.root / "run" / "vms" / "1")
    box.start()
    assert process.wait(20) == -signal.SIGKILL
    warned_of(box, "vm 1")


def test_what_the_database_knows_is_no_leftover(box: Box) -> None:
    running = box.create("web")
    box.create("shop")
    box.call("vm_stop", vm="shop", force=True)
    kinds = ("processes", "taps", "addresses", "run directories", "disks", "logs")
    before = [box.traces()[kind] for kind in kinds]
    box.end()
    make_files(box, "state/disks/99/disk.qcow2")
    box.start()
    warned_of(box, "disk 99")  # so a sweep has been made
    shutil.rmtree(box.root / "state" / "disks" / "99")
    assert box.qemus() == [running["pid"]]
    assert [box.traces()[kind] for kind in kinds] == before
    assert {name for name, _ in warnings(box)} == {"disk 99"}


def test_the_firewall_forgets_networks_that_are_gone(box: Box) -> None:
    box.create("web")
    delete(box, "web")

    def ruleset() -> str:
        command = ["ip", "netns", "exec", box.namespace, "nft", "list", "table", "inet", "oscloud"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    rules = ruleset()
    box.end()
    addition = 'add rule inet oscloud forward iifname "oscbr7" accept\n'
    subprocess.run(
        ["ip", "netns", "exec", box.namespace, "nft", "-f", "-"],
        input=addition, check=True, text=True,
    )  # fmt: skip
    assert "oscbr7" in ruleset()
    box.start()
    warned_of(box, "firewall")
    assert ruleset() == rules
