"""The commands of network cards on a scripted daemon: what is sent, and what is said."""

import json
from pathlib import Path

import pytest
from stub_daemon import Oscloudctl, StubDaemon

VM = {
    "id": 1, "name": "web",
    "nics": [
        {"slot": 0, "network": "default", "ip": "192.168.0.2", "mac": "52:54:00:00:00:01"},
        {"slot": 1, "network": "lab", "ip": "10.20.0.2", "mac": "52:54:00:00:00:02"},
    ],
}  # fmt: skip


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    home = tmp_path / "home"
    home.mkdir()
    return Oscloudctl(daemon, home)


def test_adding_and_deleting_a_card(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["nic_add"] = daemon.answers["nic_delete"] = VM
    said = "web has cards in: default (192.168.0.2), lab (10.20.0.2)\n"
    assert ctl("nic-add", "web", "lab").stdout == said
    assert ctl("nic-add", "1", "7", "--ip", "10.20.0.9", "-q").stdout == "1\n"
    assert ctl("nic-delete", "web", "lab").stdout == said
    assert json.loads(ctl("nic-delete", "web", "1", "--json").stdout) == VM
    assert daemon.params_of("nic_add") == [
        {"vm": "web", "network": "lab"},
        {"vm": 1, "network": 7, "ip": "10.20.0.9"},
    ]
    assert daemon.params_of("nic_delete") == [
        {"vm": "web", "nic": "lab"},
        {"vm": "web", "nic": 1},
    ]
    for missing in (("nic-add", "web"), ("nic-delete", "web")):
        assert "Missing argument" in ctl(*missing, status=2).stderr


def test_a_vm_is_made_with_several_cards(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "web", "--no-ssh-key", "-q", "--network", "7")
    ctl("vm-create", "web", "--no-ssh-key", "-q", "--network", "default", "--network",
        "lab,ip=10.20.0.9")  # fmt: skip
    networks = [params["network"] for params in daemon.params_of("vm_create")]
    assert networks == [7, ["default", "lab,ip=10.20.0.9"]]


def test_a_vm_is_given_all_its_cards(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_set"] = VM | {"cpus": 2, "autostart": "no", "restart": "no"}
    cards = "cards in: default (192.168.0.2), lab (10.20.0.2)"
    given = ("--network", "default", "--network", "lab,ip=10.20.0.2")
    said = ctl("vm-set", "web", *given, "--cpus", "2").stdout
    assert said == f"web: cpus 2, autostart no, restart no, {cards}\n"
    assert ctl("vm-set", "web", "--network", "7", "-q").stdout == "1\n"
    assert daemon.params_of("vm_set") == [
        {"vm": "web", "network": ["default", "lab,ip=10.20.0.2"], "cpus": 2},
        {"vm": "web", "network": 7},
    ]


def test_vm_info_shows_a_card_a_line(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_info"] = VM
    lines = ctl("vm-info", "web").stdout.splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == [
        "mac=52:54:00:00:00:01",
        "mac=52:54:00:00:00:02",
    ]
