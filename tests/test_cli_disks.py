"""The commands for disks on a scripted daemon: what is sent, and what is said."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_daemon import Call, Oscloudctl, StubDaemon

from oscloudd.errors import InUseError

DISK = {
    "id": 4, "name": "data", "size": 20 << 30, "format": "qcow2", "template": None, "vm": "web",
    "role": "data", "slot": 1, "serial": "data", "kept": True, "allocated": 200 << 10,
    "created_at": 0, "path": "/d",
}  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    daemon = StubDaemon(tmp_path / "sock")
    for verb in ("create", "attach", "detach", "resize"):
        daemon.answers[f"disk_{verb}"] = DISK
    daemon.answers["disk_delete"] = {"deleted": 4, "name": "data"}
    yield daemon
    daemon.close()


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    return Oscloudctl(daemon, tmp_path)


def test_disk_create(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    made = ctl("disk-create", "data", "--size", "20G")
    assert made.stdout == "data: made, 20G\n"
    assert made.stderr.startswith("Next: oscloudctl disk-attach VM data\n")
    on_template = ctl("disk-create", "data", "--template", "tiny")
    assert "vm-create NAME --disk data" in on_template.stderr
    assert ctl("disk-create", "data", "--size", "1G", "-q").stdout == "4\n"
    assert "--template" in ctl("disk-create", "data", status=2).stderr
    assert daemon.params_of("disk_create") == [
        {"name": "data", "size": "20G"}, {"name": "data", "template": "tiny"},
        {"name": "data", "size": "1G"},
    ]  # fmt: skip


def test_a_disk_and_a_vm(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    assert ctl("disk-attach", "web", "4").stdout == "data: attached to web as virtio-data\n"
    assert ctl("disk-detach", "2", "data").stdout == "data: detached from 2\n"
    assert json.loads(ctl("disk-detach", "2", "data", "--json").stdout) == DISK
    assert daemon.params_of("disk_attach") == [{"vm": "web", "disk": 4}]
    assert daemon.params_of("disk_detach") == [{"vm": 2, "disk": "data"}] * 2


def test_disk_resize(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    assert ctl("disk-resize", "data", "20G").stdout == "data: has 20G\n"
    assert daemon.params_of("disk_resize") == [{"disk": "data", "size": "20G"}]


def test_disk_delete_goes_on_after_a_failure(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    assert ctl("disk-delete", "data", "5").stdout == "data: deleted\ndata: deleted\n"
    assert daemon.params_of("disk_delete") == [{"disk": "data"}, {"disk": 5}]

    def refuse(_call: Call) -> Any:
        raise InUseError("disk 'data' is in use", hint="detach it")

    daemon.answers["disk_delete"] = refuse
    assert "detach it" in ctl("disk-delete", "data", status=6).stderr
    assert "which disk" in ctl("disk-delete", status=2).stderr


def test_a_vm_is_made_on_a_disk(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    vm = {"id": 1, "name": "web", "state": "RUNNING"}
    daemon.answers["vm_create"] = vm
    ctl("vm-create", "web", "--no-ssh-key", "--disk", "4")
    ctl("vm-create", "web", "--no-ssh-key")
    on_disk, on_image = daemon.params_of("vm_create")
    assert (on_disk.get("disk"), on_disk.get("image")) == (4, None)
    assert (on_image.get("disk"), on_image.get("image")) == (None, "debian_12")


def test_vm_set_of_what_a_vm_is(ctl: Oscloudctl, daemon: StubDaemon) -> None:
    daemon.answers["vm_set"] = {
        "id": 1, "name": "blog", "cpus": 2, "mem_size": 2 << 30, "protect": True,
        "autostart": "no", "restart": "no",
    }  # fmt: skip
    options = ("--cpus", "2", "--mem-size", "2G", "--protect", "yes", "--name", "blog")
    said = ctl("vm-set", "web", *options).stdout
    assert said == "blog: cpus 2, memory 2G, protected yes, autostart no, restart no\n"
    ctl("vm-set", "web", "--protect", "no")
    assert daemon.params_of("vm_set") == [
        {"vm": "web", "cpus": 2, "mem_size": "2G", "protect": True, "name": "blog"},
        {"vm": "web", "protect": False},
    ]
    assert "one vm" in ctl("vm-set", "web", "db", "--name", "blog", status=2).stderr
