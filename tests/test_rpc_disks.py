"""Disks as things of their own through the socket of a real daemon, whose qemu runs no machine."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from daemon_process import IMAGE, Box, RpcError
from test_rpc_policies import reboot

from oscloudd.host.images import virtual_size_bytes
from oscloudd.machine.arguments import PORTS

MIB = 1 << 20
WRITTEN = b"what was on the disk before"


def path_of(box: Box, disk: dict[str, Any]) -> Any:
    return box.root / "state" / "disks" / str(disk["id"]) / "disk.qcow2"


def plugged(box: Box, vm: str) -> list[str]:
    """Give the slots that qemu itself has disks in."""
    found = box.call(
        "vm_qemu_command", vm=vm, command="qom-list", arguments={"path": "/machine/peripheral"}
    )
    return sorted(each["name"] for each in found if each["name"].startswith("data"))


def refused(box: Box, kind: str, method: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as error:
        box.call(method, **params)
    assert error.value.kind == kind, error.value
    return error.value


def test_a_disk_lives_from_create_to_delete(box: Box) -> None:
    empty = box.call("disk_create", name="data", size="16M")
    assert empty.items() >= {
        "name": "data", "size": 16 * MIB, "format": "qcow2", "template": None, "vm": None,
        "role": None, "slot": None, "serial": "data", "kept": True,
    }.items()  # fmt: skip
    assert 0 < empty["allocated"] < MIB
    assert virtual_size_bytes(path_of(box, empty), "qcow2") == 16 * MIB
    on_template = box.call("disk_create", name="root", template=IMAGE)
    assert (on_template["size"], on_template["template"]) == (MIB, IMAGE)
    larger = box.call("disk_create", name="larger", template=IMAGE, size="8M")
    assert virtual_size_bytes(path_of(box, larger), "qcow2") == 8 * MIB
    assert [disk["name"] for disk in box.call("disk_list")] == ["data", "root", "larger"]
    assert box.rows("SELECT kind, state FROM job") == [("disk_create", "DONE")] * 3
    in_use = refused(box, "in_use", "template_delete", template=IMAGE)
    assert in_use.data["disks"] == ["root", "larger"]

    assert box.call("disk_delete", disk="data") == {"deleted": empty["id"], "name": "data"}
    assert not path_of(box, empty).parent.exists()
    refused(box, "not_found", "disk_delete", disk="data")
    box.call("disk_delete", disk=on_template["id"])
    box.call("disk_delete", disk="larger")
    assert box.traces() == {}
    told = box.rows("SELECT name, data FROM event WHERE kind = 'disk' ORDER BY id")
    assert told[0] == ("data", f'{{"change":"deleted","size":{16 * MIB}}}')


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("invalid_argument", {"name": "data"}),
        ("invalid_argument", {"name": "data", "size": "0"}),
        ("invalid_argument", {"name": "data", "size": "1000"}),
        ("invalid_argument", {"name": "data", "size": "65T"}),
        ("invalid_argument", {"name": "7", "size": "1M"}),
        ("invalid_argument", {"name": "data", "template": IMAGE, "size": "512K"}),
        ("invalid_argument", {"name": "data", "size": "1M", "vm": "web"}),
        ("not_found", {"name": "data", "template": "nowhere"}),
        ("already_exists", {"name": "there", "size": "1M"}),
    ],
)
def test_a_disk_that_can_not_be_leaves_nothing(box: Box, kind: str, params: dict[str, Any]) -> None:
    box.call("disk_create", name="there", size="1M")
    before = box.traces()
    refused(box, kind, "disk_create", **params)
    assert box.traces() == before


def test_a_disk_that_can_not_be_written_leaves_nothing(box: Box) -> None:
    first = box.call("disk_create", name="first", size="1M")
    in_the_way = path_of(box, first).parent.with_name(str(first["id"] + 1))
    (in_the_way / "disk.qcow2").mkdir(parents=True)
    refused(box, "host_failure", "disk_create", name="data", size="1M")
    assert [disk["name"] for disk in box.call("disk_list")] == ["first"]
    assert not in_the_way.exists()
    box.call("disk_create", name="data", size="1M")


def test_a_disk_is_plugged_into_a_running_vm_and_out_again(box: Box) -> None:
    box.create("web")
    box.call("disk_create", name="data", size="16M")
    box.call("disk_create", name="more", template=IMAGE, size="16M")
    attached = box.call("disk_attach", vm="web", disk="data")
    assert (attached["vm"], attached["role"], attached["slot"]) == ("web", "data", 1)
    assert box.call("disk_attach", vm="web", disk="data") == attached
    assert box.call("disk_attach", vm="web", disk="more")["slot"] == 2
    assert plugged(box, "web") == ["data1-device", "data2-device"]
    in_use = refused(box, "in_use", "disk_delete", disk="data")
    assert "'web'" in in_use.message
    assert in_use.data["hint"].endswith("disk-detach web data")

    box.call("vm_restart", vm="web")
    assert plugged(box, "web") == ["data1-device", "data2-device"]
    assert box.call("disk_detach", vm="web", disk="data")["vm"] is None
    assert plugged(box, "web") == ["data2-device"]
    refused(box, "invalid_state", "disk_detach", vm="web", disk="data")
    # Its files are closed, or this would be refused as a second user of them.
    assert box.call("disk_attach", vm="web", disk="data")["slot"] == 1
    box.call("vm_delete", vm="web")
    left = {disk["name"]: (disk["vm"], disk["slot"]) for disk in box.call("disk_list")}
    assert left == {"data": (None, None), "more": (None, None)}


def test_a_vm_that_is_down_has_its_disks_when_it_starts(box: Box) -> None:
    box.create("web")
    box.call("vm_stop", vm="web")
    for name in ("one", "two"):
        box.call("disk_create", name=name, size="1M")
        box.call("disk_attach", vm="web", disk=name)
    box.call("disk_detach", vm="web", disk="one")
    box.call("vm_start", vm="web")
    assert plugged(box, "web") == ["data2-device"]


def test_a_vm_takes_so_many_disks_and_no_more(box: Box) -> None:
    box.create("web")
    for number in range(PORTS + 1):
        box.call("disk_create", name=f"data-{number}", size="1M")
    for number in range(PORTS):
        box.call("disk_attach", vm="web", disk=f"data-{number}")
    full = refused(box, "exhausted", "disk_attach", vm="web", disk=f"data-{PORTS}")
    assert full.data["resource"] == "slot"
    assert len(plugged(box, "web")) == PORTS


def test_a_disk_is_one_vms(box: Box) -> None:
    web, _shop = box.create("web"), box.create("shop")
    box.call("disk_create", name="data", size="1M")
    box.call("disk_attach", vm="web", disk="data")
    assert "'web'" in refused(box, "in_use", "disk_attach", vm="shop", disk="data").message
    refused(box, "in_use", "disk_attach", vm="shop", disk=web["disk"])
    refused(box, "in_use", "disk_delete", disk=web["disk"])
    root = refused(box, "invalid_state", "disk_detach", vm="web", disk=web["disk"])
    assert "root disk" in root.message


def test_a_disk_that_qemu_does_not_take_is_no_vms(box: Box) -> None:
    box.create("web-disk_fails")
    box.call("disk_create", name="data", size="1M")
    refused(box, "host_failure", "disk_attach", vm="web-disk_fails", disk="data")
    assert box.call("disk_info", disk="data")["vm"] is None
    assert plugged(box, "web-disk_fails") == []
    box.call("disk_delete", disk="data")


def test_a_guest_that_does_not_let_go_keeps_its_disk(box: Box) -> None:
    box.create("web-keeps_disks")
    box.call("disk_create", name="data", size="1M")
    box.call("disk_attach", vm="web-keeps_disks", disk="data")
    jobs: list[int] = []

    def cancel(progress: dict[str, Any]) -> None:
        if progress["stage"] == "unplugging" and not jobs:
            jobs.append(progress["job"])
            box.call("job_cancel", job=progress["job"])

    with pytest.raises(RpcError) as cancelled:
        box.call("disk_detach", cancel, vm="web-keeps_disks", disk="data")
    assert cancelled.value.kind == "cancelled"
    assert box.call("disk_info", disk="data")["vm"] == "web-keeps_disks"
    assert plugged(box, "web-keeps_disks") == ["data1-device"]


def test_states_in_which_disks_stay_as_they_are(box: Box) -> None:
    box.create("web")
    box.wait("web", "RUNNING")
    box.call("disk_create", name="data", size="1M")
    box.call("vm_pause", vm="web")
    box.call("disk_attach", vm="web", disk="data")
    refused(box, "invalid_state", "disk_detach", vm="web", disk="data")
    box.call("vm_resume", vm="web")
    box.rows("UPDATE vm SET identified = 1")
    box.call("vm_suspend", vm="web")
    root = box.call("vm_info", vm="web")["disk"]
    for method, params in (
        ("disk_detach", {"vm": "web", "disk": "data"}),
        ("disk_resize", {"disk": "data", "size": "2M"}),
        ("disk_resize", {"disk": root, "size": "1G"}),
        ("vm_set", {"vm": "web", "cpus": 2}),
    ):
        assert "vm-resume" in refused(box, "invalid_state", method, **params).data["hint"]
    box.call("vm_resume", vm="web")
    assert plugged(box, "web") == ["data1-device"]


def test_a_disk_grows_and_never_shrinks(box: Box) -> None:
    web = box.create("web")
    root = box.call("disk_info", disk=web["disk"])
    data = box.call("disk_create", name="data", size="1M")
    assert box.call("disk_resize", disk="data", size="2M")["size"] == 2 * MIB
    box.call("disk_attach", vm="web", disk="data")
    assert virtual_size_bytes(path_of(box, data), "qcow2") == 2 * MIB
    box.call("disk_resize", disk="data", size="4M")
    box.call("disk_resize", disk=root["id"], size="32M")
    assert virtual_size_bytes(path_of(box, data), "qcow2") == 4 * MIB
    assert virtual_size_bytes(path_of(box, root), "qcow2") == 32 * MIB
    assert box.call("vm_info", vm="web")["disk_size"] == 32 * MIB
    smaller = refused(box, "invalid_argument", "disk_resize", disk="data", size="2M")
    assert "smaller" in smaller.message
    refused(box, "invalid_argument", "disk_resize", disk="data", size=4 * MIB + 1)
    refused(box, "not_found", "disk_resize", disk="nowhere", size="1G")

    box.call("vm_stop", vm="web", force=True)
    box.call("disk_resize", disk="data", size="8M")
    box.call("disk_resize", disk=root["id"], size="64M")
    box.call("vm_start", vm="web")
    assert virtual_size_bytes(path_of(box, data), "qcow2") == 8 * MIB
    assert virtual_size_bytes(path_of(box, root), "qcow2") == 64 * MIB


def test_a_vm_begins_on_a_disk_that_there_is(box: Box) -> None:
    disk = box.call("disk_create", name="root", template=IMAGE, size="16M")
    # Behind what qemu-img has written, where only a guest can have.
    with path_of(box, disk).open("ab") as file:
        file.write(WRITTEN)
    silent = {"name": "web-identity_silent", "mem_size": "64M", "wait": "started"}
    web = box.call("vm_create", disk="root", **silent)
    assert (web["disk"], web["disk_size"], web["os"]) == (disk["id"], 16 * MIB, IMAGE)
    assert (web["started"], web["state"]) == ("cold", "RUNNING")
    assert WRITTEN in path_of(box, disk).read_bytes()
    shown = box.call("disk_info", disk="root")
    assert (shown["vm"], shown["role"], shown["slot"], shown["serial"]) == (
        "web-identity_silent", "root", None, None,
    )  # fmt: skip
    refused(box, "in_use", "vm_create", name="shop", disk="root", mem_size="64M")
    box.call("vm_delete", vm=web["id"], force=True)
    assert box.call("disk_info", disk="root")["vm"] is None
    assert os.listdir(path_of(box, disk).parent) == ["disk.qcow2"]
    # Nobody was told who it is: the next vm can begin on it.
    box.call("vm_create", name="shop", disk="root", mem_size="64M", wait="started")
    told = "SELECT 1 FROM vm WHERE identified = 1"
    box.until(lambda: bool(box.rows(told)), "the guest being told who it is")
    box.call("vm_delete", vm="shop", force=True)
    taken = refused(box, "invalid_state", "vm_create", name="web", disk="root", mem_size="64M")
    assert "identity" in taken.message


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("not_found", {"disk": "nowhere"}),
        ("invalid_state", {"disk": "empty"}),
        ("invalid_argument", {"disk": "root", "disk_size": "1G"}),
        ("invalid_argument", {"disk": "root", "image": IMAGE}),
        ("invalid_argument", {"disk": "root", "warm": "only"}),
        ("in_use", {"disk": "taken"}),
    ],
)
def test_a_vm_does_not_begin_on_just_any_disk(box: Box, kind: str, params: dict[str, Any]) -> None:
    box.create("shop")
    for name, given in (("empty", {"size": "1M"}), ("root", {"template": IMAGE})):
        box.call("disk_create", name=name, **given)
    box.call("disk_create", name="taken", template=IMAGE)
    box.call("disk_attach", vm="shop", disk="taken")
    before = box.traces()
    refused(box, kind, "vm_create", name="web", mem_size="64M", **params)
    assert box.traces() == before


def test_a_create_that_fails_leaves_the_disk(box: Box) -> None:
    box.call("disk_create", name="root", template=IMAGE)
    refused(box, "host_failure", "vm_create", name="web-exit_at_start", disk="root", mem_size="64M")
    disk = box.call("disk_info", disk="root")
    assert disk["vm"] is None
    assert path_of(box, disk).exists()


def test_disks_are_there_under_another_daemon(box: Box) -> None:
    box.create("web")
    box.call("disk_create", name="data", size="1M")
    box.call("disk_attach", vm="web", disk="data")
    box.end(signal.SIGKILL)
    box.start()
    assert plugged(box, "web") == ["data1-device"]
    box.call("disk_detach", vm="web", disk="data")
    assert plugged(box, "web") == []


def kill_all(box: Box) -> None:
    box.end(signal.SIGKILL)
    for pid in box.qemus():
        os.kill(pid, signal.SIGKILL)
    box.start()


@pytest.mark.parametrize(
    ("end", "policy"), [(kill_all, {"restart": "always"}), (reboot, {"autostart": "yes"})]
)
def test_a_detach_is_done_when_qemu_and_daemon_end_in_it(
    box: Box, end: Callable[[Box], None], policy: dict[str, str]
) -> None:
    vm = box.create("web-keeps_disks", **policy)
    box.call("disk_create", name="data", size="1M")
    box.call("disk_attach", vm="web-keeps_disks", disk="data")
    jobs: list[int] = []

    def die(progress: dict[str, Any]) -> None:
        if progress["stage"] == "unplugging" and not jobs:
            jobs.append(progress["job"])
            end(box)

    with pytest.raises((AssertionError, ConnectionError)):
        box.call("disk_detach", die, vm="web-keeps_disks", disk="data")
    assert box.call("job_wait", job=jobs[0])["state"] == "DONE"
    assert box.call("disk_info", disk="data")["vm"] is None
    # That its qemu has ended is seen all the same, and the vm is started as its user wants it.
    box.until(lambda: box.call("vm_info", vm=vm["id"])["pid"] not in (None, vm["pid"]), "a start")
    assert plugged(box, "web-keeps_disks") == []


def test_what_a_vm_is_can_be_changed_while_it_is_off(box: Box) -> None:
    box.create("web")
    box.create("shop")
    running = refused(box, "invalid_state", "vm_set", vm="web", cpus=2, autostart="yes")
    assert running.data["hint"].endswith("vm-stop web")
    assert box.call("vm_info", vm="web")["autostart"] == "no"
    box.call("vm_stop", vm="web", force=True)
    changed = box.call("vm_set", vm="web", cpus=2, mem_size="128M", name="blog", protect=True)
    assert changed.items() >= {
        "name": "blog", "cpus": 2, "mem_size": 128 * MIB, "protect": True, "autostart": "no",
    }.items()  # fmt: skip
    for kind, params in (
        ("invalid_argument", {"mem_size": "32M"}),
        ("invalid_argument", {"cpus": 0}),
        ("invalid_argument", {"name": "7"}),
        ("invalid_argument", {}),
        ("exhausted", {"mem_size": "100T", "cpus": 4}),
        ("already_exists", {"name": "shop", "cpus": 4}),
    ):
        refused(box, kind, "vm_set", vm="blog", **params)
    # Only vm_info tells what its card has sent, too.
    assert box.call("vm_info", vm="blog") == {**changed, "nic": None}
    box.call("vm_start", vm="blog")
    argv = (box.root / f"../../proc/{box.call('vm_info', vm='blog')['pid']}/cmdline").resolve()
    assert b"size=128M" in argv.read_bytes().split(b"\0")


def test_a_protected_vm_stays(box: Box) -> None:
    box.create("web")
    assert not box.call("vm_info", vm="web")["protect"]
    box.call("vm_set", vm="web", protect=True)
    for force in (False, True):
        kept = refused(box, "invalid_state", "vm_delete", vm="web", force=force)
        assert kept.data["hint"].endswith("vm-set --protect no web")
    assert box.call("vm_info", vm="web")["state"] == "RUNNING"
    box.call("vm_set", vm="web", protect=False)
    box.call("vm_delete", vm="web", force=True)
