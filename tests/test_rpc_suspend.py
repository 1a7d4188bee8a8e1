"""Vms suspended to disk over the socket, with a qemu that runs no machine: states and refusals."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Box, RpcError
from fake_qemu import VERSION
from test_rpc_policies import reboot


@pytest.fixture
def own_qemu(box: Box) -> Iterator[Path]:
    """A copy of the fake qemu for this box alone, so that a test can change it."""
    config = box.root / "oscloud.toml"
    [line] = [line for line in config.read_text().splitlines() if line.startswith("binary")]
    copy = box.root / "qemu-system-x86_64"
    shutil.copy(line.split('"')[1], copy)
    box.end()
    config.write_text(config.read_text().replace(line, f'binary = "{copy}"'))
    box.start()
    return copy


def create(box: Box, name: str, **params: Any) -> dict[str, Any]:
    """Make a vm whose guest knows who it is."""
    vm = box.create(name, **params)
    identified = "SELECT identified FROM vm WHERE id = ?"
    box.until(lambda: box.rows(identified, vm["id"]) == [(1,)], "the guest's identity")
    return vm


def remembered(box: Box, vm: str) -> Any:
    return box.call("vm_qemu_command", vm=vm, command="x-memory")


def saved(box: Box) -> list[str]:
    return sorted(path.name for path in box.root.glob("state/disks/*/suspended*"))


def refused(box: Box, method: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as error:
        box.call(method, **params)
    return error.value


def test_a_suspended_vm_goes_on_where_it_stood(box: Box) -> None:
    vm = create(box, "web")
    memory = remembered(box, "web")
    seen = box.call("vm_suspend", vm="web")
    assert (seen["state"], seen["wanted_state"]) == ("SUSPENDED", "STOPPED")
    assert (seen["pid"], seen["reason"]) == (None, "suspended by the user")
    assert (box.qemus(), saved(box)) == ([], ["suspended"])
    assert box.call("vm_suspend", vm="web")["state"] == "SUSPENDED"
    assert box.wait("web", "SUSPENDED")["id"] == vm["id"]
    assert box.call("vm_rename", vm="web", name="shop")["state"] == "SUSPENDED"
    seen = box.call("vm_resume", vm="shop")
    assert (seen["state"], seen["wanted_state"], seen["reason"]) == ("RUNNING", "RUNNING", "")
    assert (remembered(box, "shop"), saved(box)) == (memory, [])
    job = box.call("vm_suspend", vm="shop", wait=False)
    assert job["kind"] == "vm_suspend"
    box.wait("shop", "SUSPENDED")
    assert box.call("vm_start", vm="shop")["state"] == "RUNNING"
    assert (remembered(box, "shop"), saved(box)) == (memory, [])
    # What it boots with from then on is new.
    box.call("vm_restart", vm="shop", force=True)
    assert remembered(box, "shop") != memory


def test_a_paused_vm_can_be_suspended_and_runs_when_it_is_resumed(box: Box) -> None:
    create(box, "web")
    memory = remembered(box, "web")
    box.call("vm_pause", vm="web")
    assert box.call("vm_suspend", vm="web")["state"] == "SUSPENDED"
    assert box.call("vm_resume", vm="web")["state"] == "RUNNING"
    assert remembered(box, "web") == memory


def test_what_can_not_be_suspended(box: Box) -> None:
    box.create("web-identity_silent")
    error = refused(box, "vm_suspend", vm="web-identity_silent")
    assert error.kind == "invalid_state"
    assert "vm-wait web-identity_silent" in error.data["hint"]
    assert box.call("vm_info", vm="web-identity_silent")["state"] == "RUNNING"
    create(box, "full")
    box.call("vm_qemu_command", vm="full", command="x-disk-full")
    box.wait("full", "PAUSED")
    error = refused(box, "vm_suspend", vm="full")
    assert (error.kind, "disk is full" in error.data["hint"]) == ("invalid_state", True)
    box.call("vm_stop", vm="full", force=True)
    error = refused(box, "vm_suspend", vm="full")
    assert (error.kind, error.data["state"]) == ("invalid_state", "STOPPED")
    assert saved(box) == []


def test_what_is_refused_to_a_suspended_vm(box: Box) -> None:
    create(box, "web")
    memory = remembered(box, "web")
    box.call("vm_suspend", vm="web")
    for method, hint in (
        ("vm_stop", "vm-stop --force web"),
        ("vm_restart", "vm-resume web"),
        ("vm_pause", "vm-info web"),
    ):
        error = refused(box, method, vm="web")
        assert (error.kind, error.data["state"]) == ("invalid_state", "SUSPENDED"), method
        assert hint in error.data["hint"]
    assert refused(box, "vm_wait", vm="web", state="ready").kind == "invalid_state"
    box.call("vm_resume", vm="web")
    assert remembered(box, "web") == memory


def test_a_forced_stop_drops_its_memory(box: Box) -> None:
    create(box, "web")
    memory = remembered(box, "web")
    box.call("vm_suspend", vm="web")
    seen = box.call("vm_stop", vm="web", force=True)
    assert (seen["state"], seen["reason"]) == ("STOPPED", "stopped by the user")
    assert saved(box) == []
    box.call("vm_start", vm="web")
    assert remembered(box, "web") != memory


def test_a_suspended_vm_is_deleted_with_all_it_has(box: Box) -> None:
    create(box, "web")
    box.call("vm_suspend", vm="web")
    box.call("vm_delete", vm="web")
    assert box.traces() == {}


@pytest.mark.parametrize("state", ["RUNNING", "PAUSED"])
def test_a_save_that_fails_leaves_the_vm_as_it_was(box: Box, state: str) -> None:
    before = create(box, "web-save_fails")
    if state == "PAUSED":
        box.call("vm_pause", vm="web-save_fails")
    memory = remembered(box, "web-save_fails")
    error = refused(box, "vm_suspend", vm="web-save_fails")
    assert (error.kind, "No space left on device" in error.message) == ("host_failure", True)
    seen = box.call("vm_info", vm="web-save_fails")
    assert (seen["state"], seen["wanted_state"], seen["pid"]) == (state, "RUNNING", before["pid"])
    assert (remembered(box, "web-save_fails"), saved(box)) == (memory, [])


@pytest.mark.parametrize("state", ["RUNNING", "PAUSED"])
def test_a_cancelled_save_leaves_the_vm_as_it_was(box: Box, state: str) -> None:
    before = create(box, "web-save_hangs")
    if state == "PAUSED":
        box.call("vm_pause", vm="web-save_hangs")
    job = box.call("vm_suspend", vm="web-save_hangs", wait=False)
    box.until(lambda: saved(box) == ["suspended.part"], "the save's begin")
    assert box.call("vm_info", vm="web-save_hangs")["reason"] == "being suspended"
    assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
    seen = box.call("vm_info", vm="web-save_hangs")
    assert (seen["state"], seen["wanted_state"], seen["pid"]) == (state, "RUNNING", before["pid"])
    status = box.call("vm_qemu_command", vm="web-save_hangs", command="query-status")
    assert (status["status"].upper(), saved(box)) == (state, [])


def test_the_next_daemon_waits_for_a_save_that_is_under_way(box: Box) -> None:
    create(box, "web-save_hangs")
    job = box.call("vm_suspend", vm="web-save_hangs", wait=False)

    def is_active() -> bool:
        command = "query-migrate"
        seen = box.call("vm_qemu_command", vm="web-save_hangs", command=command)
        return bool(seen["status"] == "active")

    box.until(is_active, "the save's begin")
    box.end(signal.SIGKILL)
    box.start()
    box.until(lambda: box.call("job_info", job=job["id"])["cancellable"], "the job going on")
    assert box.call("job_info", job=job["id"])["stage"] == "saving"
    assert is_active()
    assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
    assert box.call("vm_info", vm="web-save_hangs")["state"] == "RUNNING"
    assert saved(box) == []


def test_a_qemu_that_dies_while_it_is_saved_has_crashed(box: Box) -> None:
    vm = create(box, "web-save_hangs")
    job = box.call("vm_suspend", vm="web-save_hangs", wait=False)
    box.until(lambda: saved(box) == ["suspended.part"], "the save's begin")
    box.call("vm_stop", vm="web-save_hangs", force=True)
    assert box.call("job_wait", job=job["id"])["state"] == "FAILED"
    seen = box.call("vm_info", vm="web-save_hangs")
    assert (seen["state"], seen["wanted_state"]) == ("CRASHED", "STOPPED")
    assert (vm["pid"] in box.qemus(), saved(box)) == (False, [])


def test_it_is_refused_where_the_disk_has_no_room(box: Box) -> None:
    create(box, "web")
    box.end()
    with (box.root / "oscloud.toml").open("a") as config:
        config.write('[limits]\nmin_free_disk = "1000T"\n')
    box.start()
    error = refused(box, "vm_suspend", vm="web")
    assert (error.kind, error.data["resource"]) == ("exhausted", "disk")
    assert (box.call("vm_info", vm="web")["state"], saved(box)) == ("RUNNING", [])


def test_another_qemu_is_refused_and_the_first_one_is_not(box: Box, own_qemu: Path) -> None:
    create(box, "web")
    memory = remembered(box, "web")
    text = own_qemu.read_text()
    # Installed while the vm runs: what counts is the one that saves it.
    replace_program(own_qemu, text.replace(VERSION, "QEMU emulator version 9.9.9 (other)"))
    box.call("vm_suspend", vm="web")
    for method in ("vm_resume", "vm_start"):
        error = refused(box, method, vm="web")
        assert error.kind == "invalid_state"
        assert "qemu 7.2.22 (fake)" in error.message
        assert "qemu 9.9.9 (other)" in error.message
        assert "vm-stop --force web" in error.data["hint"]
    assert (box.call("vm_info", vm="web")["state"], saved(box)) == ("SUSPENDED", ["suspended"])
    replace_program(own_qemu, text)
    box.call("vm_resume", vm="web")
    assert remembered(box, "web") == memory


def replace_program(path: Path, text: str) -> None:
    """Install another program under this name, as a package does: one that runs keeps its own."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o755)
    new.rename(path)


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("state", "missing"),
        ("state", "damaged"),
        ("suspended.json", "missing"),
        ("suspended.json", "damaged"),
        ("directory", "missing"),
    ],
)
def test_what_is_damaged_or_missing_is_never_booted_past(box: Box, what: str, how: str) -> None:
    vm = create(box, "web")
    box.call("vm_suspend", vm="web")
    directory = box.root / f"state/disks/{vm['disk']}/suspended"
    away = directory.with_name("kept")
    if what == "directory":
        directory.rename(away)
    elif how == "missing":
        (directory / what).rename(away)
    else:
        whole = (directory / what).read_bytes()
        (directory / what).write_bytes(whole[:-1] + b"?")
    error = refused(box, "vm_start", vm="web")
    assert (error.kind, "vm-stop --force web" in error.data["hint"]) == ("host_failure", True)
    seen = box.call("vm_info", vm="web")
    assert (seen["state"], seen["wanted_state"], box.qemus()) == ("SUSPENDED", "STOPPED", [])
    assert box.call("vm_stop", vm="web", force=True)["state"] == "STOPPED"
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"
    assert saved(box) == []


def test_a_restore_that_fails_leaves_the_vm_suspended(box: Box) -> None:
    create(box, "web-restore_fails")
    box.call("vm_suspend", vm="web-restore_fails")
    error = refused(box, "vm_resume", vm="web-restore_fails")
    assert (error.kind, "Invalid argument" in error.data["output"]) == ("host_failure", True)
    seen = box.call("vm_info", vm="web-restore_fails")
    assert (seen["state"], seen["wanted_state"]) == ("SUSPENDED", "STOPPED")
    assert "can't be restored" in seen["reason"]
    left = box.traces()
    assert (left.get("run directories"), left.get("processes")) == (None, None)
    assert saved(box) == ["suspended"]


def test_a_boot_of_the_host_resumes_what_starts_with_it(box: Box) -> None:
    memory = {}
    for name, autostart in (("yes", "yes"), ("last", "last-state"), ("no", "no")):
        create(box, name, autostart=autostart)
        memory[name] = remembered(box, name)
        box.call("vm_suspend", vm=name)
    reboot(box)
    box.wait("yes", "RUNNING")
    assert remembered(box, "yes") == memory["yes"]
    for name in ("last", "no"):
        seen = box.call("vm_info", vm=name)
        assert (seen["state"], seen["wanted_state"]) == ("SUSPENDED", "STOPPED")
        box.call("vm_resume", vm=name)
        assert remembered(box, name) == memory[name]


def test_a_daemon_removes_what_no_job_goes_on_saving(box: Box) -> None:
    vm = create(box, "web")
    box.call("vm_suspend", vm="web")
    part = box.root / f"state/disks/{vm['disk']}/suspended.part"
    box.end()
    part.mkdir()
    (part / "state").write_text("cut off")
    box.start()
    box.until(lambda: saved(box) == ["suspended"], "the part's removal")
    assert box.call("vm_resume", vm="web")["state"] == "RUNNING"
