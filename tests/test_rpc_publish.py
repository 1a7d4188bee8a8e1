"""Vms that become templates, over the socket; and a daemon killed in it."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import settle
from daemon_process import IMAGE, Box, RpcError
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import ask_to_die, count_deaths, wait_for_death
from test_rpc_exports import export, stopped, write
from test_rpc_templates import GOOD, last_job, send, small_disk
from test_rpc_vm_copies import build, take, without_kernel

DATA = b"written by the guest".ljust(1 << 16, b".")
KERNEL = b"kernel" * 99
WHOLE = {"digest", "disk.qcow2", "kernel", "template.toml"}


def prepare(box: Box) -> dict[str, Any]:
    """Have a stopped vm that boots with a kernel of its template's."""
    vm = stopped(box)
    write(box, vm, 5 << 20, DATA)
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm="web")
    manifest, *others = without_kernel(content)
    return take(box, build([manifest, ("kernel", KERNEL), *others]))


def templates(box: Box) -> dict[str, set[str]]:
    found = (box.root / "state/templates").iterdir()
    return {
        path.name: set(os.listdir(path))
        for path in found
        if path.name != IMAGE and "-import-" not in path.name
    }


def test_a_vm_becomes_a_template(box: Box) -> None:
    vm = prepare(box)
    made = box.call("vm_publish", vm="web", template="mine")
    assert (made["name"], made["state"], made["source"]) == ("mine", "READY", "publish")
    assert made["description"] == "published from vm web"
    assert made["min_disk_size"] == vm["disk_size"]
    assert templates(box) == {"mine": WHOLE}
    directory = box.root / "state/templates/mine"
    assert (directory / "kernel").read_bytes() == KERNEL
    assert (directory / "disk.qcow2").stat().st_mode & 0o777 == 0o444
    raw = subprocess.check_output(
        ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {5 << 20} 32", directory / "disk.qcow2"]
    )
    assert b"written.by.the.g" in raw
    assert (last_job(box)["kind"], last_job(box)["state"]) == ("template_publish", "DONE")
    # Its vms are told who they are, whatever is on their disk; the first one is as it was.
    new = box.create("blog", image="mine", warm="auto")
    arguments = Path(f"/proc/{new['pid']}/cmdline").read_text()
    assert f"oscloud.identity={new['uuid']}" in arguments
    assert box.call("vm_start", vm="web")["uuid"] == vm["uuid"]
    with pytest.raises(RpcError) as refused:
        box.call("template_warm", template="mine", mem_size="64M")
    assert "can't be kept warm" in refused.value.message
    with pytest.raises(RpcError) as used:
        box.call("template_delete", template="mine")
    assert used.value.kind == "in_use"


def test_a_vm_with_cloud_init_becomes_a_template(box: Box) -> None:
    send(box, "vendor", GOOD, firmware="uefi")
    shape = {"mem_size": "128M", "disk_size": "64M"}
    vm = box.create("web", image="vendor", **shape)
    box.call("vm_stop", vm="web", force=True)
    write(box, vm, 5 << 20, DATA)
    box.call("vm_publish", vm="web", template="mine")
    info = box.call("template_info", template="mine")
    assert (info["state"], info["identity"]) == ("READY", "cloud-init")
    declared = (box.root / "state/templates/mine/template.toml").read_text()
    assert 'firmware = "uefi"' in declared
    assert templates(box)["mine"] == {"digest", "disk.qcow2", "template.toml"}
    new = box.create("blog", image="mine", **shape)
    seed = (box.root / "state/disks" / str(new["disk"]) / "seed.iso").read_bytes()
    # Another instance, with a machine-id of its own, that lets in nobody of the first one's.
    assert new["uuid"].encode() in seed
    assert re.search(rb"machine_id=[0-9a-f]{32}", seed)
    assert b"forget_access=1" in seed
    first = (box.root / "state/disks" / str(vm["disk"]) / "seed.iso").read_bytes()
    assert b"machine_id=''" in first
    assert b"forget_access=''" in first
    with pytest.raises(RpcError) as refused:
        box.call("template_warm", template="mine", mem_size="128M")
    assert "each of its disks is somebody's already" in refused.value.message


def test_a_vm_on_the_disk_of_another_with_cloud_init_lets_its_owner_in_no_more(box: Box) -> None:
    send(box, "vendor", GOOD)
    box.call("disk_create", name="left", template="vendor", size="64M")
    forgets = []
    for name in ("web", "heir"):
        created = {"name": name, "disk": "left", "mem_size": "128M", "wait": "started"}
        vm = box.call("vm_create", **created)
        seed = (box.root / "state/disks" / str(vm["disk"]) / "seed.iso").read_bytes()
        forgets.append(b"forget_access=1" in seed)
        assert (re.search(rb"machine_id=[0-9a-f]{32}", seed) is not None) == forgets[-1]
        box.call("vm_delete", vm=name, force=True)
    assert forgets == [False, True]


def test_what_can_not_be_published_is_refused(box: Box) -> None:
    vm = prepare(box)
    box.call("vm_publish", vm="web", template="mine")
    for name, kind in (("mine", "already_exists"), ("../x", "invalid_argument")):
        with pytest.raises(RpcError) as refused:
            box.call("vm_publish", vm="web", template=name)
        assert refused.value.kind == kind
    box.call("vm_start", vm="web")
    with pytest.raises(RpcError) as running:
        box.call("vm_publish", vm="web", template="other")
    assert (running.value.kind, running.value.data["state"]) == ("invalid_state", "RUNNING")
    box.call("vm_stop", vm="web", force=True)
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm=vm["id"])
    take(box, build(without_kernel(content)))
    with pytest.raises(RpcError) as mute:
        box.call("vm_publish", vm="web", template="other")
    assert "would not ask who they are" in mute.value.message
    assert templates(box) == {"mine": WHOLE}


def test_a_full_disk_leaves_nothing(box: Box) -> None:
    prepare(box)
    box.end()
    kept = box.root / "state/templates"
    aside = kept.rename(box.root / "aside")
    kept.mkdir()
    with small_disk(kept, "8M"):
        subprocess.run(["cp", "-a", f"{aside}/.", kept], check=True)
        box.start()
        with pytest.raises(RpcError) as full:
            box.call("vm_publish", vm="web", template="mine")
        assert (full.value.kind, full.value.data["resource"]) == ("exhausted", "disk")
        assert templates(box) == {}
        box.call("vm_delete", vm="web")
        box.end()
    box.start()


@pytest.fixture(scope="module")
def arena(zygote_box: ZygoteBox) -> ZygoteBox:
    prepare(zygote_box)
    return zygote_box


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "renaming", "durable"])
def test_killed_while_publishing(arena: ZygoteBox, at: Any, when: Any) -> None:
    box = arena

    def kill_at(number: int) -> bool:
        death = Death(at, number, when)
        _question, died = ask_to_die(box, death, "vm_publish", vm="web", template="mine")
        if died:
            wait_for_death(box)
            box.start()
        settle(box)
        assert templates(box) in ({}, {"mine": WHOLE})
        assert box.call("vm_info", vm="web")["state"] == "STOPPED"
        if not templates(box):
            box.call("vm_publish", vm="web", template="mine")
        box.call("template_delete", template="mine")
        return died

    assert count_deaths(kill_at) > 0
