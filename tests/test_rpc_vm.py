"""A vm's life through the socket of a real daemon, whose qemu runs no machine."""

import itertools
import os
import signal
import stat
import threading
from collections.abc import Callable
from typing import Any

import pytest
from daemon_process import IMAGE, Box, RpcError


def test_says_who_it_is_and_who_calls(box: Box) -> None:
    info = box.call("daemon_info")
    assert box.daemon is not None
    assert info["pid"] == box.daemon.pid
    assert info["accelerator"] == "tcg"
    assert "7.2.22" in info["qemu_version"]
    assert info["socket"] == str(box.socket_path)
    assert info["vms"] == {}
    assert info["caller"] == {"pid": os.getpid(), "uid": os.geteuid(), "gid": os.getegid()}


def test_its_socket_is_for_its_group_only(box: Box) -> None:
    status = box.socket_path.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660


def test_the_doctor_looks_at_everything(box: Box) -> None:
    report = box.call("daemon_doctor")
    verdicts = {check["check"]: check["verdict"] for check in report["checks"]}
    assert report["ok"], report
    assert {"accelerator", "qemu", "network", "disk", "memory", "templates"} <= verdicts.keys()
    assert all(check["hint"] for check in report["checks"] if check["verdict"] != "ok")


def test_a_vm_lives_from_create_to_delete(box: Box) -> None:
    vm = box.create("web", cpus=2)
    expected = {
        "id": 1,
        "name": "web",
        "state": "RUNNING",
        "wanted_state": "RUNNING",
        "os": IMAGE,
        "network": "default",
        "ip": "192.168.0.2",
        "gateway": "192.168.0.1",
        "mem_size": 64 << 20,
        "disk_size": 16 << 20,
        "cpus": 2,
        "accelerator": "tcg",
        "started": "cold",
        "ready": False,
        "serial_port": 10002,
        "owner_uid": 0,
    }
    assert vm.items() >= expected.items()
    assert box.qemus() == [vm["pid"]]
    assert [key.split()[0] for key in vm["ssh_host_keys"]] == ["ssh-ed25519"]
    assert [listed["name"] for listed in box.call("vm_list")] == ["web"]
    for key in (1, "1", "web"):
        assert box.call("vm_info", vm=key)["uuid"] == vm["uuid"]

    assert box.call("vm_pause", vm="web")["state"] == "PAUSED"
    status = box.call("vm_qemu_command", vm="web", command="query-status")
    assert status["status"] == "paused"
    assert box.call("vm_pause", vm="web")["state"] == "PAUSED"
    assert box.call("vm_resume", vm="web")["state"] == "RUNNING"

    restarted = box.call("vm_restart", vm="web")
    assert restarted["state"] == "RUNNING"
    assert restarted["pid"] != vm["pid"]
    assert box.qemus() == [restarted["pid"]]

    stopped = box.call("vm_stop", vm="web")
    assert (stopped["state"], stopped["pid"], stopped["reason"]) == (
        "STOPPED",
        None,
        "stopped by the user",
    )
    assert box.qemus() == []
    assert box.call("vm_stop", vm="web")["state"] == "STOPPED"
    assert box.call("vm_start", vm=1)["state"] == "RUNNING"
    renamed = box.call("vm_rename", vm="web", name="shop")
    assert (renamed["id"], renamed["name"]) == (1, "shop")
    disk = box.call("disk_info", disk=vm["disk"])
    assert (disk["vm"], disk["size"], disk["template"]) == ("shop", 16 << 20, IMAGE)
    assert box.call("template_info", template=IMAGE)["used_by"] == 1
    assert box.call("network_info", network="default")["vms"] == ["shop"]
    assert box.call("daemon_info")["vms"] == {"RUNNING": 1}

    assert box.call("vm_delete", vm="shop") == {"deleted": 1, "name": "shop"}
    assert box.traces() == {}
    assert box.create("web")["id"] == 2  # ids are never given twice; the address is free again
    assert box.call("vm_info", vm="web")["ip"] == "192.168.0.2"


def test_what_its_network_card_has_seen_is_told_of_one_vm(box: Box) -> None:
    assert "nic" not in box.create("web")
    seen = box.call("vm_info", vm="web")["nic"]
    assert set(seen) == {"rx_bytes", "rx_packets", "tx_bytes", "tx_packets"}
    assert "nic" not in box.call("vm_list")[0]
    box.call("vm_stop", vm="web", force=True)
    assert box.call("vm_info", vm="web")["nic"] is None


def test_progress_comes_before_the_answer(box: Box) -> None:
    steps: list[dict[str, Any]] = []
    with box.sshd_at("192.168.0.2"):
        vm = box.call(
            "vm_create", steps.append, name="web", mem_size="64M", disk_size="16M", wait="ready"
        )
    assert vm["ready"]
    stages = [stage for stage, _ in itertools.groupby(step["stage"] for step in steps)]
    assert stages == [
        "disk", "seed", "network", "starting", "running", "booting", "ready", "done",
    ]  # fmt: skip
    assert len({step["job"] for step in steps}) == 1
    assert all(step["message"] for step in steps)
    assert steps[-1]["fraction"] == 1.0
    assert box.rows("SELECT state FROM job") == [("DONE",)]
    # It knows who it is: the daemon keeps its secrets no longer.
    assert box.rows("SELECT identified, seed_document FROM vm") == [(1, "")]


def test_a_create_that_waits_for_nothing_answers_at_once(box: Box) -> None:
    job = box.create("web", wait="none")
    assert (job["kind"], job["state"]) == ("vm_create", "RUNNING")
    assert box.wait("web", "RUNNING")["pid"] == box.qemus()[0]


def test_waiting_ends_with_the_state_or_in_time(box: Box) -> None:
    box.create("web")
    with pytest.raises(RpcError) as late:
        box.call("vm_wait", vm="web", state="ready", timeout=0.2)
    assert (late.value.code, late.value.kind) == (9, "timeout")
    seen: list[str] = []
    waiter = threading.Thread(target=lambda: seen.append(box.wait("web", "STOPPED")["state"]))
    waiter.start()
    box.call("vm_stop", vm="web", force=True)
    waiter.join()
    assert seen == ["STOPPED"]
    with pytest.raises(RpcError) as hopeless:
        box.call("vm_wait", vm="web", state="ready")
    assert (hopeless.value.code, hopeless.value.kind) == (5, "invalid_state")
    assert "vm-start" in hopeless.value.data["hint"]


def test_logs_are_the_guests_and_qemus(box: Box) -> None:
    box.create("web")
    box.until(lambda: "login:" in box.call("vm_log", vm="web")["text"], "a login prompt")
    assert "Linux version 0.0-fake" in box.call("vm_log", vm="web", source="console")["text"]
    assert box.call("vm_log", vm="web", lines=1)["text"] == "web login: "
    assert box.call("vm_log", vm="web", source="qemu")["text"] == ""


def test_a_console_carries_the_serial_line_both_ways(box: Box) -> None:
    box.create("web")
    box.until(lambda: "login:" in box.call("vm_log", vm="web")["text"], "a login prompt")
    with box.connect() as first, box.connect() as second:
        for line in first, second:
            assert line.call("vm_console", vm="web")["escape"] is None
            line.read_until(b"web login: ")
        first.send(b"root\r")
        for line in first, second:
            line.read_until(b"root")
    assert box.call("vm_info", vm="web")["state"] == "RUNNING"


def test_a_console_ends_with_its_vm(box: Box) -> None:
    box.create("web")
    with box.connect() as line:
        line.call("vm_console", vm="web")
        box.call("vm_stop", vm="web", force=True)
        while not line.at_end():
            pass
    with pytest.raises(RpcError) as refused:
        box.call("vm_console", vm="web")
    assert refused.value.kind == "invalid_state"


def test_qemus_own_words_come_through(box: Box) -> None:
    box.create("web")
    assert box.call("vm_qemu_command", vm="web", command="query-name") == {"name": "web"}
    with pytest.raises(RpcError) as refused:
        box.call("vm_qemu_command", vm="web", command="no-such-thing", arguments={"a": 1})
    assert (refused.value.code, refused.value.kind) == (10, "host_failure")
    assert "no-such-thing" in refused.value.message


def test_what_a_state_does_not_allow_is_refused_with_a_way_out(box: Box) -> None:
    box.create("web")
    box.call("vm_stop", vm="web", force=True)
    for method in ("vm_pause", "vm_resume", "vm_restart", "vm_console"):
        with pytest.raises(RpcError) as refused:
            box.call(method, vm="web")
        assert (refused.value.code, refused.value.kind) == (5, "invalid_state"), method
        assert "STOPPED" in refused.value.message
        assert refused.value.data["hint"]


def test_a_guest_that_ignores_its_power_button_is_stopped_in_time(box: Box) -> None:
    box.create("web-ignore_powerdown")
    assert box.call("vm_stop", vm=1, timeout=0.3)["state"] == "STOPPED"


def test_a_guest_that_powers_itself_off_is_stopped(box: Box) -> None:
    box.create("web-shutdown_after_cont")
    seen = box.wait(1, "STOPPED")
    assert seen["reason"] == "the guest powered itself off"


def test_a_qemu_that_is_killed_is_crashed_and_can_be_started(box: Box) -> None:
    vm = box.create("web")
    os.kill(vm["pid"], signal.SIGKILL)
    crashed = box.wait("web", "CRASHED")
    assert crashed["reason"] == "qemu was ended by SIGKILL, which was not ours"
    assert crashed["pid"] is None
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


def test_a_name_asked_for_twenty_times_at_once_is_given_once(box: Box) -> None:
    won, lost = at_once(20, lambda: box.create("web"))
    assert len(won) == 1
    assert {(error.code, error.kind) for error in lost} == {(4, "already_exists")}
    assert len(lost) == 19
    assert box.qemus() == [won[0]["pid"]]
    assert len(box.rows("SELECT id FROM disk")) == 1


def test_vms_made_at_once_share_nothing(box: Box) -> None:
    made: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda name=f"web{number}": made.append(box.create(name)))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in ("id", "ip", "mac", "pid", "serial_port", "disk", "uuid"):
        assert len({vm[key] for vm in made}) == 6, key


def at_once(count: int, call: Callable[[], Any]) -> tuple[list[Any], list[RpcError]]:
    """Do one thing many times at once; give the answers and the refusals."""
    answers: list[Any] = []
    refusals: list[RpcError] = []

    def once() -> None:
        try:
            answers.append(call())
        except RpcError as error:
            refusals.append(error)

    threads = [threading.Thread(target=once) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) + len(refusals) == count
    return answers, refusals


def test_a_vm_started_ten_times_at_once_has_one_qemu(box: Box) -> None:
    box.create("web")
    box.call("vm_stop", vm="web", force=True)
    started, refused = at_once(10, lambda: box.call("vm_start", vm="web"))
    assert len(started) == 1
    assert {error.kind for error in refused} == {"invalid_state"}
    assert box.qemus() == [started[0]["pid"]]


def test_a_vm_deleted_ten_times_at_once_is_deleted_once(box: Box) -> None:
    box.create("web")
    deleted, refused = at_once(10, lambda: box.call("vm_delete", vm="web", force=True))
    assert len(deleted) == 1
    assert {error.kind for error in refused} == {"not_found"}
    assert box.traces() == {}


def test_a_vm_deleted_as_soon_as_it_is_asked_for_leaves_nothing(box: Box) -> None:
    for _ in range(5):
        box.create("web", wait="none")
        box.call("vm_delete", vm="web", force=True)
        assert box.traces() == {}


def test_who_waits_for_a_vm_that_is_deleted_is_told(box: Box) -> None:
    box.create("web")
    told: list[RpcError] = []

    def wait() -> None:
        with pytest.raises(RpcError) as gone:
            box.wait("web", "PAUSED")
        told.append(gone.value)

    waiter = threading.Thread(target=wait)
    waiter.start()
    box.call("vm_delete", vm="web", force=True)
    waiter.join()
    assert [error.kind for error in told] == ["not_found"]
