"""The daemon killed at every step, transaction, process start and renaming of a vm taking a spare.

Whatever it was killed in, the next daemon finishes the vm or undoes it, and of spares nothing is
left: it has none itself, so that everything there is must be a vm's.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_accounts import check_accounted, settle
from daemon_process import IMAGE
from dying_daemon import Death
from spare_box import SpareBox
from test_kill_matrix import (
    ADDRESS,
    CASES,
    CREATION,
    ask_to_die,
    count_deaths,
    judge,
    others,
    wait_for_death,
)

from oscloudd.cloud.operations import OPERATIONS

STEPS = [
    Death("step", number, when, "vm_create")
    for number in range(1, len(OPERATIONS["vm_create"].steps) + 1)
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def box(fake_qemu_binary: Path) -> Iterator[SpareBox]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    box = SpareBox(fake_qemu_binary)
    try:
        box.restart(pool=0)
        box.warm()
        with box.sshd_at(ADDRESS):
            yield box
            box.restart(pool=0)
    except BaseException:
        box.discard()
        raise
    box.close()


def kill_at(box: SpareBox, death: Death) -> bool:
    """Have a daemon with a spare die in a vm_create; False when it came to rest before."""
    for vm in others(box).values():
        box.call("vm_delete", vm=vm["id"], force=True)
    box.restart(pool=1)
    last_job = box.rows("SELECT COALESCE(MAX(id), 0) FROM job")[0][0]
    question, died = ask_to_die(box, death, "vm_create", image=IMAGE, **CREATION)
    if died:
        wait_for_death(box)
        box.daemon = None
    elif not question.is_answered or "take" not in question.result["timings"]:
        raise AssertionError(f"no spare was taken: {question.result}")
    box.restart(pool=0)
    settle(box)
    check_accounted(box)
    judge(box, CASES["vm_create"], {}, last_job, must_be_finished=question.is_answered)
    return died


@pytest.mark.parametrize("death", STEPS, ids=lambda death: f"{death.when}-{death.number}")
def test_killed_at_a_step(box: SpareBox, death: Death) -> None:
    assert kill_at(box, death), "the step was not reached"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "renaming"])
def test_killed_at_every(box: SpareBox, at: str, when: str) -> None:
    deaths = count_deaths(lambda number: kill_at(box, Death(at, number, when)))
    print(f"killed {when} {deaths} {at}(s)")
    assert deaths > 0
