"""The daemon killed at every renaming and write to disk of what is done to a vm whose
firmware remembers something.

That goes with the disk: it is as at the snapshot, or as it was, and never as at another moment.
"""

from typing import Any

import pytest
from cloud_accounts import needed_layers, settle
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import armed, ask_to_die, count_deaths, is_dead, wait_for_death
from test_rpc_exports import ask
from test_rpc_templates import answer_on, send_all, wait_for
from test_rpc_variables import kept_in_layers, make_archive, remember, remembered, variables_of
from test_rpc_vm_copies import take

from oscloudd.host.firmware import UEFI_VARIABLES

POINTS = [(at, when) for at in ("renaming", "durable") for when in ("before", "after")]
matrix = pytest.mark.parametrize(("at", "when"), POINTS)


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    return zygote_box


@pytest.fixture(scope="module")
def archive(box: ZygoteBox) -> bytes:
    return make_archive(box)


def make_web(box: ZygoteBox, archive: bytes, what: str) -> dict[str, Any]:
    """Have a fresh `web` and nothing else; its firmware remembers `what`."""
    for vm in box.call("vm_list"):
        box.call("vm_delete", vm=vm["id"], force=True)
    web = take(box, archive)
    remember(box, web, what)
    return web


def die(box: ZygoteBox, death: Death, method: str, **params: Any) -> bool:
    """Have the daemon die at this call; False when it had come to rest before."""
    _question, died = ask_to_die(box, death, method, **params)
    if died:
        wait_for_death(box)
        box.start()
    settle(box)
    return died


def check_nothing_is_half_done(box: ZygoteBox) -> None:
    found = [path.name for path in box.root.glob("state/*/*/*")]
    assert not [name for name in found if name.startswith("next") or name.endswith(".part")], found
    layers = sorted(int(path.name) for path in box.root.glob("state/layers/*"))
    assert layers == needed_layers(box)


def is_switched(box: ZygoteBox, web: dict[str, Any]) -> bool:
    """Tell whether the disk of a vm is another file than the layer that it was to become."""
    disk = variables_of(box, web).with_name("disk.qcow2")
    return any(not disk.samefile(layer) for layer in box.root.glob("state/layers/*/disk.qcow2"))


@matrix
@pytest.mark.parametrize("runs", [False, True])
def test_killed_while_freezing(
    box: ZygoteBox, archive: bytes, at: Any, when: Any, *, runs: bool
) -> None:
    def kill_at(number: int) -> bool:
        web = make_web(box, archive, "first")
        if runs:
            box.call("vm_start", vm="web")
        death = Death(at, number, when)
        _question, died = ask_to_die(box, death, "snapshot_create", vm="web", name="a")
        was_switched = not died or is_switched(box, web)
        if died:
            wait_for_death(box)
            remember(box, web, "later")  # its guest goes on meanwhile
            box.start()
        settle(box)
        there = bool(box.call("snapshot_list", vm="web"))
        assert there or died
        kept = kept_in_layers(box)
        assert kept == (["first"] if there else []) or (kept == ["later"] and not was_switched)
        assert remembered(box, web) == ("later" if died else "first")
        check_nothing_is_half_done(box)
        return died

    assert count_deaths(kill_at) > 0


# The only one in which two files of a vm are renamed between two transactions.
@pytest.mark.parametrize(("at", "when"), [*POINTS, ("transaction", "after")])
def test_killed_while_restoring(box: ZygoteBox, archive: bytes, at: Any, when: Any) -> None:
    def kill_at(number: int) -> bool:
        web = make_web(box, archive, "first")
        box.call("snapshot_create", vm="web", name="a")
        remember(box, web, "second")
        died = die(box, Death(at, number, when), "snapshot_restore", vm="web", snapshot="a")
        is_restored = "restored" in box.call("vm_info", vm="web")["reason"]
        assert is_restored or died
        assert remembered(box, web) == ("first" if is_restored else "second")
        check_nothing_is_half_done(box)
        return died

    assert count_deaths(kill_at) > 0 or at == "durable"


@matrix
def test_killed_while_cloning(box: ZygoteBox, archive: bytes, at: Any, when: Any) -> None:
    def kill_at(number: int) -> bool:
        web = make_web(box, archive, "first")
        death = Death(at, number, when)
        _question, died = ask_to_die(box, death, "vm_clone", vm="web", name="copy", wait="started")
        if died:
            wait_for_death(box)
            box.start()
        box.until(lambda: not unsettled(box), "the end of what was under way")
        copies = [vm for vm in box.call("vm_list") if vm["name"] == "copy"]
        assert copies or died
        assert [remembered(box, copy) for copy in copies] == ["first"] * len(copies)
        assert remembered(box, web) == "first"
        check_nothing_is_half_done(box)
        return died

    assert count_deaths(kill_at) > 0


def unsettled(box: ZygoteBox) -> list[Any]:
    """Give the jobs that do anything but wait for a clone: its fake has no sshd."""
    return box.rows("SELECT kind, stage FROM job WHERE state = 'RUNNING' AND stage <> 'booting'")


@matrix
def test_killed_while_importing(box: ZygoteBox, archive: bytes, at: Any, when: Any) -> None:
    def kill_at(number: int) -> bool:
        make_web(box, archive, "first")
        box.call("vm_delete", vm="web")
        line = armed(box, Death(at, number, when), box.connect)
        try:
            ask(line, "vm_import", size=len(archive), file_name="web.oscloud")
            wait_for(line, "send")
            send_all(line, archive)
            answer_on(line)
        except (AssertionError, ConnectionError):
            assert is_dead(box)
        died = is_dead(box)
        line.__exit__()
        if died:
            wait_for_death(box)
            box.start()
        settle(box)
        check_nothing_is_half_done(box)
        for vm in box.call("vm_list"):
            assert (vm["state"], len(variables_of(box, vm).read_bytes())) == (
                "STOPPED",
                UEFI_VARIABLES.stat().st_size,
            )
        return died

    # What it boots with is there since the first time.
    assert count_deaths(kill_at) > 0 or at == "renaming"
