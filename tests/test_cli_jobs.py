"""The job commands, `--no-wait`, and what a vm does by itself, against the scripted daemon."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import HANG_UP, JOB, VM, Call, Oscloudctl, Running, ScriptedJob, StubDaemon

from oscloudd.errors import ERRORS_BY_KIND, InvalidStateError, NotFoundError, OperationTimeoutError

DONE = {**JOB, "state": "DONE", "step": 6, "finished_at": JOB["created_at"] + 4.25}
FAILED = {**DONE, "id": 8, "state": "FAILED", "error_kind": "host_failure", "message": "qemu hangs"}
CANCELLED = {**DONE, "state": "CANCELLED", "error_kind": "cancelled",
             "message": "job 7 (vm_create web) was cancelled"}  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    stub.answers.update(job_list=[FAILED, JOB], job_info=JOB, vm_info=VM, vm_list=[VM])
    yield stub
    stub.close()


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    return Oscloudctl(daemon, tmp_path)


def answer_by_id(daemon: StubDaemon, method: str, **jobs: Any) -> None:
    def answer(call: Call) -> Any:
        return jobs[f"_{call.params['job']}"]

    daemon.answers[method] = answer


# Looking


def test_job_list(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["job_list"] = [FAILED, {**JOB, "created_at": time.time() - 7325}]
    assert re.split(" {2,}", ctl("job-list").stdout.splitlines()[2]) == [
        "7", "vm_create", "web", "RUNNING", "booting", "3 of 6", "2 h 2 min", "-",
    ]  # fmt: skip
    header, failed = (line.split() for line in ctl("job-list").stdout.splitlines()[:2])
    assert header == ["ID", "KIND", "TARGET", "STATE", "STAGE", "STEP", "AGE", "TOOK"]
    assert failed[:8] == ["8", "vm_create", "web", "FAILED", "booting", "6", "of", "6"]
    assert failed[-2:] == ["4.2", "s"]


def test_job_list_bounds(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    assert json.loads(ctl("job-list", "--json").stdout) == [FAILED, JOB]
    assert ctl("job-list", "-q", "--limit", "3").stdout == "8\n7\n"
    ctl("job-list", "--all")
    assert daemon.params_of("job_list") == [{"limit": 100}, {"limit": 3}, {"limit": 10_000}]
    ctl("job-list", "--limit", "0", status=2)
    daemon.answers["job_list"] = []
    done = ctl("job-list")
    assert done.stdout == ""
    assert "no job" in done.stderr


def test_job_info(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    fields = dict(line.split(None, 1) for line in ctl("job-info", "7").stdout.splitlines())
    assert fields["created_at"] == "2026-01-02 03:04:05"
    assert fields["finished_at"] == "-"
    assert json.loads(ctl("job-info", "7", "--json").stdout) == JOB
    assert daemon.params_of("job_info") == [{"job": 7}] * 2
    assert "not a valid integer" in ctl("job-info", "seven", status=2).stderr


# Waiting


def test_job_wait_is_done(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["job_wait"] = DONE
    done = ctl("job-wait", "7")
    assert (done.stdout, done.stderr) == ("job 7 (vm_create web): done\n", "")
    assert json.loads(ctl("job-wait", "7", "--json", "--timeout", "5").stdout) == DONE
    day, five = (params["timeout"] for params in daemon.params_of("job_wait"))
    assert 86000 < day <= 86400
    assert 4 < five <= 5


def test_job_wait_shows_the_progress(daemon: StubDaemon, tmp_path: Path) -> None:
    job = ScriptedJob(daemon, "job_wait", DONE)
    with Running(daemon, tmp_path, "job-wait", "7") as running:
        running.see("] booting: kernel\n")
        job.end.set()
        assert running.end() == (0, "job 7 (vm_create web): done\n", "")


@pytest.mark.parametrize("kind", [*sorted(set(ERRORS_BY_KIND) - {"unreachable"}), "of the future"])
def test_job_wait_fails_as_the_job_did(ctl: Oscloudctl, daemon: StubDaemon, kind: str) -> None:
    status = ERRORS_BY_KIND[kind].exit_status if kind in ERRORS_BY_KIND else 70
    daemon.answers["job_wait"] = {**FAILED, "error_kind": kind}
    done = ctl("job-wait", "8", status=status)
    assert done.stdout == ""
    assert done.stderr == (
        "Error: job 8 (vm_create web) failed: qemu hangs\nHint: see: oscloudctl job-info 8\n"
    )
    assert json.loads(ctl("job-wait", "8", "--json", status=status).stdout)["state"] == "FAILED"


def test_job_wait_for_a_cancelled_one_is_130(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["job_wait"] = CANCELLED
    assert ctl("job-wait", "7", status=130).stderr == f"Error: {CANCELLED['message']}\n"


def test_job_wait_for_several(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    answer_by_id(daemon, "job_wait", _7=DONE, _8=FAILED)
    done = ctl("job-wait", "8", "7", status=10)
    assert done.stdout == "job 7 (vm_create web): done\n"
    assert json.loads(ctl("job-wait", "7", "8", "--json", status=10).stdout) == [DONE, FAILED]


def test_job_wait_in_vain(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.fail("job_wait", OperationTimeoutError("too slow"))
    assert ctl("job-wait", "7", "--timeout", "0", status=9).stderr == "Error: too slow\n"
    daemon.fail("job_info", NotFoundError("job 9 not found"))
    assert ctl("job-wait", "9", status=3).stderr == "Error: job 9 not found\n"


def test_job_wait_goes_on_when_the_daemon_restarts(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def restart(_call: Call) -> Any:
        daemon.answers["job_wait"] = DONE
        return HANG_UP

    daemon.answers["job_wait"] = restart
    done = ctl("job-wait", "7")
    assert done.stdout == "job 7 (vm_create web): done\n"
    assert "Trying again" in done.stderr
    assert done.stderr.endswith("The daemon is back.\n")


# Cancelling


def test_job_cancel(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["job_cancel"] = CANCELLED
    assert ctl("job-cancel", "7").stdout == "job 7 (vm_create web): cancelled\n"
    assert json.loads(ctl("job-cancel", "7", "--json").stdout) == CANCELLED
    assert daemon.params_of("job_cancel") == [{"job": 7}] * 2
    daemon.fail("job_cancel", InvalidStateError("job 7 is DONE"))
    assert ctl("job-cancel", "7", status=5).stderr == "Error: job 7 is DONE\n"
    ctl("job-cancel", status=2)


def test_job_cancel_that_came_to_another_end(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["job_cancel"] = FAILED
    assert "failed: qemu hangs" in ctl("job-cancel", "8", status=10).stderr
    daemon.answers["job_cancel"] = DONE
    assert "too late" in ctl("job-cancel", "7", status=5).stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("oscloudctl job-info ", ["8", "7"]),
        ("oscloudctl job-cancel ", ["7"]),
        ("oscloudctl job-info 8", ["8"]),
        ("oscloudctl vm-create x --restart o", ["on-failure"]),
    ],
)
def test_completes_jobs(ctl: Oscloudctl, words: str, expected: list[str]) -> None:
    done = ctl(
        _OSCLOUDCTL_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == expected


# --no-wait

NO_WAIT = [
    (("vm-create", "web", "--no-ssh-key"), {"wait": "none"}),
    (("vm-start", "web"), {"wait": False}),
    (("vm-stop", "web"), {"wait": False}),
    (("vm-restart", "web"), {"wait": False}),
    (("vm-delete", "web", "-y"), {"wait": False}),
    (("template-build", "tiny"), {"wait": False}),
    (("template-download", "tiny"), {"wait": False}),
    (("template-import", "http://h/x.img"), {"wait": False, "url": "http://h/x.img"}),
]


@pytest.mark.parametrize(("command", "sent"), NO_WAIT)
def test_no_wait_answers_the_job(
    ctl: Oscloudctl, daemon: StubDaemon, command: tuple[str, ...], sent: dict[str, Any]
) -> None:
    method = command[0].replace("-", "_")
    daemon.answers[method] = JOB
    done = ctl(*command, "--no-wait")
    assert done.stdout == "job 7 (vm_create web): begun\n"
    assert done.stderr == "Next: oscloudctl job-wait 7\n"
    assert ctl(*command, "--no-wait", "-q").stdout == "7\n"
    assert json.loads(ctl(*command, "--no-wait", "--json").stdout) == JOB
    assert all(sent.items() <= params.items() for params in daemon.params_of(method))


def test_no_wait_for_several(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_stop"] = lambda call: {**JOB, "id": 7 if call.params["vm"] == "a" else 8}
    assert ctl("vm-stop", "a", "b", "--no-wait").stderr == "Next: oscloudctl job-wait 7 8\n"


def test_wait_none_is_the_same(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = JOB
    create = ("vm-create", "web", "--no-ssh-key")
    assert ctl(*create, "--wait", "none", "-q").stdout == "7\n"
    assert ctl(*create, "--wait", "none", "--no-wait", "-q").stdout == "7\n"
    assert "exclude" in ctl(*create, "--wait", "ready", "--no-wait", status=2).stderr


def test_q_is_the_vms_id_where_it_was_waited_for(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers.update(vm_stop=VM, vm_delete={"deleted": 1, "name": "web"})
    assert ctl("vm-stop", "web", "-q").stdout == "1\n"
    assert ctl("vm-delete", "web", "-q", "-y").stdout == "1\n"


# What a vm does by itself


def test_vm_create_with_policies(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "web", "--no-ssh-key", "--autostart", "last-state", "--restart", "always")
    sent = daemon.params_of("vm_create")[0]
    assert (sent["autostart"], sent["restart"]) == ("last-state", "always")
    assert "on-failure" in ctl("vm-create", "web", "--restart", "maybe", status=2).stderr


def test_vm_set(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_set"] = {**VM, "autostart": "yes"}
    assert ctl("vm-set", "web", "--autostart", "yes").stdout == "web: autostart yes, restart no\n"
    assert json.loads(ctl("vm-set", "2", "--restart", "no", "--json").stdout)["name"] == "web"
    assert ctl("vm-set", "2", "--restart", "no", "-q").stdout == "1\n"
    assert daemon.params_of("vm_set") == [
        {"vm": "web", "autostart": "yes"}, {"vm": 2, "restart": "no"}, {"vm": 2, "restart": "no"},
    ]  # fmt: skip


def test_vm_set_of_a_bandwidth(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_set"] = {**VM, "bandwidth": 100_000_000}
    shown = ctl("vm-set", "web", "--bandwidth", "100M").stdout
    assert shown == "web: bandwidth 100000000, autostart no, restart no\n"
    assert daemon.params_of("vm_set") == [{"vm": "web", "bandwidth": "100M"}]


@pytest.mark.parametrize("arguments", [("web",), ("--autostart", "yes"), ("web", "--restart", "x")])
def test_vm_set_of_nothing(ctl: Oscloudctl, daemon: StubDaemon, arguments: tuple[str, ...]) -> None:
    assert ctl("vm-set", *arguments, status=2).stderr.startswith("Error: ")
    assert daemon.calls == []


def test_vm_info_shows_the_policies_and_the_reason(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_info"] = {**VM, "state": "CRASHED", "reason": "qemu was killed"}
    fields = dict(line.split(None, 1) for line in ctl("vm-info", "web").stdout.splitlines())
    shown = {key: fields[key] for key in ("autostart", "restart", "reason", "wanted_state")}
    assert shown == {"autostart": "no", "restart": "no", "reason": "qemu was killed",
                     "wanted_state": "RUNNING"}  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({}, ""),
        ({"state": "STOPPED", "wanted_state": "STOPPED", "reason": "powered off"}, ""),
        ({"state": "STARTING", "wanted_state": "STOPPED"}, ""),
        ({"state": "STOPPED", "reason": "its guest powered off"},
         "web is STOPPED (wanted RUNNING): its guest powered off\n"),
        ({"state": "CRASHED", "reason": "killed\x1b[2J"},
         "web is CRASHED (wanted RUNNING): killed\n"),
        ({"state": "ERROR", "reason": None}, "web is ERROR (wanted RUNNING)\n"),
    ],
)  # fmt: skip
def test_vm_list_says_why_beside_the_table(
    ctl: Oscloudctl, daemon: StubDaemon, seen: dict[str, Any], words: str
) -> None:
    daemon.answers["vm_list"] = [{**VM, **seen}]
    done = ctl("vm-list")
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == words
    assert ctl("vm-list", "-q").stderr == ""
    assert ctl("vm-list", "--json").stderr == ""


def test_vm_list_does_not_drown_in_troubles(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_list"] = [{**VM, "state": "CRASHED"}] * 50
    lines = ctl("vm-list").stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 40 more: see oscloudctl vm-info"
