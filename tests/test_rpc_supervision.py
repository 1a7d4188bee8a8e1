"""Many vms, and hosts that are in the way: none of it touches a vm."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon_process import LIMIT_SECONDS, Box

VMS = 50


def test_fifty_running_vms_are_all_found_again(box: Box) -> None:
    pids = {box.create(f"web{number}")["pid"] for number in range(VMS)}
    assert len(pids) == VMS
    box.end(signal.SIGKILL)
    box.start()
    began = time.monotonic()
    # A vm is held back until it has been judged, so the answer of its qemu is the proof.
    for number in range(VMS):
        box.call("vm_qemu_command", vm=f"web{number}", command="query-status")
    print(f"{VMS} vms answered {time.monotonic() - began:.2f} s after the daemon served")
    vms = box.call("vm_list")
    assert {vm["state"] for vm in vms} == {"RUNNING"}
    assert {vm["pid"] for vm in vms} == pids


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    subprocess.run(["mount", *options, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def refuses_to_start(box: Box) -> str:
    daemon = box.spawn()
    before = len(box.log())
    try:
        assert daemon.wait(LIMIT_SECONDS) != 0
    finally:
        daemon.kill()
        daemon.wait()
    return box.log()[before:]


def test_a_run_directory_that_can_not_be_written_touches_no_vm(box: Box) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    run = box.root / "run"
    with mounted(run, "--bind", str(run)):
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
        said = refuses_to_start(box)
    assert "Read-only file system" in said
    assert box.qemus() == [vm["pid"]]
    box.start()
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]
    assert box.call("vm_qemu_command", vm="web", command="query-name") == {"name": "web"}


def test_a_full_run_directory_touches_no_vm(box: Box) -> None:
    box.end()
    with mounted(box.root / "run", "-t", "tmpfs", "-o", "nr_inodes=40,mode=755", "tmpfs"):
        box.start()
        vm = box.create("web")
        box.end(signal.SIGKILL)
        box.socket_path.unlink()
        fill = box.root / "run" / "fill"
        fill.mkdir()
        made = 0
        try:
            while True:
                (fill / str(made)).touch()
                made += 1
        except OSError:
            assert made > 0
        assert "No space left on device" in refuses_to_start(box)
        assert box.qemus() == [vm["pid"]]
        subprocess.run(["rm", "-r", fill], check=True)
        box.start()
        assert box.call("vm_info", vm="web")["pid"] == vm["pid"]
        box.call("vm_delete", vm="web", force=True)
        box.end()
    box.start()


def test_a_damaged_database_touches_no_vm(box: Box) -> None:
    vm = box.create("web")
    box.end()
    path = box.root / "state" / "oscloud.db"
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + os.urandom(len(whole) - 50))
    said = refuses_to_start(box)
    assert "can't be used" in said
    assert "running vms are left alone" in said
    assert box.qemus() == [vm["pid"]]
    path.write_bytes(whole)
    box.start()
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]
