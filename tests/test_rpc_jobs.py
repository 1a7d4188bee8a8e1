"""Long operations as jobs: journalled, listed, waited for, cancelled."""

import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from daemon_process import LIMIT_SECONDS, Box, RpcError

SMALL = {"mem_size": "64M", "disk_size": "16M"}
Progress = dict[str, Any]


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Make a call in a thread; its answer or its error is put into the list."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except RpcError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def configure(box: Box, text: str) -> None:
    with (box.root / "oscloud.toml").open("a") as file:
        file.write(text)


def wait_for(box: Box, job: int) -> dict[str, Any]:
    ended: dict[str, Any] = box.call("job_wait", job=job, timeout=LIMIT_SECONDS)
    return ended


def test_each_operation_leaves_a_job_that_tells_what_was_done(box: Box) -> None:
    vm = box.create("web")
    box.call("vm_stop", vm="web")
    box.call("vm_start", vm="web")
    box.call("vm_restart", vm="web", force=True)
    box.call("vm_rename", vm="web", name="shop")
    box.call("vm_delete", vm="shop", force=True)
    jobs = box.call("job_list")
    assert [(job["kind"], job["target"]) for job in reversed(jobs)] == [
        ("vm_create", "web"), ("vm_stop", "web"), ("vm_start", "web"), ("vm_restart", "web"),
        ("vm_rename", "shop"), ("vm_delete", "shop"),
    ]  # fmt: skip
    for job in jobs:
        assert job["vm"] == vm["id"]
        if job["kind"] != "vm_create":  # whose guest has no sshd
            assert (job["state"], job["step"]) == ("DONE", job["steps"])
            assert job["created_at"] <= job["finished_at"]
            assert not job["cancellable"]
    assert box.call("job_info", job=jobs[0]["id"]) == jobs[0]
    assert len(box.call("job_list", limit=2)) == 2


def test_what_a_job_needed_is_forgotten_with_its_end(box: Box) -> None:
    box.create("web")
    box.call("vm_delete", vm="web", force=True)
    box.traces()
    assert {params for (params,) in box.rows("SELECT params FROM job")} == {"{}"}


def test_a_job_can_be_left_alone_and_waited_for(box: Box) -> None:
    job = box.call("vm_create", name="web", wait="none", **SMALL)
    assert (job["kind"], job["state"]) == ("vm_create", "RUNNING")
    seen: list[Progress] = []
    vm = box.wait("web", "RUNNING")
    with box.sshd_at(vm["ip"]):
        ended = box.call("job_wait", seen.append, job=job["id"], timeout=LIMIT_SECONDS)
    assert (ended["state"], ended["step"]) == ("DONE", ended["steps"])
    assert seen
    assert {step["job"] for step in seen} == {job["id"]}

    stop = box.call("vm_stop", vm="web", wait=False)
    assert stop["kind"] == "vm_stop"
    assert wait_for(box, stop["id"])["state"] == "DONE"
    for method in ("vm_start", "vm_restart", "vm_delete"):
        assert wait_for(box, box.call(method, vm="web", wait=False)["id"])["state"] == "DONE"
    assert box.call("vm_list") == []


def test_waiting_for_a_job_has_an_end_of_its_own(box: Box) -> None:
    job = box.call("vm_create", name="web-identity_silent", wait="none", **SMALL)
    with pytest.raises(RpcError) as late:
        box.call("job_wait", job=job["id"], timeout=0.2)
    assert late.value.kind == "timeout"
    assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"


def test_a_job_that_is_not_there_is_said_to_be_so(box: Box) -> None:
    for method in ("job_info", "job_wait", "job_cancel"):
        with pytest.raises(RpcError) as failed:
            box.call(method, job=4711)
        assert (failed.value.kind, failed.value.message) == ("not_found", "job '4711' not found")


def test_a_cancelled_creation_leaves_nothing_and_its_name_is_free(box: Box) -> None:
    cancelled: list[Any] = []

    def cancel(step: Progress) -> None:
        if step["stage"] == "booting" and not cancelled:
            cancelled.append(box.call("job_cancel", job=step["job"]))

    with pytest.raises(RpcError) as failed:
        box.call("vm_create", cancel, name="web-identity_silent", wait="ready", **SMALL)
    assert (failed.value.kind, failed.value.code) == ("cancelled", 13)
    assert [job["state"] for job in cancelled] == ["CANCELLED"]
    assert box.traces() == {}
    with pytest.raises(RpcError) as late:
        box.call("job_cancel", job=cancelled[0]["id"])
    assert late.value.kind == "invalid_state"
    box.create("web-identity_silent")


def test_a_cancelled_stop_leaves_the_vm_as_it_was(box: Box) -> None:
    vm = box.create("web-ignore_powerdown")
    for method in ("vm_stop", "vm_restart", "vm_delete"):
        job = box.call(method, vm=vm["id"], timeout=600, wait=False)
        box.until(lambda job=job: box.call("job_info", job=job["id"])["cancellable"], "the job")
        assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
        seen = box.call("vm_info", vm=vm["id"])
        assert (seen["state"], seen["wanted_state"], seen["pid"]) == (
            "RUNNING",
            "RUNNING",
            vm["pid"],
        )
    assert box.call("vm_stop", vm=vm["id"], force=True)["state"] == "STOPPED"


def test_what_is_too_late_to_cancel_is_refused(box: Box) -> None:
    vm = box.create("web")
    done = box.call("vm_stop", vm="web", wait=False)
    wait_for(box, done["id"])
    with pytest.raises(RpcError) as late:
        box.call("job_cancel", job=done["id"])
    assert late.value.kind == "invalid_state"
    assert "it is DONE" in late.value.message
    assert box.call("vm_info", vm=vm["id"])["state"] == "STOPPED"


def test_one_name_asked_for_a_hundred_times_at_once_is_given_once(box: Box) -> None:
    calls = [in_background(lambda: box.create("web")) for _ in range(100)]
    for thread, _ in calls:
        thread.join(LIMIT_SECONDS)
    answers = [result[0] for _, result in calls]
    errors = [answer for answer in answers if isinstance(answer, RpcError)]
    assert {error.kind for error in errors} == {"already_exists"}
    assert len(errors) == 99
    assert len(box.qemus()) == 1


def test_parallel_calls_on_one_vm_come_one_after_the_other(box: Box) -> None:
    box.create("web")
    calls = [
        in_background(lambda method=method: box.call(method, vm="web"))
        for method in ("vm_stop", "vm_start", "vm_restart", "vm_pause", "vm_resume") * 6
    ]
    for thread, _ in calls:
        thread.join(LIMIT_SECONDS)
    for _, (answer,) in calls:
        if isinstance(answer, RpcError):
            assert answer.kind == "invalid_state"
            assert answer.data["state"] in ("RUNNING", "STOPPED", "PAUSED")
    spans = box.rows(
        "SELECT created_at, finished_at FROM job WHERE kind <> 'vm_create' ORDER BY id"
    )
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin
    assert len(box.qemus()) == (box.call("vm_info", vm="web")["state"] != "STOPPED")


def test_parallel_creations_overlap_up_to_a_limit(box: Box) -> None:
    box.end()
    configure(box, "[limits]\nmax_parallel_starts = 2\n")
    box.start()
    calls = [in_background(lambda n=n: box.create(f"web{n}-slow_start")) for n in range(6)]
    most = 0
    while any(thread.is_alive() for thread, _ in calls):
        qemus = len(box.qemus())
        most = max(most, qemus - len(box.rows("SELECT 1 FROM vm WHERE qemu_pid IS NOT NULL")))
    assert [result[0]["state"] for _, result in calls] == ["RUNNING"] * 6
    assert most == 2


def test_more_memory_than_the_host_may_give_is_refused_with_the_numbers(box: Box) -> None:
    box.end()
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        total = int(meminfo.readline().split()[1]) * 1024
    configure(box, f"[limits]\novercommit = {150 * 2**20 / total:.6f}\n")
    box.start()
    box.create("one")
    box.create("two")
    with pytest.raises(RpcError) as refused:
        box.create("three")
    assert refused.value.kind == "exhausted"
    assert refused.value.data["resource"] == "memory"
    assert refused.value.data["committed"] == 128 << 20
    assert refused.value.data["wanted"] == 64 << 20
    box.call("vm_stop", vm="two")
    box.create("three")
    with pytest.raises(RpcError) as refused:
        box.call("vm_start", vm="two")
    assert refused.value.data["resource"] == "memory"
    assert box.call("vm_info", vm="two")["state"] == "STOPPED"


def test_a_vm_restarted_while_it_boots_outlives_the_job_that_makes_it(box: Box) -> None:
    job = box.create("web-identity_silent", wait="none")
    vm = box.wait("web-identity_silent", "RUNNING")
    again = box.call("vm_restart", vm=vm["id"], force=True)
    assert again["pid"] != vm["pid"]
    assert wait_for(box, job["id"])["state"] == "FAILED"
    assert box.call("vm_info", vm=vm["id"])["pid"] == again["pid"]
    assert box.qemus() == [again["pid"]]


def test_a_vm_may_be_started_the_moment_it_is_seen_to_have_ended(box: Box) -> None:
    vm = box.create("web")
    for _ in range(10):
        os.kill(vm["pid"], signal.SIGKILL)
        box.wait("web", "CRASHED")
        vm = box.call("vm_start", vm="web")
        assert box.call("vm_qemu_command", vm="web", command="query-name") == {"name": "web"}
    # Its sockets are its own: another daemon finds it by them.
    box.end(signal.SIGKILL)
    box.start()
    assert box.call("vm_qemu_command", vm="web", command="query-name") == {"name": "web"}
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]
