"""The daemon killed at every transaction, process start and renaming of making a warm image.

The image is there whole or not at all, nothing is left of the machine it was saved from, and a new
vm can begin with it or with the next one.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import check_accounted, settle, tail
from daemon_process import IMAGE
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import ADDRESS, ask_to_die, count_deaths, wait_for_death

# Each image is of a shape of its own: there was none before.
SIZES = iter(range(65, 1000))


@pytest.fixture(scope="module")
def box(fake_qemu_binary: Path) -> Iterator[ZygoteBox]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    box = ZygoteBox(fake_qemu_binary)
    try:
        box.start()
        with box.sshd_at(ADDRESS):
            yield box
    except BaseException:
        box.discard()
        raise
    box.close()


def kill_at(box: ZygoteBox, death: Death) -> bool:
    """Have the daemon die making an image; False when it had come to rest before."""
    shape = {"mem_size": f"{next(SIZES)}M", "disk_size": "16M"}
    last_job = box.rows("SELECT COALESCE(MAX(id), 0) FROM job")[0][0]
    question, died = ask_to_die(box, death, "template_warm", template=IMAGE, **shape)
    if died:
        wait_for_death(box)
        box.start()
    settle(box)
    check_accounted(box)
    [job] = box.rows("SELECT state, message FROM job WHERE id > ?", last_job) or [None]
    made = images(box, shape)
    assert len(made) <= 1, made
    # One that was killed between the last renaming and the end of its job has made it all the same.
    assert job in (None, ("DONE", ""), ("FAILED", "the daemon ended before it")), job
    assert made or not (question.is_answered or (job and job[0] == "DONE")), (job, tail(box))
    begin_with(box, shape, made)
    return died


def images(box: ZygoteBox, shape: dict[str, Any]) -> list[str]:
    size = int(shape["mem_size"][:-1]) << 20
    every = box.call("template_info", template=IMAGE)["warm"]
    return [image["name"] for image in every if image["mem_size"] == size]


def begin_with(box: ZygoteBox, shape: dict[str, Any], made: list[str]) -> None:
    """Make a vm that begins with the image there is, or else with a new one."""
    box.call("template_warm", template=IMAGE, **shape)
    assert images(box, shape) == made or not made
    vm = box.create("web", ip=ADDRESS, wait="ready", warm="only", **shape)
    assert vm["started"] == "warm", vm
    check_accounted(box)
    box.call("vm_delete", vm="web", force=True)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "renaming"])
def test_killed_at_every(box: ZygoteBox, at: str, when: str) -> None:
    deaths = count_deaths(lambda number: kill_at(box, Death(at, number, when)))
    print(f"killed {when} {deaths} {at}(s)")
    assert deaths > 0
