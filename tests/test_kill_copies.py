"""The daemon killed at every transaction, process start, renaming and write to disk of exports and
imports.

An export changes nothing. A vm is imported whole or not at all, and nothing else is left.
"""

import json
from typing import Any

import pytest
from cloud_accounts import settle
from daemon_process import IMAGE, Line
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import armed, count_deaths, is_dead, wait_for_death
from test_rpc_exports import ask, export, left, read_pieces, stopped, write
from test_rpc_templates import answer_on, send_all, wait_for
from test_rpc_vm_copies import build, take, without_kernel

DATA = b"written by the guest".ljust(1 << 16, b".")
matrix = pytest.mark.parametrize(
    ("at", "when"),
    [
        (at, when)
        for at in ("transaction", "process", "renaming", "durable")
        for when in ("before", "after")
    ],
)


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    return zygote_box


@pytest.fixture(scope="module")
def archive(box: ZygoteBox) -> bytes:
    """An exported vm, with a kernel, that is not there any more."""
    vm = stopped(box)
    write(box, vm, 5 << 20, DATA)
    give_data_disk(box)
    content, _answer = export(box, "vm_export", vm="web")
    delete(box)
    manifest, *others = without_kernel(content)
    return build([manifest, ("kernel", b"kernel" * 99), *others])


def give_data_disk(box: ZygoteBox) -> None:
    box.call("disk_create", name="data", size="8M")
    write(box, {"disk": box.call("disk_info", disk="data")["id"]}, 1 << 20, DATA)
    box.call("disk_attach", vm="web", disk="data")


def delete(box: ZygoteBox) -> None:
    box.call("vm_delete", vm="web")
    box.call("disk_delete", disk="data")


def templates(box: ZygoteBox) -> set[str]:
    found = (box.root / "state/templates").iterdir()
    return {path.name for path in found if path.name != IMAGE}


def come_back(box: ZygoteBox, line: Line) -> bool:
    """Have the next daemon where this one has died; False when it had come to rest before."""
    died = is_dead(box)
    line.__exit__()
    if died:
        wait_for_death(box)
        box.start()
    settle(box)
    return died


@matrix
def test_killed_while_importing(box: ZygoteBox, archive: bytes, at: str, when: str) -> None:
    def kill_at(number: int) -> bool:
        line = armed(box, Death(at, number, when), box.connect)  # type: ignore[arg-type]
        given = {"size": len(archive), "file_name": "web.oscloud"}
        try:
            ask(line, "vm_import", **given)
            wait_for(line, "send")
            send_all(line, archive)
            answer_on(line)
        except (AssertionError, ConnectionError):
            assert is_dead(box)
        died = come_back(box, line)
        vms = box.call("vm_list")
        if vms:
            check_whole(box, vms)
            delete(box)
        # Its template goes with the housekeeping that every daemon begins with.
        box.until(lambda: len(templates(box)) <= bool(vms), "housekeeping")
        assert box.traces() == {}
        take(box, archive)
        check_whole(box, box.call("vm_list"))
        delete(box)
        return died

    assert count_deaths(kill_at) > 0 or at == "renaming"


def check_whole(box: ZygoteBox, vms: list[dict[str, Any]]) -> None:
    (vm,) = vms
    assert (vm["name"], vm["state"]) == ("web", "STOPPED")
    assert {vm["os"]} == templates(box)
    assert (box.root / "state/templates" / vm["os"] / "digest").exists()
    data = box.call("disk_info", disk="data")
    assert (data["vm"], data["slot"], data["kept"]) == ("web", 1, True)
    for disk, offset in ((vm["disk"], 5 << 20), (data["id"], 1 << 20)):
        path = box.root / "state/disks" / str(disk) / "disk.qcow2"
        assert path.stat().st_mode & 0o777 == 0o600
        content, _answer = export(box, "disk_export", disk=disk, format="raw")
        assert content[offset : offset + len(DATA)] == DATA


@matrix
def test_killed_while_exporting(box: ZygoteBox, at: str, when: str) -> None:
    vm = stopped(box)
    give_data_disk(box)
    settle(box)
    before = json.dumps([box.traces(), box.call("vm_info", vm="web")], default=str)

    def kill_at(number: int) -> bool:
        line = armed(box, Death(at, number, when), box.connect)  # type: ignore[arg-type]
        try:
            ask(line, "vm_export", vm=vm["id"])
            read_pieces(line)
        except (AssertionError, ConnectionError):
            assert is_dead(box)
        died = come_back(box, line)
        assert left(box) == []
        assert json.dumps([box.traces(), box.call("vm_info", vm="web")], default=str) == before
        return died

    assert count_deaths(kill_at) > 0 or at in ("renaming", "durable")
    delete(box)
