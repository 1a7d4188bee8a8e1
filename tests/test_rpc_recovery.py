"""Daemons that die, vms that die meanwhile, and what the next daemon makes of it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from daemon_process import LIMIT_SECONDS, Box, RpcError


@pytest.fixture
def decoy() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is none of ours and must never be signalled."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
        assert process.poll() is None, "the decoy was signalled"
    finally:
        process.kill()
        process.wait()


def test_a_daemon_that_is_killed_leaves_its_vms_and_the_next_adopts_them(box: Box) -> None:
    vm = box.create("web")
    paused = box.create("shop")
    box.call("vm_pause", vm="shop")
    box.until(lambda: "login:" in box.call("vm_log", vm="web")["text"], "a login prompt")
    box.end(signal.SIGKILL)
    assert sorted(box.qemus()) == sorted([vm["pid"], paused["pid"]])

    box.start()
    adopted = box.call("vm_info", vm="web")
    assert (adopted["state"], adopted["pid"], adopted["uuid"]) == ("RUNNING", vm["pid"], vm["uuid"])
    assert (box.call("vm_info", vm="shop")["state"]) == "PAUSED"
    assert box.call("vm_qemu_command", vm="web", command="query-name") == {"name": "web"}
    with box.connect() as line:
        line.call("vm_console", vm="web")
        line.read_until(b"web login: ")
    assert box.call("vm_resume", vm="shop")["state"] == "RUNNING"
    assert box.call("vm_stop", vm="web")["reason"] == "stopped by the user"
    os.kill(paused["pid"], signal.SIGKILL)
    assert box.wait("shop", "CRASHED")


def test_a_daemon_that_is_told_to_stop_leaves_its_vms_running(box: Box) -> None:
    vm = box.create("web")
    with box.connect():  # an idle client holds it up no longer than it must
        assert box.end(signal.SIGTERM) == 0
    assert not box.socket_path.exists()
    assert box.qemus() == [vm["pid"]]
    box.start()
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]


def test_a_qemu_that_dies_while_the_daemon_is_away_is_crashed(box: Box) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    os.kill(vm["pid"], signal.SIGKILL)
    box.until(lambda: not box.qemus(), "the end of qemu")
    box.start()
    seen = box.call("vm_info", vm="web")
    assert (seen["state"], seen["pid"]) == ("CRASHED", None)
    assert seen["reason"] == "qemu ended while the daemon was away"
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


def test_a_qemu_that_dies_while_it_is_taken_over_is_crashed(box: Box) -> None:
    vm = box.create("web")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.end(signal.SIGKILL)
    box.start()
    # Nothing tells that the daemon waits for its answer by now; earlier is as good.
    time.sleep(0.2)
    os.kill(vm["pid"], signal.SIGKILL)
    assert box.wait("web", "CRASHED")["pid"] is None
    box.until(lambda: "(web) adopted" in box.log(), "the end of its judging")
    assert box.call("vm_info", vm="web")["state"] == "CRASHED"
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


@pytest.mark.parametrize("same", ["pid", "pid and start, in another boot"])
def test_a_process_that_has_the_pid_of_a_dead_qemu_is_left_alone(
    box: Box, decoy: "subprocess.Popen[bytes]", same: str
) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    os.kill(vm["pid"], signal.SIGKILL)
    box.until(lambda: not box.qemus(), "the end of qemu")
    box.rows("UPDATE vm SET qemu_pid = ?", decoy.pid)
    if same != "pid":
        with open(f"/proc/{decoy.pid}/stat", encoding="ascii") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
        box.rows("UPDATE vm SET qemu_start_ticks = ?", ticks)
        box.rows("UPDATE vm SET qemu_boot_id = ?", "00000000-0000-0000-0000-000000000000")
    box.start()
    assert box.call("vm_info", vm="web")["state"] in ("CRASHED", "STOPPED")
    box.call("vm_stop", vm="web", force=True)
    box.call("vm_delete", vm="web", force=True)
    assert decoy.poll() is None


def test_a_vm_half_made_by_a_daemon_that_died_is_undone(box: Box) -> None:
    box.create("web")
    box.end(signal.SIGKILL)
    # As if it had died after the start and before writing down which process it was.
    box.rows("UPDATE vm SET state = 'CREATING', qemu_pid = NULL, qemu_start_ticks = NULL")
    box.rows("DELETE FROM job")
    box.start()
    box.until(lambda: box.call("vm_list") == [], "the vm undone")
    assert box.traces() == {}
    assert box.create("web")["state"] == "RUNNING"


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("disk", signal.SIGKILL),
        ("disk", signal.SIGTERM),
        ("starting", signal.SIGKILL),
        ("starting", signal.SIGTERM),
        ("booting", signal.SIGKILL),
        ("ready", signal.SIGKILL),
    ],
)
def test_a_daemon_that_ends_at_any_stage_of_a_creation_leaves_it_to_the_next(
    box: Box, stage: str, number: int
) -> None:
    def end_there(step: dict[str, Any]) -> None:
        if step["stage"] == stage:
            box.end(number)

    params = {"mem_size": "64M", "disk_size": "16M", "wait": "ready"}
    with pytest.raises((AssertionError, ConnectionError)):
        box.call("vm_create", end_there, name="web", **params)
    box.start()
    # Its row was there before anything else happened, so the next daemon goes on with it.
    vm = box.wait("web", "RUNNING")
    assert box.qemus() == [vm["pid"]]
    with box.sshd_at(vm["ip"]):
        assert box.call("vm_wait", vm="web", state="ready", timeout=LIMIT_SECONDS)["ready"]
        (job,) = box.call("job_list")
        assert box.call("job_wait", job=job["id"], timeout=LIMIT_SECONDS)["state"] == "DONE"


def test_a_deletion_cut_short_is_finished(box: Box) -> None:
    box.create("web")
    box.end(signal.SIGKILL)
    box.rows("UPDATE vm SET state = 'DELETING'")
    box.start()
    box.until(lambda: box.call("vm_list") == [], "the vm removed")
    assert box.traces() == {}


def test_a_job_that_kills_every_daemon_is_given_up(box: Box) -> None:
    box.create("web")  # its guest has no sshd, so its job goes on
    box.end(signal.SIGKILL)
    box.rows("UPDATE job SET attempts = 3, step = 2")
    box.start()
    box.until(lambda: box.rows("SELECT state FROM job") == [("FAILED",)], "the job's end")
    ((message,),) = box.rows("SELECT message FROM job")
    assert message == "given up: 3 daemons ended in step network"
    assert box.call("vm_info", vm="web")["state"] == "RUNNING"  # its creator was told that it runs


def test_a_template_that_was_being_made_is_said_to_have_failed(box: Box) -> None:
    box.end(signal.SIGKILL)
    box.rows(
        "INSERT INTO job (kind, target, state, step, stage, params, attempts, message, error_kind,"
        " owner_uid, created_at) VALUES ('template_build', 'x', 'RUNNING', 0, '', '{}', 1, '', '',"
        " 0, 0)"
    )
    box.start()
    (job,) = box.call("job_list")
    assert (job["state"], job["message"]) == ("FAILED", "the daemon ended before it")


def test_a_second_daemon_refuses_and_leaves_the_first_alone(box: Box) -> None:
    vm = box.create("web")
    inode = box.socket_path.stat().st_ino
    second = box.spawn()
    assert second.wait(LIMIT_SECONDS) == 11
    assert "another oscloudd has" in box.log()
    assert box.socket_path.stat().st_ino == inode
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]


@pytest.mark.parametrize("wait", ["started", "ready"])
def test_a_qemu_that_does_not_start_leaves_nothing(box: Box, wait: str) -> None:
    error = create_in_vain(box, "exit_at_start", wait)
    assert (error.code, error.kind) == (10, "host_failure")
    assert error.message == (
        "qemu did not start: qemu-system-x86_64: fake: could not open disk image: it is on strike"
    )
    assert error.data["stage"] == "starting"
    assert "-name" in error.data["argv"]


def test_a_guest_that_can_not_take_its_identity_leaves_nothing(box: Box) -> None:
    error = create_in_vain(box, "identity_fails", "ready")
    assert (error.code, error.kind) == (10, "host_failure")
    assert error.message == "the guest could not apply its identity: no space left"
    assert error.data["stage"] == "booting"
    assert "Linux version 0.0-fake" in error.data["console"]


def test_a_qemu_that_crashes_before_its_guest_is_ready_leaves_nothing(box: Box) -> None:
    error = create_in_vain(box, "crash_after_cont", "ready")
    assert (error.code, error.kind) == (10, "host_failure")
    assert "SIGSEGV" in error.message


def test_a_vm_deleted_while_its_creator_waits_for_it_is_gone(box: Box) -> None:
    told: list[Any] = []

    def delete_it(step: dict[str, Any]) -> None:
        told.append(step)
        if step["stage"] == "booting":
            box.call("vm_delete", vm="web-identity_silent", force=True)

    params = {"mem_size": "64M", "disk_size": "16M", "wait": "ready"}
    with pytest.raises(RpcError) as ended:
        box.call("vm_create", delete_it, name="web-identity_silent", **params)
    assert ended.value.kind in ("invalid_state", "not_found", "host_failure")
    assert box.traces() == {}


def test_a_creator_that_hangs_up_does_not_stop_the_creation(box: Box) -> None:
    with box.connect() as line:
        line.send(
            b'{"jsonrpc": "2.0", "method": "vm_create", "id": 1, "params": {"name": "web",'
            b' "mem_size": "64M", "disk_size": "16M"}}\n'
        )
        assert line.receive()["method"] == "progress"
    assert box.wait("web", "RUNNING")["pid"] == box.qemus()[0]


def create_in_vain(box: Box, fault: str, wait: str) -> RpcError:
    """Ask for a vm that can't come to be; its name and its address are free again."""
    name = f"web-{fault}"
    for _ in range(2):
        with pytest.raises(RpcError) as failed:
            box.create(name, wait=wait)
        assert box.traces() == {}
    assert {state for (state,) in box.rows("SELECT state FROM job")} == {"FAILED"}
    assert box.call("vm_list") == []
    return failed.value


def test_a_job_whose_undoing_was_cut_short_is_undone(box: Box) -> None:
    job = box.create("web", wait="none")
    box.wait("web", "RUNNING")
    box.end(signal.SIGKILL)
    undoing = (
        '{"wait": "ready", "undoing": {"kind": "cancelled", "message": "job 1 was cancelled"}}'
    )
    box.rows("UPDATE job SET params = ?", undoing)
    box.start()
    ended = box.call("job_wait", job=job["id"], timeout=LIMIT_SECONDS)
    assert (ended["state"], ended["message"]) == ("CANCELLED", "job 1 was cancelled")
    assert box.traces() == {}


def test_a_job_that_had_only_to_be_called_done_holds_up_nothing(box: Box) -> None:
    vm = box.create("web", restart="on-failure")
    box.call("vm_stop", vm="web", force=True)
    vm = box.call("vm_start", vm="web")
    box.end(signal.SIGKILL)
    os.kill(vm["pid"], signal.SIGKILL)
    box.until(lambda: not box.qemus(), "the end of qemu")
    box.rows("UPDATE job SET state = 'RUNNING', finished_at = NULL WHERE kind = 'vm_start'")
    box.start()
    box.until(lambda: box.call("vm_info", vm="web")["state"] == "RUNNING", "another start")
    assert box.rows("SELECT state FROM job WHERE kind = 'vm_start' ORDER BY id")[0] == ("DONE",)


def test_a_vm_that_runs_though_the_database_says_otherwise_is_adopted(box: Box) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    # As when an older copy of the database was put back.
    box.rows("DELETE FROM job")
    box.rows(
        "UPDATE vm SET state = 'STOPPED', wanted_state = 'STOPPED', qemu_pid = NULL,"
        " qemu_start_ticks = NULL, qemu_boot_id = NULL"
    )
    box.start()
    seen = box.wait("web", "RUNNING")
    assert (seen["pid"], box.qemus()) == (vm["pid"], [vm["pid"]])
    assert box.call("vm_stop", vm="web")["state"] == "STOPPED"


def test_a_creation_goes_on_with_a_qemu_that_was_slow_to_answer_the_next_daemon(box: Box) -> None:
    job = box.create("web", wait="none")
    vm = box.wait("web", "RUNNING")
    box.until(lambda: box.rows("SELECT stage FROM job") == [("booting",)], "the guest's boot")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.end(signal.SIGKILL)
    box.start()
    box.wait("web", "UNRESPONSIVE")
    os.kill(vm["pid"], signal.SIGCONT)
    box.wait("web", "RUNNING")
    with box.sshd_at(vm["ip"]):
        assert box.call("job_wait", job=job["id"], timeout=LIMIT_SECONDS)["state"] == "DONE"
    assert box.call("vm_info", vm="web")["ready"]
