"""Every command as a process against the scripted daemon: what it sends, prints and exits with."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from stub_daemon import (
    DEADLINE_SECONDS,
    JOB,
    VM,
    Call,
    Oscloudctl,
    Running,
    ScriptedJob,
    StubDaemon,
    build_environment,
    no_vm,
)

from oscloudctl import progress
from oscloudctl.catalogue import COMMANDS
from oscloudctl.report import report
from oscloudd.errors import ERRORS_BY_KIND, HostError, InUseError, OperationTimeoutError

STOPPED = {**VM, "id": 2, "name": "db", "state": "STOPPED", "ip": "192.168.0.3"}
DISK = {"id": 1, "name": "web", "size": 10 << 30, "format": "qcow2", "template": "debian_12",
        "vm": "web", "path": "/d", "created_at": 0, "allocated": 3 << 20}  # fmt: skip
NETWORK = {"id": 1, "name": "default", "subnet": "192.168.0.0/16", "gateway": "192.168.0.1",
           "mask": "255.255.0.0", "bridge": "oscloud1", "dns": ["1.1.1.1", "9.9.9.9"],
           "isolated": False, "nat": True, "addresses_used": 2, "vms": ["web"]}  # fmt: skip
TEMPLATE = {"name": "tiny", "description": "for tests", "os": "BusyBox", "source": "build",
            "state": "READY", "size": 30 << 20, "digest": "ab", "built_at": 0, "used_by": 2,
            "identity": "serial"}  # fmt: skip

PORT = {"name": "127.0.0.1:8080/tcp", "vm": "web", "protocol": "tcp", "host_address": "127.0.0.1",
        "host_port": 8080, "guest_address": "192.168.0.2", "guest_port": 80}  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    stub.answers.update(
        vm_list=[VM, STOPPED], vm_info=VM, disk_list=[DISK], disk_info=DISK,
        network_list=[NETWORK], network_info=NETWORK, template_list=[TEMPLATE],
        template_info=TEMPLATE, port_list=[PORT], port_add=PORT, port_delete=PORT,
    )  # fmt: skip
    yield stub
    stub.close()


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    home = tmp_path / "home"
    home.mkdir()
    return Oscloudctl(daemon, home)


# Lists and infos


def test_vm_list_is_an_aligned_table(ctl: Oscloudctl) -> None:
    assert ctl("vm-list").stdout.splitlines() == [
        "ID  NAME  STATE    IP           CPUS  MEMORY  DISK  NETWORK  OS",
        "1   web   RUNNING  192.168.0.2  2     2G      10G   default  debian_12",
        "2   db    STOPPED  192.168.0.3  2     2G      10G   default  debian_12",
    ]


def test_an_empty_cell_keeps_its_column(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_list"] = [{**VM, "ip": None, "os": ""}]
    row = ctl("vm-list").stdout.splitlines()[1].split()
    assert row == ["1", "web", "RUNNING", "-", "2", "2G", "10G", "default", "-"]


def test_an_empty_list_says_what_to_do_and_prints_nothing(
    ctl: Oscloudctl, daemon: StubDaemon
) -> None:
    daemon.answers["vm_list"] = []
    done = ctl("vm-list")
    assert done.stdout == ""
    assert "oscloudctl vm-create" in done.stderr
    assert json.loads(ctl("vm-list", "--json").stdout) == []
    assert ctl("vm-list", "-q").stdout == ""


@pytest.mark.parametrize(
    ("command", "answer", "ids"),
    [
        (("vm-list",), [VM, STOPPED], "1\n2\n"),
        (("disk-list",), [DISK], "1\n"),
        (("network-list",), [NETWORK], "1\n"),
        (("template-list",), [TEMPLATE], "tiny\n"),
        (("port-list",), [PORT], "127.0.0.1:8080/tcp\n"),
        (("vm-info", "web"), VM, "1\n"),
        (("disk-info", "1"), DISK, "1\n"),
        (("network-info", "default"), NETWORK, "1\n"),
        (("template-info", "tiny"), TEMPLATE, "tiny\n"),
    ],
)
def test_json_is_the_answer_and_q_its_ids(
    ctl: Oscloudctl, command: tuple[str, ...], answer: Any, ids: str
) -> None:
    assert json.loads(ctl(*command, "--json").stdout) == answer
    assert ctl(*command, "-q").stdout == ids
    assert "\t" not in ctl(*command).stdout


def test_info_names_the_object_by_its_kind(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    ctl("vm-info", "7")
    ctl("disk-info", "web")
    ctl("network-info", "1")
    ctl("template-info", "tiny")
    assert daemon.calls == [
        ("vm_info", {"vm": 7}), ("disk_info", {"disk": "web"}),
        ("network_info", {"network": 1}), ("template_info", {"template": "tiny"}),
    ]  # fmt: skip


def test_info_is_readable(ctl: Oscloudctl) -> None:
    lines = ctl("vm-info", "web").stdout.splitlines()
    fields = dict(line.split(None, 1) for line in lines)
    assert fields["mem_size"] == "2G"
    assert fields["uptime_seconds"] == "1 h 2 min"
    assert fields["reason"] == "-"
    assert fields["ready"] == "yes"
    assert len({line.index(fields[line.split()[0]]) for line in lines}) == 1, "not aligned"


def test_several_infos_as_json_are_a_list(ctl: Oscloudctl) -> None:
    assert json.loads(ctl("vm-info", "web", "db", "--json").stdout) == [VM, VM]


def test_a_guests_words_do_not_drive_the_terminal(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_list"] = [{**VM, "os": "\x1b]0;owned\x07\nx"}]
    out = ctl("vm-list").stdout
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


# Changing things


def test_vm_create_needs_a_name_only(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    (ctl.home / ".ssh").mkdir()
    (ctl.home / ".ssh/id_rsa.pub").write_text("ssh-rsa AAAA me\n")
    (ctl.home / ".ssh/id_rsa-cert.pub").write_text("ssh-rsa-cert-v01@openssh.com AAAA\n")
    daemon.answers["vm_create"] = VM
    done = ctl("vm-create", "web")
    assert daemon.calls == [
        ("vm_create",
         {"name": "web", "image": "debian_12", "wait": "ready", "ssh_key": ["ssh-rsa AAAA me"]})
    ]  # fmt: skip
    assert "192.168.0.2" in done.stdout
    assert "Next: oscloudctl vm-ssh web\n" in done.stderr


def test_vm_create_passes_everything_on(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = VM
    key = ctl.home / "a key.pub"
    key.write_text("ssh-ed25519 AAAA 'quoted'\n")
    done = ctl(
        "vm-create", "web", "--image", "tiny", "--network", "lab", "--mem-size", "512M",
        "--disk-size", "20G", "--cpus", "4", "--ip", "192.168.9.9", "--ssh-key", str(key),
        "--ssh-key", "ssh-rsa BBBB", "--password", "-", "--user-data", str(key), "--wait",
        "started", "-q", input_text="se cret\n",
    )  # fmt: skip
    assert done.stdout == "1\n"
    assert done.stderr == ""
    assert daemon.params_of("vm_create") == [
        {"name": "web", "image": "tiny", "network": "lab", "mem_size": "512M", "disk_size": "20G",
         "cpus": 4, "ip": "192.168.9.9", "ssh_key": ["ssh-ed25519 AAAA 'quoted'", "ssh-rsa BBBB"],
         "password": "se cret", "user_data": "ssh-ed25519 AAAA 'quoted'\n", "wait": "started"}
    ]  # fmt: skip


def test_vm_create_makes_a_key_for_who_has_none_and_keeps_it(
    ctl: Oscloudctl, daemon: StubDaemon
) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "a", "-q")
    ctl("vm-create", "b", "-q")
    first, second = (params["ssh_key"] for params in daemon.params_of("vm_create"))
    assert first == second
    private = ctl.home / ".local/share/oscloud/id_ed25519"
    assert first == [private.with_name("id_ed25519.pub").read_text().strip()]
    assert private.stat().st_mode & 0o777 == 0o600


def test_vm_create_without_a_key(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "web", "--no-ssh-key")
    assert "ssh_key" not in daemon.params_of("vm_create")[0]
    assert not (ctl.home / ".local").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
        (b"hello", "no ssh public key"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_vm_create_refuses_what_is_no_public_key(
    ctl: Oscloudctl, daemon: StubDaemon, content: bytes | None, words: str
) -> None:
    path = ctl.home / "key"
    if content is not None:
        path.write_bytes(content)
    done = ctl("vm-create", "web", "--ssh-key", str(path), status=2)
    assert words in done.stderr
    assert "Hint: " in done.stderr
    assert daemon.calls == []


def test_progress_is_plain_lines_when_nobody_watches(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def create(call: Call) -> Any:
        call.progress("disk", "making the overlay")
        call.progress("booting", "kernel", 0.41)
        call.progress("booting", "kernel", 0.42)
        call.progress("booting", "evil \x1b[2J", 0.9)
        assert shown.wait(DEADLINE_SECONDS)
        call.progress("ready", "sshd")
        return VM

    shown = threading.Event()
    daemon.answers["vm_create"] = create
    with Running(daemon, ctl.home, "vm-create", "web", "--no-ssh-key") as running:
        stderr = running.see("90%") + "90%"
        shown.set()
        stderr += running.end()[2]
    assert "\x1b" not in stderr
    assert "\r" not in stderr
    assert [line.partition("] ")[2] for line in stderr.splitlines() if line.startswith("[")] == [
        "disk: making the overlay", "booting: kernel 41%", "booting: evil  [2J 90%",
        "ready: sshd",
    ]  # fmt: skip


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Screen])
def test_what_is_over_at_once_shows_no_progress(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    for limit in ("_QUICK_SECONDS", "_QUICK_PLAIN_SECONDS"):
        monkeypatch.setattr(progress, limit, DEADLINE_SECONDS * 1000)
    monkeypatch.setattr(sys, "stderr", written := stream())
    with progress.ProgressLine() as line:
        line.show({"job": 7, "stage": "stopping", "message": "the power button"})
        line.show({"job": 7, "stage": "off", "message": "", "fraction": "garbled"})
    assert written.getvalue() == ""


@pytest.mark.parametrize(
    ("command", "params"),
    [
        (("vm-start", "web"), {"vm": "web"}),
        (("vm-stop", "1"), {"vm": 1, "force": False, "timeout": 30}),
        (("vm-stop", "1", "--force", "--timeout", "5"), {"vm": 1, "force": True, "timeout": 5}),
        (("vm-restart", "web"), {"vm": "web", "force": False, "timeout": 30}),
        (("vm-pause", "web"), {"vm": "web"}),
        (("vm-resume", "web"), {"vm": "web"}),
        (("vm-suspend", "web"), {"vm": "web"}),
    ],
)
def test_power_commands(
    ctl: Oscloudctl, daemon: StubDaemon, command: tuple[str, ...], params: dict[str, Any]
) -> None:
    method = command[0].replace("-", "_")
    daemon.answers[method] = {**VM, "state": "SEEN"}
    assert ctl(*command).stdout == "web: SEEN\n"
    assert daemon.calls == [(method, params)]
    timeout = daemon.calls[0][1].get("timeout", 1)
    assert isinstance(timeout, int), "whole seconds are sent as whole numbers"
    assert json.loads(ctl(*command, "--json").stdout)["state"] == "SEEN"


SNAPSHOT = {"id": 1, "name": "a", "vm": "web", "description": "", "kind": "disk", "parent": None,
            "current": False, "size": 10 << 30, "allocated": 1 << 20, "created_at": 0}  # fmt: skip


def test_snapshots_are_a_tree(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    rows = [
        SNAPSHOT,
        {**SNAPSHOT, "name": "b", "parent": "a"},
        {**SNAPSHOT, "name": "d", "parent": "b", "current": True},
        {**SNAPSHOT, "name": "c", "parent": "a", "description": "before the upgrade"},
        {**SNAPSHOT, "name": "e"},
    ]
    daemon.answers["snapshot_list"] = rows
    lines = ctl("snapshot-list", "web").stdout.splitlines()
    assert [line[:8].rstrip() for line in lines] == [
        "NAME", "a", "└ b", "  └ d *", "└ c", "e"
    ]  # fmt: skip
    assert lines[4].endswith("before the upgrade")
    assert json.loads(ctl("snapshot-list", "web", "--json").stdout) == rows
    daemon.answers["snapshot_list"] = []
    assert "snapshot-create web NAME" in ctl("snapshot-list", "web").stderr


def test_snapshot_commands(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["snapshot_create"] = SNAPSHOT
    done = ctl("snapshot-create", "web", "a", "--description", "before")
    assert (done.stdout, "snapshot-restore web a" in done.stderr) == ("web: a\n", True)
    daemon.answers["snapshot_restore"] = VM
    assert ctl("snapshot-restore", "web", "a", "--force").stdout == "web: RUNNING\n"
    deleted = {"deleted": "a", "vm": "web", "kept": False}
    daemon.answers["snapshot_delete"] = deleted
    assert ctl("snapshot-delete", "1", "a").stderr == ""
    daemon.answers["snapshot_delete"] = {**deleted, "kept": True}
    done = ctl("snapshot-delete", "1", "a")
    assert (done.stdout, "Its contents stay" in done.stderr) == ("web: a deleted\n", True)
    assert daemon.calls[:3] == [
        ("snapshot_create", {"vm": "web", "name": "a", "description": "before", "memory": False}),
        ("snapshot_restore", {"vm": "web", "snapshot": "a", "force": True, "disk_only": False}),
        ("snapshot_delete", {"vm": 1, "snapshot": "a"}),
    ]
    daemon.answers["snapshot_delete"] = JOB
    assert "job-wait 7" in ctl("snapshot-delete", "web", "a", "--no-wait").stderr


def test_vm_clone_sends_only_what_is_said(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_clone"] = {**VM, "name": "copy"}
    done = ctl("vm-clone", "1", "copy")
    assert "vm-ssh copy" in done.stderr
    ctl("vm-clone", "web", "copy", "--snapshot", "a", "--cpus", "2", "--wait", "started")
    assert [params for _, params in daemon.calls] == [
        {"vm": 1, "name": "copy", "wait": "ready"},
        {"vm": "web", "name": "copy", "snapshot": "a", "cpus": 2, "wait": "started"},
    ]
    daemon.answers["vm_clone"] = JOB
    assert "job-wait 7" in ctl("vm-clone", "web", "copy", "--no-wait").stderr


def test_a_suspended_vm_says_how_it_goes_on(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    suspended = {**VM, "state": "SUSPENDED", "wanted_state": "STOPPED"}
    daemon.answers.update(vm_suspend=suspended, vm_list=[suspended], vm_info=suspended)
    done = ctl("vm-suspend", "web")
    assert (done.stdout, done.stderr) == (
        "web: SUSPENDED\n",
        "Resume it: oscloudctl vm-resume web\n",
    )
    assert json.loads(ctl("vm-suspend", "web", "--json").stdout)["state"] == "SUSPENDED"
    assert ctl("vm-list").stderr == ""  # it is as its user wants it
    assert "vm-resume web" in ctl("vm-ssh", "web", status=5).stderr
    daemon.answers["vm_resume"] = daemon.answers["vm_start"] = {**VM, "state": "RUNNING"}
    for command in ("vm-resume", "vm-start"):
        assert ctl(command, "--all").stdout == "web: RUNNING\n"


def test_goes_on_after_a_failure_and_keeps_the_first_status(
    ctl: Oscloudctl, daemon: StubDaemon
) -> None:
    def stop(call: Call) -> Any:
        if call.params["vm"] == 9:
            raise no_vm(9)
        if call.params["vm"] == "slow":
            raise OperationTimeoutError("too slow")
        return {**VM, "state": "STOPPED"}

    daemon.answers["vm_stop"] = stop
    done = ctl("vm-stop", "1", "9", "slow", "web", status=3)
    assert done.stdout == "web: STOPPED\nweb: STOPPED\n"
    assert done.stderr.startswith("Error: there is no vm 9\nHint: see: oscloudctl vm-list\n")
    assert "Error: too slow\n" in done.stderr
    assert [params["vm"] for params in daemon.params_of("vm_stop")] == [1, 9, "slow", "web"]


@pytest.mark.parametrize(
    ("command", "ids"), [("vm-stop", [1]), ("vm-start", [2]), ("vm-delete", [1, 2])]
)
def test_all_means_those_that_can(
    ctl: Oscloudctl, daemon: StubDaemon, command: str, ids: list[int]
) -> None:
    method = command.replace("-", "_")
    daemon.answers[method] = VM
    ctl(command, "--all")
    assert [params["vm"] for params in daemon.params_of(method)] == ids


@pytest.mark.parametrize("arguments", [("vm-stop",), ("vm-stop", "--all", "web"), ("vm-info",)])
def test_nothing_named_or_too_much(
    ctl: Oscloudctl, daemon: StubDaemon, arguments: tuple[str, ...]
) -> None:
    assert ctl(*arguments, status=2).stderr.startswith("Error: ")
    assert daemon.calls == []


def test_vm_delete_says_so(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_delete"] = {"deleted": 1, "name": "web"}
    assert ctl("vm-delete", "web").stdout == "web: deleted\n"
    assert json.loads(ctl("vm-delete", "web", "--json").stdout) == {"deleted": 1, "name": "web"}
    daemon.fail("vm_delete", InUseError("a clone stands on it"))
    assert ctl("vm-delete", "web", "-y", status=6).stdout == ""


def test_vm_rename(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_rename"] = {**VM, "name": "www"}
    assert ctl("vm-rename", "web", "www").stdout == "web is now www\n"
    assert daemon.calls == [("vm_rename", {"vm": "web", "name": "www"})]


def test_vm_wait(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_wait"] = VM
    assert ctl("vm-wait", "web").stdout == "web: ready\n"
    ctl("vm-wait", "1", "--state", "stopped", "--timeout", "0.5")
    assert ctl("vm-wait", "1", "--for", "port:80").stdout == "web: port:80\n"
    assert "exclude" in ctl("vm-wait", "1", "--for", "ssh", "--state", "ready", status=2).stderr
    assert daemon.calls == [
        ("vm_wait", {"vm": "web", "state": "ready", "timeout": 60}),
        ("vm_wait", {"vm": 1, "state": "STOPPED", "timeout": 0.5}),
        ("vm_wait", {"vm": 1, "for": "port:80", "timeout": 60}),
    ]


@pytest.mark.parametrize("method", ["template_build", "template_download"])
def test_making_templates(ctl: Oscloudctl, daemon: StubDaemon, method: str) -> None:
    job = ScriptedJob(daemon, method, TEMPLATE)
    with Running(daemon, ctl.home, method.replace("_", "-"), "tiny") as running:
        running.see("] tiny: booting: kernel")
        job.end.set()
        status, stdout, _ = running.end()
    assert status == 0
    assert stdout.splitlines()[1].split()[:4] == ["tiny", "READY", "30M", "2"]
    assert daemon.calls == [(method, {"template": "tiny"})]


# Inside


def test_vm_log(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_log"] = {"text": "one\x1b[1mtwo"}
    assert ctl("vm-log", "web").stdout == "one\x1b[1mtwo\n", "a pipe gets it as it is"
    ctl("vm-log", "web", "-n", "3", "--source", "qemu")
    assert daemon.calls == [
        ("vm_log", {"vm": "web", "source": "console", "lines": 100}),
        ("vm_log", {"vm": "web", "source": "qemu", "lines": 3}),
    ]
    ctl("vm-log", "web", "-f", "--source", "qemu", status=2)


def test_vm_qemu_command(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_qemu_command"] = {"status": "running"}
    assert json.loads(ctl("vm-qemu-command", "1", "query-status").stdout)["status"] == "running"
    ctl("vm-qemu-command", "1", "device_del", '{"id": "net0"}')
    assert daemon.calls == [
        ("vm_qemu_command", {"vm": 1, "command": "query-status", "arguments": {}}),
        ("vm_qemu_command", {"vm": 1, "command": "device_del", "arguments": {"id": "net0"}}),
    ]
    for bad in ("{", "[1]"):
        assert "no JSON object" in ctl("vm-qemu-command", "1", "x", bad, status=2).stderr


# The daemon and the program


def test_daemon_info(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    info = {"version": "0.1.0", "vms": {"RUNNING": 1}, "accelerator": "tcg", "uptime_seconds": 61}
    daemon.answers["daemon_info"] = info
    assert ctl("daemon-info").stdout.splitlines() == [
        "version         0.1.0", "vms             RUNNING=1", "accelerator     tcg",
        "uptime_seconds  1 min 1 s",
    ]  # fmt: skip
    assert json.loads(ctl("daemon-info", "--json").stdout) == info


def test_daemon_stop_guests(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["daemon_stop_guests"] = {"stopped": ["web", "shop"], "left": []}
    done = ctl("daemon-stop-guests", "--timeout", "5")
    assert done.stdout.splitlines() == ["web: STOPPED", "shop: STOPPED"]
    left = [{"name": "db", "reason": "it was not down after 20 s"}]
    daemon.answers["daemon_stop_guests"] = {"stopped": ["web"], "left": left}
    assert "db: it was not down" in ctl("daemon-stop-guests", status=10).stderr


def test_daemon_doctor(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    checks = [
        {"check": "qemu", "verdict": "ok", "message": "7.2", "hint": None},
        {"check": "accelerator", "verdict": "warning", "message": "tcg", "hint": "enable kvm"},
        {"check": "network", "verdict": "failure", "message": "no nft", "hint": "apt install"},
    ]
    daemon.answers["daemon_doctor"] = {"ok": True, "checks": checks[:2]}
    assert "enable kvm" in ctl("daemon-doctor").stdout
    daemon.answers["daemon_doctor"] = {"ok": False, "checks": checks}
    assert ctl("daemon-doctor", status=10).stdout.splitlines() == [
        "ok       qemu         7.2", "warning  accelerator  tcg", " " * 22 + "→ enable kvm",
        "FAILURE  network      no nft", " " * 22 + "→ apt install",
    ]  # fmt: skip
    assert json.loads(ctl("daemon-doctor", "--json", status=10).stdout)["ok"] is False


@pytest.mark.parametrize("kind", sorted(set(ERRORS_BY_KIND) - {"unreachable"}))
def test_the_exit_status_is_the_errors(ctl: Oscloudctl, daemon: StubDaemon, kind: str) -> None:
    error = ERRORS_BY_KIND[kind]("it failed", hint="do this")
    daemon.fail("vm_info", error)
    done = ctl("vm-info", "web", status=error.exit_status)
    assert done.stdout == ""
    assert done.stderr == "Error: it failed\nHint: do this\n"


def test_a_daemon_that_is_not_there_is_status_12(ctl: Oscloudctl, tmp_path: Path) -> None:
    socket = str(tmp_path / "none")
    for arguments in (("--socket", socket, "vm-list"), ("vm-list", "--socket", socket)):
        stderr = ctl(*arguments, status=12).stderr
        assert stderr.startswith(f"Error: there is no socket {socket}")
        assert "systemctl start oscloudd" in stderr


def test_the_socket_option_wins_over_the_environment(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    ctl("--socket", str(daemon.path), "vm-list", OSCLOUD_SOCKET="/none")
    ctl("vm-list", "--socket", str(daemon.path), OSCLOUD_SOCKET="/none")
    assert len(daemon.calls) == 2


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("list", "vm-list"), ("start", "vm-start"), ("shutdown", "vm-stop"),
        ("destroy", "vm-stop --force"), ("console", "vm-console"), ("launch", "vm-create"),
        ("shell", "vm-ssh"), ("vm_list", "vm-list"), ("vm-lst", "vm-list"),
        ("tempalte-build", "template-build"),
    ],
)  # fmt: skip
def test_an_unknown_command_finds_ours(ctl: Oscloudctl, word: str, meant: str) -> None:
    assert ctl(word, "x", status=2).stderr == (
        f"Error: there is no command '{word}'\nHint: did you mean: oscloudctl {meant}\n"
    )


def test_a_word_like_nothing_gets_the_list(ctl: Oscloudctl) -> None:
    assert "oscloudctl --help" in ctl("xyzzy", status=2).stderr


def test_wrong_options_are_status_2_with_where_to_read(ctl: Oscloudctl) -> None:
    stderr = ctl("vm-list", "--nope", status=2).stderr
    assert stderr.startswith("Error: ")
    assert "Hint: how it is used: oscloudctl vm-list --help" in stderr


def test_alone_it_shows_everything_by_kind(ctl: Oscloudctl) -> None:
    overview = ctl().stdout
    assert overview == ctl("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in overview
    assert overview.index("Virtual machines:") < overview.index("vm-list")
    assert "..." not in overview.partition("Options:")[2], "a summary was cut"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_command_says(name: str) -> None:
    entry = COMMANDS[name]
    command = getattr(import_module(f"oscloudctl.{entry.module}"), name.replace("-", "_"))
    assert isinstance(command, click.Command)
    assert command.name == name
    assert str(command.help).partition("\n")[0] == entry.summary


def test_version(ctl: Oscloudctl) -> None:
    assert ctl("version").stdout.startswith("oscloudctl ")
    assert ctl("--version").stdout == ctl("version").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(ctl: Oscloudctl, shell: str) -> None:
    assert "_OSCLOUDCTL_COMPLETE" in ctl("completion", shell).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("oscloudctl vm-st", ["vm-start", "vm-stop"]),
        ("oscloudctl vm-stop w", ["web"]),
        ("oscloudctl vm-stop 2", ["2"]),
        ("oscloudctl vm-create x --image t", ["tiny"]),
        ("oscloudctl network-info d", ["default"]),
    ],
)
def test_completes_commands_and_names(ctl: Oscloudctl, words: str, expected: list[str]) -> None:
    done = ctl(
        _OSCLOUDCTL_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == expected


def test_completes_the_snapshots_of_the_vm_that_was_named(
    ctl: Oscloudctl, daemon: StubDaemon
) -> None:
    daemon.answers["snapshot_list"] = [SNAPSHOT, {**SNAPSHOT, "id": 2, "name": "before"}]
    done = ctl(
        _OSCLOUDCTL_COMPLETE="bash_complete", COMP_WORDS="oscloudctl snapshot-delete web b",
        COMP_CWORD="3",
    )  # fmt: skip
    assert done.stdout.strip() == "plain,before"
    assert daemon.params_of("snapshot_list") == [{"vm": "web"}]


def test_completion_without_a_daemon_is_silent(ctl: Oscloudctl) -> None:
    done = ctl(
        _OSCLOUDCTL_COMPLETE="bash_complete", COMP_WORDS="oscloudctl vm-stop w", COMP_CWORD="2",
        OSCLOUD_SOCKET="/none",
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_fault_of_ours_is_70_and_no_traceback(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_log"] = {}
    stderr = ctl("vm-log", "web", status=70).stderr
    assert stderr.startswith("Error: oscloudctl failed: KeyError")
    assert "Traceback" not in stderr
    assert "Traceback" in ctl("vm-log", "web", status=1, OSCLOUD_DEBUG="1").stderr


def test_a_list_loads_only_what_it_needs(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    # A whole `vm-list` takes 46 ms, of which click is 24; asyncio alone would double it.
    heavy = {"asyncio", "starlette", "uvicorn", "subprocess", "msgspec", "ssl", "pexpect"}
    heavy |= {"oscloudctl.vm_create", "oscloudctl.disk", "importlib.metadata", "tempfile"}
    code = (
        "import sys; from oscloudctl.main import run; status = run(['vm-list']); "
        "print(*sys.modules, sep='\\n', file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=build_environment(daemon, ctl.home),
        capture_output=True, text=True, check=True, timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    loaded = set(done.stderr.splitlines())
    assert "oscloudctl.vm" in loaded
    assert loaded & heavy == set()


# Ports


def test_ports_are_forwarded_listed_and_deleted(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    done = ctl("port-add", "web", "8080:80", "0.0.0.0:81:81/udp")
    assert done.stdout == "127.0.0.1:8080/tcp leads to port 80 of web\n" * 2
    assert json.loads(ctl("port-add", "1", "8080:80", "--json").stdout) == PORT
    assert ctl("port-list", "web").stdout.splitlines() == [
        "NAME                VM   GUEST        GUEST_PORT",
        "127.0.0.1:8080/tcp  web  192.168.0.2  80",
    ]
    done = ctl("port-delete", "8080")
    assert done.stdout == "127.0.0.1:8080/tcp leads no longer to port 80 of web\n"
    assert daemon.calls == [
        ("port_add", {"vm": "web", "port": "8080:80"}),
        ("port_add", {"vm": "web", "port": "0.0.0.0:81:81/udp"}),
        ("port_add", {"vm": 1, "port": "8080:80"}),
        ("port_list", {"vm": "web"}),
        ("port_delete", {"port": "8080"}),
    ]


def test_ports_go_on_after_one_that_fails(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.fail("port_add", InUseError("port 127.0.0.1:8080/tcp is in use"))
    done = ctl("port-add", "web", "8080:80", "8081:80", status=6)
    assert done.stderr.count("is in use") == 2
    for command in (("port-add", "web"), ("port-delete",)):
        assert "which port?" in ctl(*command, status=2).stderr
    daemon.answers["port_list"] = []
    done = ctl("port-list")
    assert done.stdout == ""
    assert "oscloudctl port-add" in done.stderr


def test_a_vm_is_made_with_ports(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "web", "--publish", "8080:80", "--publish", "443:443")
    ctl("vm-create", "web")
    given = [params.get("publish") for method, params in daemon.calls if method == "vm_create"]
    assert given == [["8080:80", "443:443"], None]


def test_what_a_guest_says_in_an_error_drives_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = HostError("it said \x1b]0;title\x07\x1b[2Jno", hint="see \x1b[31mred")
    assert report(error) == error.exit_status
    assert capsys.readouterr().err == "Error: it said no\nHint: see red\n"
