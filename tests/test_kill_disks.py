"""The daemon killed at every transaction, process start and write of making and deleting a disk.

There is never a row without its file, nor a file without its row, once the next daemon has swept.
"""

from pathlib import Path

import pytest
import test_kill_templates
from cloud_accounts import check_accounted, settle
from daemon_process import IMAGE
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import ask_to_die, count_deaths, wait_for_death

from oscloudd.cloud.operations import OPERATIONS
from oscloudd.host.images import virtual_size_bytes

NAME = "data"


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    return zygote_box


def die(box: ZygoteBox, death: Death, method: str, **params: str) -> bool:
    """Have the daemon die at this call; False when it had come to rest before."""
    died = test_kill_templates.die(box, death, method, **params)
    check_accounted(box)
    return died


def is_there(box: ZygoteBox) -> bool:
    """Tell whether there is the disk; where there is, its file is whole."""
    disks = box.call("disk_list")
    assert all(virtual_size_bytes(Path(disk["path"]), "qcow2") == 1 << 20 for disk in disks)
    return [disk["name"] for disk in disks] == [NAME]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "durable"])
@pytest.mark.parametrize("template", [None, IMAGE])
def test_killed_while_making(box: ZygoteBox, at: str, when: str, template: str | None) -> None:
    shape = {"size": "1M"} if template is None else {"template": template}

    def kill_at(number: int) -> bool:
        died = die(box, Death(at, number, when), "disk_create", name=NAME, **shape)
        if not is_there(box):
            assert died
            box.call("disk_create", name=NAME, **shape)
        box.call("disk_delete", disk=NAME)
        check_accounted(box)
        return died

    assert count_deaths(kill_at) > 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_deleting(box: ZygoteBox, when: str) -> None:
    def kill_at(number: int) -> bool:
        box.call("disk_create", name=NAME, size="1M")
        died = die(box, Death("transaction", number, when), "disk_delete", disk=NAME)
        if is_there(box):
            assert died
            box.call("disk_delete", disk=NAME)
        check_accounted(box)
        return died

    assert count_deaths(kill_at) > 0


def test_no_layer_has_a_row_and_no_file(box: ZygoteBox) -> None:
    vm = box.create("web")
    told = "SELECT 1 FROM vm WHERE identified AND seed_document = ''"
    box.until(lambda: bool(box.rows(told)), "the guest's disk to know who it is")
    box.call("snapshot_create", vm="web", name="a")
    files = [step.name for step in OPERATIONS["vm_delete"].steps].index("files") + 1
    death = Death("step", files, "before", "vm_delete")
    _question, died = ask_to_die(box, death, "vm_delete", vm=vm["id"], force=True)
    assert died
    wait_for_death(box)
    # A clone may be made of what has a row.
    assert not list(box.root.glob("state/layers/*"))
    assert box.rows("SELECT id FROM layer") == []
    box.start()
    settle(box)
    check_accounted(box)
