"""The daemon killed at every transaction, process start and renaming of a merging.

Whatever it was killed in: the deleted snapshot is gone or there, what is left holds what it did,
and the next daemon goes on until nothing is left to merge.
"""

import itertools
from typing import Any

import pytest
from cloud_accounts import check_accounted, settle, settle_or_die
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import (
    STRIDE,
    ask_to_die,
    count_deaths,
    is_dead,
    kill_qemus,
    wait_for_death,
)
from test_rpc_clones import layers_of
from test_rpc_layers import disk_of, snapshots_of, take
from test_rpc_snapshots import run_again, settled, tree, written

from oscloudd.cloud.operations import MAX_ATTEMPTS, OPERATIONS

numbers = itertools.count(1)
# As the last daemon in it is about to write down that a pair is merged: the file is there.
RENAMED = Death("renaming", 1, "after")


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    settled(zygote_box, "web")
    run_again(zygote_box)
    return zygote_box


def kill_at(box: ZygoteBox, death: Death, *again: Death) -> bool:
    """Have the daemon die while it deletes the older of two snapshots, and others after it.

    False if one had come to rest before it was to die.
    """
    vm = box.call("vm_info", vm="web")
    names = [f"s{number}" for number in itertools.islice(numbers, 2)]
    contents = {name: take(box, vm, int(name[1:])) for name in names}
    before = disk_of(box, vm), written(box)
    _question, died = ask_to_die(box, death, "snapshot_delete", vm="web", snapshot=names[0])
    for next_death in again:
        if died:
            wait_for_death(box)
            died = not (box.start_or_die(next_death) and settle_or_die(box)) or is_dead(box)
    if died:
        wait_for_death(box)
        box.start()
    settle(box)
    check_accounted(box)
    if names[0] in tree(box):
        box.call("snapshot_delete", vm="web", snapshot=names[0])
    # What was left of the last time, and what has lost its name now, are parts of the newer one's.
    assert layers_of(box, vm) == 1
    assert snapshots_of(box) == {names[1]: contents[names[1]]}
    assert (disk_of(box, vm), written(box)) == before
    box.call("snapshot_delete", vm="web", snapshot=names[1])
    assert (layers_of(box, vm), disk_of(box, vm)) == (1, before[0])
    check_accounted(box)
    return died


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "renaming"])
def test_killed_while_merging(box: ZygoteBox, at: Any, when: Any) -> None:
    deaths = count_deaths(lambda number: kill_at(box, Death(at, number, when)))
    print(f"killed {when} {deaths} {at}(s)")
    assert deaths > 0


def kill_in_three(box: ZygoteBox, death: Death) -> bool:
    """Have a daemon die there that is left two pairs, of which the upper one is half done.

    The snapshot below it was deleted while that pair was merged. False if that daemon came to rest.
    """
    vm = box.call("vm_info", vm="web")
    lowest, middle, top = (f"s{number}" for number in itertools.islice(numbers, 3))
    box.call("snapshot_create", vm="web", name="last")
    box.call("snapshot_delete", vm="web", snapshot="last")
    contents = {name: take(box, vm, int(name[1:])) for name in (lowest, middle, top)}
    before = disk_of(box, vm), written(box)
    # The first pair is the lowest layer and that of before.
    second = Death("renaming", 2, "after")
    _question, died = ask_to_die(box, second, "snapshot_delete", vm="web", snapshot=middle)
    assert died
    wait_for_death(box)
    assert len(box.rows("SELECT id FROM layer")) == 3
    box.rows("DELETE FROM snapshot WHERE name = ?", lowest)
    died = not (box.start_or_die(death) and settle_or_die(box)) or is_dead(box)
    if died:
        wait_for_death(box)
        box.start()
        settle(box)
    check_accounted(box)
    assert layers_of(box, vm) == 1
    assert snapshots_of(box) == {top: contents[top]}
    assert (disk_of(box, vm), written(box)) == before
    run_again(box)
    box.call("snapshot_delete", vm="web", snapshot=top)
    return died


@pytest.mark.parametrize(
    ("at", "when", "stride"),
    [("transaction", "after", STRIDE), ("renaming", "before", 1), ("renaming", "after", 1)],
)
def test_what_is_half_done_is_written_down_before_what_is_below_it_goes(
    box: ZygoteBox, at: Any, when: Any, stride: int
) -> None:
    deaths = count_deaths(lambda number: kill_in_three(box, Death(at, number, when)), stride)
    print(f"killed {when} {deaths} {at}(s)")
    assert deaths > 0


def test_killed_at_transactions_of_the_recovery(box: ZygoteBox) -> None:
    def kill(number: int) -> bool:
        return kill_at(box, RENAMED, Death("transaction", number, "after"))

    assert count_deaths(kill, STRIDE) > 0


def test_what_a_dead_daemon_has_renamed_is_durable_before_the_row_follows(box: ZygoteBox) -> None:
    vm = box.call("vm_info", vm="web")
    names = [f"s{number}" for number in itertools.islice(numbers, 2)]
    for name in names:
        take(box, vm, int(name[1:]))
    ask_to_die(box, RENAMED, "snapshot_delete", vm="web", snapshot=names[0])
    wait_for_death(box)
    before = box.rows("SELECT id, parent_id FROM layer ORDER BY id")
    box.start_or_die(Death("durable", 1, "before"))
    wait_for_death(box)
    assert box.rows("SELECT id, parent_id FROM layer ORDER BY id") == before
    box.start()
    settle(box)
    assert layers_of(box, vm) == 1
    check_accounted(box)
    box.call("snapshot_delete", vm="web", snapshot=names[1])


def test_a_merging_that_daemons_die_in_is_given_up(box: ZygoteBox) -> None:
    steps = OPERATIONS["snapshot_delete"].steps
    death = Death("step", len(steps), "before", "snapshot_delete")
    assert kill_at(box, death, *[death] * (MAX_ATTEMPTS - 1))
    said = "SELECT message FROM job WHERE kind = 'snapshot_delete' AND state = 'FAILED'"
    assert box.rows(said) == [(f"given up: {MAX_ATTEMPTS} daemons ended in step merging",)]


def test_a_vm_is_looked_after_while_a_merging_is_left(box: ZygoteBox) -> None:
    vm = box.call("vm_set", vm="web", restart="always")
    for number in itertools.islice(numbers, 2):
        take(box, vm, number)
    oldest = next(iter(tree(box)))
    death = Death("process", 2, "before")
    _question, died = ask_to_die(box, death, "snapshot_delete", vm="web", snapshot=oldest)
    assert died
    wait_for_death(box)
    kill_qemus(box, but=0)
    # The next one has enough to do with merging to see to the vm before.
    box.start()
    box.until(lambda: box.call("vm_info", vm="web")["state"] == "RUNNING", "the restart")
    assert box.call("vm_info", vm="web")["pid"] != vm["pid"]
    settle(box)
    assert layers_of(box, vm) == 1
    check_accounted(box)
