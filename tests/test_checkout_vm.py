"""What `make up` and `make down` ask of a daemon, seen by a scripted one through the real CLI."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import ROOT, VM, StubDaemon

from oscloudd.errors import HostError, NotFoundError

sys.path.insert(0, str(ROOT / "packaging/checkout"))

import control  # the modules lie beside their commands, in no package
import down
import up
from stages import CheckoutError

MY_VM = {**VM, "name": "my_vm", "os": "debian_12", "ssh_host_keys": ["ssh-ed25519 AAAA root@my"]}
TEMPLATE = {
    "id": 1, "name": "debian_12", "description": "", "os": "Debian 12", "source": "build",
    "state": "READY", "size": 1, "digest": "", "built_at": "", "used_by": 0, "identity": "serial",
}  # fmt: skip


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "d.sock")
    monkeypatch.setattr(control, "SOCKET", stub.path)
    monkeypatch.setattr(control, "PROGRAM", Path(sys.executable).parent / "oscloudctl")
    monkeypatch.setattr(up, "KEY", tmp_path / "id_ed25519")
    monkeypatch.setattr(up, "KNOWN_HOSTS", tmp_path / "known_hosts")
    stub.answers["vm_info"] = MY_VM
    stub.answers["template_info"] = TEMPLATE
    yield stub
    stub.close()


def methods(daemon: StubDaemon) -> list[str]:
    return [method for method, _ in daemon.calls]


def with_no_vm_until_created(daemon: StubDaemon) -> None:
    daemon.fail("vm_info", NotFoundError('vm "my_vm" not found'))

    def create(_call: Any) -> dict[str, Any]:
        daemon.answers["vm_info"] = MY_VM
        return MY_VM

    daemon.answers["vm_create"] = create


def test_a_vm_that_is_ready_is_left_alone(daemon: StubDaemon) -> None:
    assert up.ensure_vm("my_vm", "") is False
    assert methods(daemon) == ["vm_info"]


def test_a_vm_is_made_with_the_checkouts_key(daemon: StubDaemon) -> None:
    assert up.ensure_key() is True
    assert up.ensure_key() is False
    with_no_vm_until_created(daemon)
    assert up.ensure_vm("my_vm", "") is True
    assert methods(daemon) == ["vm_info", "template_info", "vm_create"]
    [params] = daemon.params_of("vm_create")
    assert params["name"] == "my_vm"
    assert params["image"] == "debian_12"
    assert params["ssh_key"] == [up.KEY.with_suffix(".pub").read_text().strip()]
    assert params["wait"] == "ready"


@pytest.mark.parametrize(
    ("source", "method"), [("build", "template_build"), ("download", "template_download")]
)
def test_a_missing_template_is_made_first(daemon: StubDaemon, source: str, method: str) -> None:
    up.ensure_key()
    with_no_vm_until_created(daemon)
    daemon.answers["template_info"] = {**TEMPLATE, "state": "MISSING", "source": source}
    daemon.answers[method] = TEMPLATE
    assert up.ensure_vm("my_vm", "debian_12") is True
    assert methods(daemon) == ["vm_info", "template_info", method, "vm_create"]


def test_a_template_that_fails_to_build_ends_it(
    daemon: StubDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    with_no_vm_until_created(daemon)
    daemon.answers["template_info"] = {**TEMPLATE, "state": "MISSING"}
    daemon.fail("template_build", HostError("mmdebstrap failed", hint="see its log"))
    with pytest.raises(CheckoutError, match="template-build failed with status 10"):
        up.ensure_vm("my_vm", "")
    assert "Error: " in (shown := capfd.readouterr().err)
    assert "mmdebstrap failed" in shown
    assert "vm_create" not in methods(daemon)


def test_an_unknown_image_is_named(daemon: StubDaemon) -> None:
    with_no_vm_until_created(daemon)
    daemon.fail("template_info", NotFoundError('disk template "beos" not found'))
    with pytest.raises(CheckoutError, match="no template 'beos'"):
        up.ensure_vm("my_vm", "beos")


@pytest.mark.parametrize("state", ["STOPPED", "CRASHED", "ERROR"])
def test_a_vm_that_is_down_is_started(daemon: StubDaemon, state: str) -> None:
    daemon.answers |= {"vm_info": {**MY_VM, "state": state, "ready": False, "pid": None}}
    daemon.answers |= {"vm_start": MY_VM, "vm_wait": MY_VM}
    assert up.ensure_vm("my_vm", "") is True
    assert methods(daemon) == ["vm_info", "vm_start", "vm_wait"]


def test_a_vm_that_boots_is_waited_for(daemon: StubDaemon) -> None:
    daemon.answers |= {"vm_info": {**MY_VM, "ready": False}, "vm_wait": MY_VM}
    assert up.ensure_vm("my_vm", "") is True
    assert methods(daemon) == ["vm_info", "vm_wait"]


def test_a_paused_vm_stays_paused(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["vm_info"] = {**MY_VM, "state": "PAUSED"}
    assert up.ensure_vm("my_vm", "") is False
    assert "vm-resume my_vm" in capsys.readouterr().out


def test_a_daemon_that_is_gone_is_told_in_the_clients_words(daemon: StubDaemon) -> None:
    daemon.path.unlink()
    with pytest.raises(CheckoutError, match="there is no socket") as caught:
        up.ensure_vm("my_vm", "")
    assert caught.value.hint


def test_what_is_printed_can_be_typed(
    daemon: StubDaemon, capfd: pytest.CaptureFixture[str]
) -> None:
    up.write_known_hosts(MY_VM)
    assert up.KNOWN_HOSTS.read_text() == "192.168.0.2 ssh-ed25519 AAAA\n"
    up.show(MY_VM, "lab", {"guest": {"root_password": ""}})
    printed = capfd.readouterr().out
    assert "Log in (the key only):" in printed
    assert (
        "\n    ip netns exec lab ssh -i .run/id_ed25519"
        " -o UserKnownHostsFile=.run/known_hosts root@192.168.0.2\n"
    ) in printed
    up.show(MY_VM, "", {})
    assert "Log in (or with the password 123456):\n    ssh -i" in capfd.readouterr().out
    assert methods(daemon) == ["vm_info", "vm_info"]


def test_down_stops_only_what_runs(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = {**MY_VM, "state": "STOPPED", "pid": None}
    daemon.answers |= {"vm_list": [stopped], "vm_stop": stopped}
    down.stop_vms()
    assert "No vm runs" in capsys.readouterr().out
    assert "vm_stop" not in methods(daemon)
    daemon.answers["vm_list"] = [MY_VM]
    down.stop_vms()
    assert "vm_stop" in methods(daemon)


def test_a_vm_that_does_not_stop_ends_down(daemon: StubDaemon) -> None:
    daemon.answers["vm_list"] = [MY_VM]
    daemon.fail("vm_stop", HostError("qemu does not answer"))
    with pytest.raises(CheckoutError, match="vm-stop failed with status 10"):
        down.stop_vms()
