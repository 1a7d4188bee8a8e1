"""vm-import, vm-export and vm-publish on a scripted daemon: what is asked for, and what is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import HANG_UP, JOB, VM, Call, Oscloudctl, StubDaemon
from test_cli_exports import CONTENT, Giver

from oscloudd.errors import CloudError, InUseError

STOPPED = {**VM, "state": "STOPPED", "reason": "imported", "ready": False}


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    (tmp_path / "web.oscloud").write_bytes(CONTENT)
    return Oscloudctl(daemon, tmp_path)


class Taker:
    """Answers vm_import: asks for the file, takes it whole, and says how it went."""

    def __init__(self, daemon: StubDaemon, error: CloudError | None = None) -> None:
        self.content = b""
        self._error = error
        daemon.answers["vm_import"] = self._take

    def _take(self, call: Call) -> Any:
        call.send({"jsonrpc": "2.0", "method": "send", "params": {"size": call.params["size"]}})
        while len(self.content) < call.params["size"]:
            self.content += call.stream.recv(1 << 16)
        if self._error is not None:
            raise self._error
        call.send({"jsonrpc": "2.0", "id": call.id, "result": STOPPED})
        return HANG_UP


def test_a_file_becomes_a_vm(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    taker = Taker(daemon)
    done = ctl("vm-import", "web.oscloud")
    assert taker.content == CONTENT
    assert daemon.calls == [
        ("vm_import", {"size": len(CONTENT), "file_name": "web.oscloud"}),
    ]
    assert done.stdout.splitlines()[1].split()[:3] == ["1", "web", "STOPPED"]
    assert done.stderr.splitlines()[-1] == "Next: oscloudctl vm-start web"
    for arguments, given in (
        (("--name", "blog"), {"name": "blog"}),
        (("--network", "7"), {"network": 7}),
        (("--network", "lab"), {"network": "lab"}),
    ):
        Taker(daemon)
        assert ctl("vm-import", "web.oscloud", *arguments, "-q").stdout == "1\n"
        assert given.items() <= daemon.calls[-1][1].items()
    Taker(daemon)
    assert json.loads(ctl("vm-import", "web.oscloud", "--json").stdout) == STOPPED


def test_why_it_is_refused_is_said(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    Taker(daemon, InUseError("ip 192.168.0.2 belongs to another vm", hint="its guest has it"))
    done = ctl("vm-import", "web.oscloud", status=6)
    assert done.stderr.splitlines()[-1] == "Hint: its guest has it"
    assert "No such file" in ctl("vm-import", "none", status=2).stderr


def test_a_vm_becomes_a_file(ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path) -> None:
    Giver(daemon, "vm_export")
    done = ctl("vm-export", "web", "my web", "--force")
    assert (tmp_path / "my web").read_bytes() == CONTENT
    assert daemon.calls == [("vm_export", {"vm": "web"})]
    assert done.stdout.startswith("my web: 512K, SHA256 ")
    assert done.stderr.splitlines()[-1] == "Next: oscloudctl vm-import 'my web'"


def test_who_it_is_to_be_is_asked_for(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    Taker(daemon)
    ctl("vm-import", "web.oscloud", "--new-identity", "--name", "twin")
    assert daemon.calls[0][1]["new_identity"] is True


def test_a_vm_becomes_a_template(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    template = {"name": "mine", "state": "READY", "source": "publish", "used_by": 0}
    daemon.answers["vm_publish"] = template
    done = ctl("vm-publish", "web", "mine")
    assert done.stdout.splitlines()[1].split()[:2] == ["mine", "READY"]
    assert done.stderr.splitlines()[-1] == "Next: oscloudctl vm-create NAME --image mine"
    assert ctl("vm-publish", "7", "mine", "-q").stdout == "mine\n"
    daemon.answers["vm_publish"] = {**JOB, "kind": "template_publish", "target": "mine"}
    assert "begun" in ctl("vm-publish", "web", "mine", "--no-wait").stdout
    assert [params for _method, params in daemon.calls] == [
        {"vm": "web", "template": "mine"},
        {"vm": 7, "template": "mine"},
        {"vm": "web", "template": "mine", "wait": False},
    ]
