"""Disks given away over the socket: whole, or nothing; and nobody else is held up."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemon_process import IMAGE, Box, Line, RpcError

MARK = b"written by the guest"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ask(line: Line, method: str, **params: Any) -> None:
    request = {"jsonrpc": "2.0", "method": method, "params": params, "id": 7}
    line.send(json.dumps(request).encode() + b"\n")


def read_pieces(
    line: Line, on_piece: Callable[[], None] = lambda: None
) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """Give what was sent, the progress that came in between, and the answer."""
    content, progress = bytearray(), []
    while "id" not in (message := line.receive()):
        if message["method"] == "piece":
            content += line.read(message["params"]["size"])
            on_piece()
        else:
            progress.append(message["params"])
    if "error" in message:
        raise RpcError(message["error"])
    return bytes(content), progress, message["result"]


def export(box: Box, method: str, **params: Any) -> tuple[bytes, dict[str, Any]]:
    with box.connect() as line:
        ask(line, method, **params)
        content, _progress, answer = read_pieces(line)
        assert line.call("daemon_info")["pid"] > 0  # it is a line for requests as before
    assert (len(content), sha256(content)) == (answer["size"], answer["sha256"])
    return content, answer


def stopped(box: Box, name: str = "web", **params: Any) -> dict[str, Any]:
    vm = box.create(name, **params)
    seen: dict[str, Any] = box.call("vm_stop", vm=vm["id"], force=True)
    return seen


def disk_path(box: Box, vm: dict[str, Any]) -> Path:
    return box.root / "state/disks" / str(vm["disk"]) / "disk.qcow2"


def write(box: Box, vm: dict[str, Any], offset: int, data: bytes) -> None:
    """Write into the disk as the guest would."""
    source = box.root / "data"
    source.write_bytes(data)
    command = f"write -s {source} {offset} {len(data)}"
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, disk_path(box, vm)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def as_raw(box: Box, image: bytes) -> bytes:
    path = box.root / "exported"
    path.write_bytes(image)
    raw = box.root / "exported.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def left(box: Box) -> list[str]:
    """Give what an export has left behind."""
    files = [path.name for path in (box.root / "state/exports").iterdir()]
    images = []
    for fd in Path(f"/proc/{box.daemon.pid}/fd").iterdir():  # type: ignore[union-attr]
        with contextlib.suppress(OSError):
            images += [link for link in [os.readlink(fd)] if "exports" in link]
    return [*files, *images, *(f"process {pid}" for pid in qemu_imgs(box))]


def qemu_imgs(box: Box) -> list[int]:
    daemon = str(box.daemon.pid)  # type: ignore[union-attr]
    shown = subprocess.run(["pgrep", "-P", daemon, "qemu-img"], capture_output=True, check=False)
    return [int(pid) for pid in shown.stdout.split()]


def resident_bytes(box: Box) -> int:
    shown = Path(f"/proc/{box.daemon.pid}/statm").read_text()  # type: ignore[union-attr]
    return int(shown.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def last_job(box: Box) -> dict[str, Any]:
    job: dict[str, Any] = box.call("job_list", limit=1)[0]
    return job


def wait_for_end(box: Box) -> dict[str, Any]:
    box.until(lambda: last_job(box)["state"] != "RUNNING", "the job's end")
    return last_job(box)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_disk_is_one_image_with_all_that_is_in_it(box: Box, image_format: str) -> None:
    vm = stopped(box)
    data = (MARK + os.urandom(3000)).ljust(1 << 16, b"\0")
    write(box, vm, 5 << 20, data)
    content, answer = export(box, "disk_export", disk=vm["disk"], format=image_format)
    disk = box.call("disk_info", disk=vm["disk"])
    assert (answer["disk"], answer["name"], answer["format"]) == (
        vm["disk"], disk["name"], image_format,
    )  # fmt: skip
    raw = content if image_format == "raw" else as_raw(box, content)
    assert len(raw) == 16 << 20
    assert raw[5 << 20 : (5 << 20) + len(data)] == data
    assert raw[1 << 20 :].strip(b"\0") == data.strip(b"\0")  # before it is what its guest has
    assert (last_job(box)["kind"], last_job(box)["state"]) == ("disk_export", "DONE")
    assert left(box) == []
    box.call("vm_start", vm="web")  # its own disk is as it was


def test_a_disk_brings_what_it_stands_on(box: Box) -> None:
    image = box.root / "state/templates" / IMAGE / "disk.qcow2"
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", image],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with box.sshd_at("192.168.0.2"):
        box.call("template_warm", template=IMAGE, mem_size="64M", disk_size="16M")
        vm = box.create("web", warm="only", wait="ready")
    assert vm["started"] == "warm"
    box.call("vm_stop", vm="web", force=True)
    content, _answer = export(box, "disk_export", disk=vm["disk"])
    assert as_raw(box, content)[64 << 10 : 128 << 10] == b"\7" * (64 << 10)
    described = subprocess.check_output(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", box.root / "exported"]
    )
    assert "backing-filename" not in json.loads(described)


def test_a_disk_in_use_is_refused(box: Box) -> None:
    vm = box.create("web")
    for state, hint in (("RUNNING", "vm-stop web"), ("SUSPENDED", "vm-resume web")):
        if state == "SUSPENDED":
            box.call("vm_stop", vm="web", force=True)
            with box.sshd_at(vm["ip"]):
                box.call("vm_start", vm="web")
                box.wait("web", "ready")
            box.call("vm_suspend", vm="web")
        with pytest.raises(RpcError) as refused:
            export(box, "disk_export", disk=vm["disk"])
        assert (refused.value.kind, refused.value.data["state"]) == ("invalid_state", state)
        assert hint in refused.value.data["hint"]
    assert "disk_export" not in {job["kind"] for job in box.call("job_list")}
    with pytest.raises(RpcError) as missing:
        export(box, "disk_export", disk="none")
    assert missing.value.kind == "not_found"


def test_a_client_that_hangs_up_ends_it(box: Box) -> None:
    vm = stopped(box, disk_size="1G")
    with box.connect() as line:
        ask(line, "disk_export", disk=vm["disk"], format="raw")
        while line.receive()["method"] != "piece":
            pass
    assert wait_for_end(box)["state"] in ("FAILED", "CANCELLED")
    box.until(lambda: left(box) == [], "everything being cleared up")
    box.call("vm_delete", vm="web")


def test_one_that_does_not_read_holds_up_nobody(box: Box) -> None:
    vm = stopped(box, disk_size="1G")
    with box.connect() as line:
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ask(line, "disk_export", disk=vm["disk"], format="raw")
        box.until(lambda: last_job(box)["stage"] == "sending", "the first piece")
        job = last_job(box)["id"]
        # The vm is free as soon as its disk is flattened, and the daemon is there for others.
        box.call("vm_start", vm="web")
        assert resident_bytes(box) < 300 << 20
        assert box.call("job_cancel", job=job)["state"] == "CANCELLED"
        with pytest.raises(RpcError) as told:
            read_pieces(line)
        assert told.value.kind == "cancelled"
        assert line.call("daemon_info")["pid"] > 0
    assert left(box) == []


def test_progress_comes_between_the_pieces(box: Box) -> None:
    vm = stopped(box, disk_size="256M")
    with box.connect() as line:
        ask(line, "disk_export", disk=vm["disk"], format="raw")
        content, progress, _answer = read_pieces(line)
    assert len(content) == 256 << 20
    assert {"flattening", "sending"} <= {step["stage"] for step in progress}
    fractions = [step["fraction"] for step in progress if step["stage"] == "sending"]
    assert fractions == sorted(fractions)
    assert fractions[0] < fractions[-1] <= 1


def test_a_full_disk_is_told_before_anything_is_written(box: Box) -> None:
    vm = stopped(box)
    box.end()
    directory = box.root / "state/exports"
    options = ["-o", "size=8M,mode=0700"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", directory], check=True)
    try:
        box.start()
        with pytest.raises(RpcError) as refused:
            export(box, "disk_export", disk=vm["disk"])
        assert (refused.value.kind, refused.value.data["resource"]) == ("exhausted", "disk")
        assert "256M are to stay free" in refused.value.message
        assert left(box) == []
        box.end()
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
    box.start()


def test_a_disk_that_says_its_data_is_elsewhere_is_not_followed(box: Box) -> None:
    vm = stopped(box)
    path = disk_path(box, vm)
    with path.open("r+b") as file:
        file.seek(72)
        features = int.from_bytes(file.read(8), "big") | 1 << 2
        file.seek(72)
        file.write(features.to_bytes(8, "big"))
    with pytest.raises(RpcError) as refused:
        export(box, "disk_export", disk=vm["disk"])
    assert refused.value.kind == "host_failure"
    assert "another file" in refused.value.message


def test_a_daemon_killed_in_it_leaves_nothing(box: Box) -> None:
    vm = stopped(box, disk_size="1G")
    with box.connect() as line:
        ask(line, "disk_export", disk=vm["disk"], format="raw")
        while line.receive()["method"] != "piece":
            pass
        box.end(9)
    box.start()
    assert left(box) == []
    assert (last_job(box)["kind"], last_job(box)["state"]) == ("disk_export", "FAILED")
    assert box.call("vm_info", vm="web")["state"] == "STOPPED"


def test_disks_of_their_own_are_exported_one_by_one(box: Box) -> None:
    disk = box.call("disk_create", name="data", size="8M")
    content, answer = export(box, "disk_export", disk="data", format="raw")
    assert (content, answer["disk"]) == (bytes(8 << 20), disk["id"])
    stopped(box)
    box.call("disk_attach", vm="web", disk="data")
    export(box, "disk_export", disk="data")
    box.call("vm_start", vm="web")
    with pytest.raises(RpcError) as running:
        export(box, "disk_export", disk="data")
    assert "vm-stop web" in running.value.data["hint"]
    box.call("vm_delete", vm="web", force=True)
    box.call("disk_delete", disk="data")


def test_snapshots_are_part_of_a_disk(box: Box) -> None:
    vm = stopped(box)
    write(box, vm, 1 << 20, MARK.ljust(1 << 16, b"."))
    box.call("snapshot_create", vm="web", name="before")
    write(box, vm, 2 << 20, MARK.ljust(1 << 16, b"!"))
    content, _answer = export(box, "disk_export", disk=vm["disk"], format="raw")
    assert content[1 << 20 : (1 << 20) + (1 << 16)] == MARK.ljust(1 << 16, b".")
    assert content[2 << 20 : (2 << 20) + (1 << 16)] == MARK.ljust(1 << 16, b"!")
