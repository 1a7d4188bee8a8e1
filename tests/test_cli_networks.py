"""The network commands on a scripted daemon: what is sent, and what is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import Call, Oscloudctl, StubDaemon

from oscloudd.errors import InUseError

LAB = {"id": 2, "name": "lab", "subnet": "10.20.0.0/24", "isolated": True, "nat": True}


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    home = tmp_path / "home"
    home.mkdir()
    return Oscloudctl(daemon, home)


def test_making_a_network(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["network_create"] = LAB
    done = ctl("network-create", "lab")
    assert "10.20.0.0/24" in done.stdout
    assert done.stderr == "Next: oscloudctl vm-create NAME --network lab\n"
    ctl("network-create", "lab", "--subnet", "10.20.0.0/24", "--isolated", "--dns", "9.9.9.9",
        "--dns", "1.1.1.1")  # fmt: skip
    assert json.loads(ctl("network-create", "lab", "--no-nat", "--json").stdout) == LAB
    assert ctl("network-create", "lab", "-q").stdout == "2\n"
    ctl("network-create", "lab", "--subnet6", "none")
    assert daemon.params_of("network_create")[-1] == {"name": "lab", "subnet6": "none"}
    assert daemon.params_of("network_create")[:3] == [
        {"name": "lab"},
        {
            "name": "lab", "subnet": "10.20.0.0/24", "isolated": True, "dns": ["9.9.9.9", "1.1.1.1"]
        },
        {"name": "lab", "nat": False},
    ]  # fmt: skip


def test_deleting_goes_on_after_a_failure(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    def delete(call: Call) -> Any:
        if call.params["network"] == "used":
            raise InUseError("network 'used' is in use by web", vms=["web"])
        return {"id": 2, "name": call.params["network"]}

    daemon.answers["network_delete"] = delete
    done = ctl("network-delete", "a", "used", "b", status=6)
    assert done.stdout == "a: deleted\nb: deleted\n"
    assert done.stderr == "Error: network 'used' is in use by web\n"
    assert "which network" in ctl("network-delete", status=2).stderr
