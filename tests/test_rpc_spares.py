"""Spares that misbehave, and vms that don't come to take theirs: nothing stays behind."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_images import qcow2
from cloud_accounts import check_accounted, settle
from daemon_process import IMAGE, RpcError
from spare_box import MEM_SIZE, SpareBox
from test_rpc_templates import send

ADDRESS = "192.168.7.7"
TRIES = 12
# Spares are told from other machines by their name.
WRAPPER = """\
#!/bin/sh
case "$*" in *"-name guest=spare "*) export FAKE_QEMU={fault};; esac
exec {fake} "$@"
"""


@contextmanager
def open_box(binary: Path, fault: str = "") -> Iterator[SpareBox]:
    """Give a box whose spares have this fault."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    wrapper = binary.with_name(f"faulty-{fault}")
    wrapper.write_text(WRAPPER.format(fault=fault, fake=binary))
    wrapper.chmod(0o755)
    box = SpareBox(wrapper)
    try:
        box.restart(pool=0)
        box.warm()
        with box.sshd_at(ADDRESS):
            yield box
            for vm in box.call("vm_list"):
                box.call("vm_delete", vm=vm["id"], force=True)
        # No other daemon: what there is now is what this one has left.
        box.end()
        assert box.traces() == {}
    finally:
        box.discard()


def test_a_vm_that_is_cancelled_keeps_no_spare(fake_qemu_binary: Path) -> None:
    with open_box(fake_qemu_binary) as box:
        box.restart(pool=1)
        ended = []
        for _ in range(TRIES):
            job = box.call(
                "vm_create", name="web", image=IMAGE, mem_size=MEM_SIZE, disk_size="16M",
                wait="none", ip=ADDRESS,
            )  # fmt: skip
            with contextlib.suppress(RpcError):  # it was done already
                box.call("job_cancel", job=job["id"])
            settle(box)
            ended.append(box.call("job_info", job=job["id"])["state"])
            with contextlib.suppress(RpcError):
                box.call("vm_delete", vm="web", force=True)
            box.until(lambda: box.count_spares() == 1, "a spare again")
            [_spare] = box.qemus()
            assert len(list(box.root.glob("state/spares/*"))) == 1
        print(ended)
        assert "CANCELLED" in ended


def test_a_spare_that_can_not_be_restored_leaves_nothing(fake_qemu_binary: Path) -> None:
    with open_box(fake_qemu_binary, "restore_fails") as box:
        box.restart(pool=1, wait=False)
        box.until(lambda: box.log().count("no spare clone of") > 1, "a second try")
        vm = box.create("web", ip=ADDRESS, wait="ready", image=IMAGE)
        assert vm["started"] == "warm"
        assert "restore" in vm["timings"]
        assert box.count_spares() == 0


def test_a_spare_that_does_not_quit_is_ended_with_its_daemon(fake_qemu_binary: Path) -> None:
    with open_box(fake_qemu_binary, "hang_on_quit") as box:
        box.restart(pool=2)
        assert len(box.qemus()) == 2
        box.restart(pool=0)
        check_accounted(box)


def test_none_is_made_of_an_image_with_cloud_init(fake_qemu_binary: Path) -> None:
    with open_box(fake_qemu_binary) as box:
        send(box, "vendor", qcow2())
        shape = {"image": "vendor", "mem_size": "128M", "disk_size": "64M"}
        box.call("template_warm", template="vendor", mem_size="128M", disk_size="64M")
        box.restart(pool=1)
        # The image used last is one that a spare, which has no seed yet, could not begin with.
        vm = box.create("web", ip=ADDRESS, wait="ready", warm="only", **shape)
        assert vm["started"] == "warm"
        box.call("vm_delete", vm="web", force=True)
        vm = box.create("shop", ip=ADDRESS, wait="ready", image=IMAGE)
        assert "take" in vm["timings"]
        box.until(lambda: box.count_spares() == 1, "a spare again")
        assert "no spare clone of" not in box.log()
