"""Templates that come and go, over the socket: imported, downloaded, deleted; nothing left of what
failed.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_images import BAD_IMAGES, backed_by, qcow2
from daemon_process import IMAGE, LIMIT_SECONDS, Box, Line, RpcError
from image_server import ImageServer, serve_images
from spare_box import MEM_SIZE, SpareBox

from oscloudd.host.firmware import UEFI_VARIABLES

GOOD = qcow2()
# The same disk with a tail that nothing refers to, so that a transfer can stop in the middle.
LONG = GOOD + bytes(range(256)) * 4096
RAW = bytes(510) + b"\x55\xaa" + bytes(1 << 20) + b"end of the disk" + bytes(1009)
DECLARATION = """\
description = "A vendor's"
os = "Vendor 1"
[source]
kind = "download"
url = "{url}"
checksums_url = "{checksums}"
file_name = "disk.img"
[guest]
identity = "cloud-init"
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(box: Box) -> Iterator[ImageServer]:
    with serve_images(box) as server:
        yield server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ask(line: Line, name: str, content: bytes, **params: Any) -> None:
    """Ask for an import of a file to come."""
    given = {"name": name, "size": len(content), "file_name": f"{name}.img", **params}
    request = {"jsonrpc": "2.0", "method": "template_import", "params": given, "id": 7}
    line.send(json.dumps(request).encode() + b"\n")


def wait_for(line: Line, method: str) -> dict[str, Any]:
    """Give the next message of this method; raises the error that comes in its stead."""
    while (message := line.receive()).get("method") != method:
        if "error" in message:
            raise RpcError(message["error"])
        assert "id" not in message, message
    return message


def answer_on(line: Line) -> Any:
    while "id" not in (message := line.receive()):
        pass
    if "error" in message:
        raise RpcError(message["error"])
    return message["result"]


def send_all(line: Line, content: bytes) -> None:
    """Send until the daemon has enough; why is in its answer."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        line.send(content)


def send(box: Box, name: str, content: bytes, **params: Any) -> Any:
    """Import a file as a client does that sends it."""
    with box.connect() as line:
        ask(line, name, content, **params)
        assert wait_for(line, "send")["params"] == {"size": len(content)}
        send_all(line, content)
        answer = answer_on(line)
        assert line.at_end()
        return answer


def fetch(box: Box, name: str, url: str, **params: Any) -> Any:
    return box.call("template_import", name=name, url=url, **params)


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except RpcError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def files(box: Box) -> list[str]:
    """Give every file of every template but the box's own, hidden ones included."""
    top = box.root / "state/templates"
    return sorted(
        str(path.relative_to(top))
        for path in top.rglob("*")
        if path.relative_to(top).parts[0] != IMAGE
    )


def last_job(box: Box) -> dict[str, Any]:
    job: dict[str, Any] = box.call("job_list", limit=1)[0]
    return job


# What is sent


@pytest.mark.parametrize(
    ("content", "image_format", "size"), [(LONG, "qcow2", 64 << 20), (RAW, "raw", len(RAW))]
)
def test_a_file_becomes_a_template_as_it_is(
    box: Box, content: bytes, image_format: str, size: int
) -> None:
    made = send(box, "mine-1.2", content, sha256=sha256(content).upper(), os="Mine 1")
    assert (made["name"], made["state"], made["source"]) == ("mine-1.2", "READY", "import")
    assert (made["os"], made["identity"]) == ("Mine 1", "cloud-init")
    assert made["description"] == "imported from mine-1.2.img"
    assert made["digest"] == f"sha256:{sha256(content)}"
    assert made["min_disk_size"] == size
    image = box.root / f"state/templates/mine-1.2/disk.{image_format}"
    assert image.read_bytes() == content
    assert stat.S_IMODE(image.stat().st_mode) == 0o444
    assert files(box) == [
        "mine-1.2", "mine-1.2/digest", f"mine-1.2/disk.{image_format}", "mine-1.2/template.toml",
    ]  # fmt: skip
    assert (last_job(box)["kind"], last_job(box)["state"]) == ("template_import", "DONE")
    box.end()
    box.start()
    assert box.call("template_info", template="mine-1.2")["digest"] == made["digest"]


def test_an_image_for_uefi_gets_firmware_and_variables_of_its_own(box: Box) -> None:
    send(box, "bios", RAW)
    send(box, "mine", RAW, firmware="uefi")
    plain = box.create("plain", image="bios", mem_size="128M")
    vm = box.create("web", image="mine", mem_size="128M")
    variables = box.root / f"state/disks/{vm['id']}/variables.fd"
    assert variables.read_bytes() == UEFI_VARIABLES.read_bytes()
    variables.write_bytes(changed := b"changed" + variables.read_bytes()[7:])
    assert machine_of(vm).endswith(",pflash0=firmware,pflash1=variables")
    assert "pflash" not in machine_of(plain)
    box.call("vm_stop", vm="web", force=True)
    again = box.call("vm_start", vm="web", wait=False) and box.wait("web", "RUNNING")
    assert "pflash1" in machine_of(again)
    assert variables.read_bytes() == changed
    box.call("vm_delete", vm="web", force=True)
    assert not variables.parent.exists()


def test_an_image_that_asks_by_dhcp_has_no_user_data(box: Box) -> None:
    assert send(box, "plain", RAW, identity="dhcp")["identity"] == "dhcp"
    before = box.traces()
    with pytest.raises(RpcError) as refused:
        box.create("web", image="plain", mem_size="128M", user_data="#cloud-config")
    assert refused.value.kind == "invalid_argument"
    assert "plain has none" in refused.value.message
    assert box.traces() == before


def machine_of(vm: dict[str, Any]) -> str:
    argv = Path(f"/proc/{vm['pid']}/cmdline").read_text().split("\0")
    return argv[argv.index("-machine") + 1]


def test_a_vm_stands_on_it_and_it_stays_for_as_long(box: Box) -> None:
    send(box, "mine", RAW)
    vm = box.create("web", image="mine", mem_size="128M")
    disk = box.root / "state/disks" / str(vm["id"]) / "disk.qcow2"
    shown = subprocess.check_output(
        ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", disk]
    )
    assert json.loads(shown)["backing-filename-format"] == "raw"
    with pytest.raises(RpcError) as refused:
        box.call("template_delete", template="mine")
    assert refused.value.kind == "in_use"
    assert refused.value.data["disks"] == [box.call("disk_list")[0]["name"]]
    box.call("vm_delete", vm="web", force=True)
    assert box.call("template_delete", template="mine") == {"name": "mine"}
    assert files(box) == []
    assert [one["name"] for one in box.call("template_list")] == [IMAGE]
    for method in ("template_info", "template_delete"):
        with pytest.raises(RpcError) as missing:
            box.call(method, template="mine")
        assert missing.value.kind == "not_found"
    send(box, "mine", GOOD)  # the name is free


def test_holes_stay_holes(box: Box) -> None:
    content = RAW + bytes(32 << 20) + RAW
    send(box, "mine", content)
    image = box.root / "state/templates/mine/disk.raw"
    assert image.read_bytes() == content
    assert image.stat().st_blocks * 512 < 8 << 20


def test_every_bad_image_is_refused_and_leaves_nothing(box: Box) -> None:
    victim = box.root / "victim"
    victim.write_bytes(bytes(1 << 20))
    sent = [bad for bad in BAD_IMAGES if bad.length is None and bad.build("")]
    assert len(sent) > 60
    for bad in sent:
        with pytest.raises(RpcError) as refused:
            send(box, "bad", bad.build(str(victim)), format=bad.said)
        assert refused.value.kind == "invalid_argument", bad.name
        assert refused.value.message.startswith("image bad.img is refused: "), bad.name
        assert bad.reason in refused.value.message, bad.name
        assert files(box) == [], bad.name
    assert last_job(box)["state"] == "FAILED"


def test_another_checksum_than_announced_leaves_nothing(box: Box) -> None:
    for announced in (sha256(GOOD), hashlib.sha512(GOOD).hexdigest()):
        with pytest.raises(RpcError) as refused:
            send(box, "mine", LONG, sha256=announced)
        assert refused.value.kind == "invalid_argument"
        assert announced in refused.value.message
        assert files(box) == []
    send(box, "mine", LONG, sha256=hashlib.sha512(LONG).hexdigest())


def test_a_client_that_hangs_up_leaves_nothing(box: Box) -> None:
    with box.connect() as line:
        ask(line, "mine", LONG)
        wait_for(line, "send")
        line.send(LONG[:-1])
    box.until(lambda: last_job(box)["state"] == "FAILED", "the job's end")
    # Of what it had not read yet, the daemon need not take note.
    words = rf"the file ended after [0-9]+ of {len(LONG)} bytes"
    assert re.fullmatch(words, last_job(box)["message"])
    assert files(box) == []


def test_cancelling_leaves_nothing_and_ends_the_connection(box: Box) -> None:
    with box.connect() as line:
        ask(line, "mine", LONG)
        job = wait_for(line, "progress")["params"]["job"]
        wait_for(line, "send")
        line.send(LONG[:100_000])
        assert box.call("job_cancel", job=job)["state"] == "CANCELLED"
        with pytest.raises(RpcError) as cancelled:
            answer_on(line)
        assert cancelled.value.kind == "cancelled"
        assert line.at_end()
    assert files(box) == []


def test_what_is_in_a_file_is_never_taken_for_a_request(box: Box) -> None:
    box.create("web")
    evil = {
        "jsonrpc": "2.0",
        "method": "vm_delete",
        "id": 7,
        "params": {"vm": "web", "force": True},
    }
    content = (b"\n" + json.dumps(evil).encode() + b"\n") * 3000
    for params in ({"format": "raw", "sha256": sha256(b"")}, {"format": "qcow2"}):
        with box.connect() as line:
            ask(line, "mine", content, **params)
            wait_for(line, "send")
            send_all(line, content + content)
            with pytest.raises(RpcError) as refused:
                answer_on(line)
            assert refused.value.kind == "invalid_argument"
            # The rest was thrown away with the connection.
            with pytest.raises((AssertionError, ConnectionError)):
                line.receive()
    # One that is refused before it is asked for ends nothing: a client waits to be asked.
    with box.connect() as line:
        ask(line, IMAGE, content)
        with pytest.raises(RpcError) as refused:
            answer_on(line)
        assert refused.value.kind == "already_exists"
        assert line.call("vm_info", vm="web")["state"] == "RUNNING"


def test_a_file_that_would_fill_the_disk_is_refused_in_time(box: Box) -> None:
    box.end()
    templates = box.root / "state/templates"
    with small_disk(templates, "8M"):
        box.start()
        with pytest.raises(RpcError) as refused:
            send(box, "mine", RAW)
        assert (refused.value.kind, refused.value.data["resource"]) == ("exhausted", "disk")
        assert "256M are to stay free" in refused.value.message
        assert files(box) == []
        box.end()
        configure_least_free(box, "1")
        box.start()
        with pytest.raises(RpcError) as refused:
            send(box, "mine", os.urandom(16 << 20), format="raw")
        assert refused.value.kind == "exhausted"
        assert files(box) == []
        with serve_images(box) as server:
            url = server.url(server.put("disk.img", os.urandom(16 << 20)))
            with pytest.raises(RpcError) as refused:
                fetch(box, "mine", url, format="raw")
        assert refused.value.kind == "exhausted"
        assert files(box) == []
        send(box, "mine", RAW)
        box.end()
    box.start()


class small_disk:  # noqa: N801 - reads as a word
    """A file system of this size in place of a directory's."""

    def __init__(self, directory: Path, size: str) -> None:
        self.directory, self.size = directory, size

    def __enter__(self) -> None:
        options = ["-o", f"size={self.size},mode=0700"]
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", self.directory], check=True)

    def __exit__(self, *_exception: object) -> None:
        subprocess.run(["umount", "-l", self.directory], check=True)


def configure_least_free(box: Box, size: str) -> None:
    path = box.root / "oscloud.toml"
    path.write_text(path.read_text() + f'[limits]\nmin_free_disk = "{size}"\n')


# What is fetched


def test_an_address_becomes_a_template(box: Box, server: ImageServer) -> None:
    url = server.url(server.put("disk.img", LONG))
    made = fetch(box, "mine", url, sha256=sha256(LONG), format="qcow2")
    assert (made["state"], made["digest"]) == ("READY", f"sha256:{sha256(LONG)}")
    assert made["description"] == f"imported from {url}"
    assert made["os"] == "mine"
    assert files(box) == ["mine", "mine/digest", "mine/disk.qcow2", "mine/template.toml"]
    job = last_job(box)
    assert (job["kind"], job["step"], job["steps"]) == ("template_import", 1, 1)
    box.create("web", image="mine", mem_size="128M", disk_size="64M")


def test_a_cut_is_taken_up_where_it_was(box: Box, server: ImageServer) -> None:
    name = server.put("disk.img", LONG)
    made = fetch(box, "mine", server.url(name, cut=400_000), sha256=sha256(LONG))
    assert made["state"] == "READY"
    assert server.requests() == ["/disk.img", "/disk.img bytes=400000-"]


def test_a_daemon_killed_on_the_way_leaves_the_beginning_to_the_next(
    box: Box, server: ImageServer
) -> None:
    url = server.url(server.put("disk.img", LONG), hold=400_000)
    part = box.root / "state/templates/.download-mine/image.part"
    job = fetch(box, "mine", url, wait=False)
    box.until(lambda: part.exists() and part.stat().st_size == 400_000, "the beginning")
    box.end(signal.SIGKILL)
    server.release()
    box.start()
    assert box.call("job_info", job=job["id"])["state"] == "FAILED"
    assert fetch(box, "mine", url, sha256=sha256(LONG))["state"] == "READY"
    assert server.requests()[-1] == "/disk.img bytes=400000-"
    assert files(box) == ["mine", "mine/digest", "mine/disk.qcow2", "mine/template.toml"]


def test_the_beginning_is_given_up_after_a_week_or_by_deleting(
    box: Box, server: ImageServer
) -> None:
    kept = box.root / "state/templates/.download-mine"
    for remove in (lambda: box.call("template_delete", template="mine"), lambda: age(box, kept)):
        kept.mkdir()
        (kept / "image.part").write_bytes(b"x")
        (kept / "image.part.json").write_text("{}")
        box.end()
        box.start()
        assert kept.exists()
        remove()
        assert files(box) == []


def age(box: Box, kept: Path) -> None:
    box.end()
    for path in (*kept.iterdir(), kept):
        os.utime(path, (0, 0))
    box.start()


def test_two_that_want_the_same_share_one_download(box: Box, server: ImageServer) -> None:
    url = server.url(server.put("disk.img", LONG), hold=400_000)
    progress: list[dict[str, Any]] = []
    call = lambda: box.call("template_import", progress.append, name="mine", url=url)  # noqa: E731
    calls = [in_background(call) for _ in range(8)]
    box.until(lambda: {step["stage"] for step in progress} >= {"downloading"}, "its beginning")
    with pytest.raises(RpcError) as other:
        fetch(box, "mine", url, format="qcow2")
    assert other.value.kind == "in_use"
    with pytest.raises(RpcError) as other:
        send(box, "mine", GOOD)
    assert other.value.kind == "in_use"
    with pytest.raises(RpcError) as other:
        box.call("template_delete", template="mine")
    assert other.value.kind == "in_use"
    again = fetch(box, "mine", url, wait=False)
    server.release()
    for thread, _ in calls:
        thread.join(LIMIT_SECONDS)
    assert [result[0]["state"] for _, result in calls] == ["READY"] * 8
    assert server.requests() == ["/disk.img"]
    jobs = [job for job in box.call("job_list") if job["kind"] == "template_import"]
    assert [job["id"] for job in jobs] == [again["id"]]
    assert {step["job"] for step in progress} == {again["id"]}


def test_a_declared_template_is_downloaded_once_for_all_who_ask(box: Box) -> None:
    with serve_images(box) as server:
        name = server.put("disk.img", LONG)
        server.put("SHA512SUMS", f"{hashlib.sha512(LONG).hexdigest()}  {name}\n".encode())
        declare(box, server.url(name, hold=400_000), server.url("SHA512SUMS"))
        calls = [
            in_background(lambda: box.call("template_download", template="vendor"))
            for _ in range(4)
        ]
        box.until(lambda: "/disk.img" in server.requests(), "the download's beginning")
        assert box.call("template_info", template="vendor")["state"] == "DOWNLOADING"
        server.release()
        for thread, _ in calls:
            thread.join(LIMIT_SECONDS)
        assert [result[0]["state"] for _, result in calls] == ["READY"] * 4
        assert server.requests().count("/disk.img") == 1
        with pytest.raises(RpcError) as taken:
            send(box, "vendor", GOOD)
        assert taken.value.kind == "already_exists"
        assert "choose another name" in taken.value.data["hint"]
        # Deleted, it is declared still, and can be made again.
        box.call("template_delete", template="vendor")
        assert box.call("template_info", template="vendor")["state"] == "MISSING"
        with pytest.raises(RpcError) as missing:
            box.call("template_delete", template="vendor")
        assert missing.value.kind == "invalid_state"
        server.put("SHA512SUMS", f"SHA256 ({name}) = {sha256(GOOD)}\n".encode())
        with pytest.raises(RpcError) as wrong:
            box.call("template_download", template="vendor")
        assert sha256(LONG) in wrong.value.message
        assert files(box) == []


def declare(box: Box, url: str, checksums: str) -> None:
    """Declare the template `vendor`, and have a daemon that knows it."""
    box.end()
    directory = box.root / "declared/vendor"
    directory.mkdir(parents=True)
    (directory / "template.toml").write_text(DECLARATION.format(url=url, checksums=checksums))
    config = box.root / "oscloud.toml"
    text = config.read_text().replace(
        "template_dirs = []", f'template_dirs = ["{box.root}/declared"]'
    )
    config.write_text(text)
    box.start()


def test_what_is_wrong_with_an_address_leaves_nothing(box: Box, server: ImageServer) -> None:
    good, bad = server.put("disk.img", LONG), server.put("bad.img", backed_by("/etc/shadow"))
    page = server.put("page", b"<html><body>gone</body></html>")
    for url, params, kind, words in (
        (server.url("none.img"), {}, "not_found", "404"),
        (server.url(good), {"sha256": sha256(GOOD)}, "host_failure", "was announced"),
        (server.url(bad), {}, "invalid_argument", "names a backing file"),
        (server.url(page), {}, "invalid_argument", "a web page"),
        (server.url(good), {"format": "raw"}, "invalid_argument", "said to be raw"),
        ("http://127.0.0.1:1/disk.img", {}, "host_failure", "can't be reached"),
    ):
        with pytest.raises(RpcError) as failed:
            fetch(box, "mine", url, **params)
        assert (failed.value.kind, files(box)) == (kind, [])
        assert words in failed.value.message


def test_a_cancelled_download_leaves_nothing(box: Box, server: ImageServer) -> None:
    url = server.url(server.put("disk.img", LONG), hold=400_000)
    job = fetch(box, "mine", url, wait=False)
    part = box.root / "state/templates/.download-mine/image.part"
    box.until(lambda: part.exists() and part.stat().st_size > 0, "the beginning")
    assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
    assert files(box) == []
    server.release()
    assert fetch(box, "mine", url)["state"] == "READY"


# What makes no sense

BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of them"),
    ({"url": "http://h/x", "size": 1}, "give one of them"),
    ({"size": 0}, "size 0 is not between"),
    ({"size": -1}, "size -1 is not between"),
    ({"size": (1 << 40) + 1}, "is not between 1 byte and 1 TiB"),
    ({"size": 1 << 70}, "size"),
    ({"size": 1, "wait": False}, "has to stay"),
    ({"url": "file:///etc/shadow"}, "can't be downloaded"),
    ({"url": "/etc/shadow"}, "can't be downloaded"),
    ({"url": "ftp://h/x"}, "can't be downloaded"),
    ({"url": "http://"}, "can't be downloaded"),
    ({"url": "http://user:secret@h/x"}, "user or password"),
    ({"url": "http://h/a b"}, "characters no address has"),
    ({"url": "http://h/" + "x" * 2000}, "more than 2000"),
    ({"url": "http://h/x", "sha256": "12"}, "is no checksum"),
    ({"url": "http://h/x", "format": "vmdk"}, "format"),
    ({"url": "http://h/x", "os": "a\nb"}, "os"),
    ({"size": 1, "file_name": "a\x7fb"}, "file_name"),
    ({"size": 1, "identity": "serial"}, "identity"),
    ({"size": 1, "os": "x" * 256}, "longer than 255"),
    *(({"size": 1, "name": name}, "name") for name in (
        "", ".", "..", "../x", "a/b", ".hidden", "12", "a b", "ä", "x" * 64, "a\n",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("params", "words"), BAD_PARAMETERS, ids=lambda one: str(one)[:60])
def test_a_bad_parameter_is_named(shared_box: Box, params: dict[str, Any], words: str) -> None:
    with pytest.raises(RpcError) as refused:
        shared_box.call("template_import", **{"name": "mine", **params})
    assert refused.value.kind == "invalid_argument"
    assert words in refused.value.message
    assert files(shared_box) == []


def test_what_is_declared_may_say_anything_that_can_be_printed(box: Box) -> None:
    words = 'a "quoted" \\ name ä€😀 # = [x]'
    assert send(box, "mine", GOOD, os=words, file_name=f"{words}.img")["os"] == words
    assert box.call("template_info", template="mine")["description"] == f"imported from {words}.img"


# What goes


def test_what_a_dead_daemon_had_begun_to_remove_is_removed_by_the_next(box: Box) -> None:
    send(box, "mine", GOOD)
    box.end(signal.SIGKILL)
    top = box.root / "state/templates"
    (top / "mine").rename(top / ".removing-mine")
    box.start()
    assert files(box) == []


def test_a_template_that_a_job_works_on_stays(box: Box) -> None:
    send(box, "mine", GOOD)
    box.rows(
        "INSERT INTO job (kind, target, state, step, stage, params, attempts, message, error_kind,"
        " owner_uid, created_at) VALUES ('template_warm', 'mine', 'RUNNING', 0, '', '{}', 1, '',"
        " '', 0, 0)"
    )
    with pytest.raises(RpcError) as refused:
        box.call("template_delete", template="mine")
    assert refused.value.kind == "in_use"
    assert "job-wait" in refused.value.data["hint"]
    box.rows("UPDATE job SET state = 'DONE'")
    box.call("template_delete", template="mine")


def test_its_warm_images_and_spares_go_with_it(fake_qemu_binary: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    box = SpareBox(fake_qemu_binary)
    try:
        box.restart(pool=0)
        box.warm()
        with box.sshd_at("192.168.7.7"):
            box.create("web", ip="192.168.7.7", wait="ready", image=IMAGE, mem_size=MEM_SIZE)
            with pytest.raises(RpcError) as refused:
                box.call("template_delete", template=IMAGE)
            assert refused.value.kind == "in_use"
            assert len(list(box.root.glob("state/warm/[!.]*"))) == 1
            box.call("vm_delete", vm="web", force=True)
        box.restart(pool=1)
        assert box.call("template_delete", template=IMAGE) == {"name": IMAGE}
        assert list(box.root.glob("state/warm/*")) == []
        assert box.qemus() == []
        assert box.traces() == {}
        box.end()
    finally:
        box.discard()
