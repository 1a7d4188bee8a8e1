"""Vms that are exported and imported, over the socket: the same again, or nothing at all."""

import base64
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_images import BAD_IMAGES, qcow2
from daemon_process import IMAGE, Box, Line, RpcError
from test_rpc_exports import ask, export, left, sha256, stopped, write
from test_rpc_templates import answer_on, send, send_all, wait_for

from oscloudd.cloud.vm_archive import END, build_header, build_sums, padding

KEPT = ("name", "uuid", "mac", "ip", "mem_size", "cpus", "disk_size", "network", "ssh_host_keys",
        "autostart", "restart")  # fmt: skip
DATA = b"written by the guest".ljust(1 << 16, b".")
Members = list[tuple[str, bytes]]


def take(box: Box, content: bytes, *, size: int | None = None, **params: Any) -> dict[str, Any]:
    """Import a vm as a client does that sends it."""
    given = {"size": len(content) if size is None else size, "file_name": "web.oscloud", **params}
    with box.connect() as line:
        request = {"jsonrpc": "2.0", "method": "vm_import", "params": given, "id": 7}
        line.send(json.dumps(request).encode() + b"\n")
        wait_for(line, "send")
        send_all(line, content)
        answer: dict[str, Any] = answer_on(line)
        assert line.at_end()
        return answer


def members_of(archive: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(each.name, tar.extractfile(each).read()) for each in tar]  # type: ignore[union-attr]


def build(members: Members, /, **manifest: Any) -> bytes:
    """Give an archive whose manifest, but for changes, and checksums fit its members."""
    old = json.loads(dict(members)["manifest.json"])
    for part in ("vm", "template"):
        old[part] |= manifest.pop(part, {})
    others = [(name, data) for name, data in members if name not in ("manifest.json", "SHA256SUMS")]
    listed = [{"name": name, "size": len(data)} for name, data in others]
    text = json.dumps(old | {"members": listed} | manifest).encode()
    files = [("manifest.json", text), *others]
    files.append(("SHA256SUMS", build_sums({name: sha256(data) for name, data in files})))
    return pack(files)


def pack(members: Members) -> bytes:
    parts = (build_header(name, len(data), 0) + data + padding(len(data)) for name, data in members)
    return b"".join(parts) + END


def footprint(box: Box) -> dict[str, Any]:
    """Give all there is of vms, disks and templates."""
    templates = box.root / "state/templates"
    return {
        "templates": sorted(str(path.relative_to(templates)) for path in templates.rglob("*")),
        **box.traces(),
    }


@pytest.fixture
def archive(box: Box) -> bytes:
    """An exported vm, which is not there any more."""
    vm = stopped(box, cpus=2, autostart="last-state", restart="on-failure")
    write(box, vm, 5 << 20, DATA)
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm="web")
    return build(without_kernel(content))


def without_kernel(archive: bytes) -> Members:
    return [each for each in members_of(archive) if each[0] != "kernel"]


def test_a_vm_is_the_same_again(box: Box) -> None:
    vm = stopped(box, cpus=2, autostart="last-state", restart="on-failure")
    write(box, vm, 5 << 20, DATA)
    before = footprint(box)
    content, answer = export(box, "vm_export", vm="web")
    assert (answer["vm"], answer["name"]) == (vm["id"], "web")
    assert footprint(box) == before
    assert left(box) == []
    box.call("vm_delete", vm="web")
    taken = take(box, content)
    assert {key: taken[key] for key in KEPT} == {key: vm[key] for key in KEPT}
    assert (taken["state"], taken["wanted_state"], taken["reason"]) == (
        "STOPPED", "STOPPED", "imported",
    )  # fmt: skip
    assert taken["id"] != vm["id"]
    assert taken["os"].startswith(f"{IMAGE}-import-")
    raw = as_read_by_its_guest(box, taken)
    assert raw[5 << 20 : (5 << 20) + len(DATA)] == DATA
    assert raw[1 << 20 :].strip(b"\0") == DATA.strip(b"\0")
    directory = box.root / "state/disks" / str(taken["disk"])
    assert [path.stat().st_mode & 0o777 for path in (directory, directory / "disk.qcow2")] == [
        0o700, 0o600,
    ]  # fmt: skip
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"
    box.call("vm_stop", vm="web", force=True)
    again, _answer = export(box, "vm_export", vm="web")
    names = [name for name, _data in members_of(content)]
    assert [name for name, _data in members_of(again)] == names
    box.call("vm_delete", vm="web")
    assert take(box, again)["os"] == taken["os"]


def test_what_its_guest_has_yet_to_be_told_comes_with_it(box: Box, archive: bytes) -> None:
    told = {"identified": False, "seed_document": "hostname=d2Vi\n"}
    take(box, build(members_of(archive), vm=told))
    query = "SELECT seed_document, identified FROM vm WHERE name = 'web'"
    assert box.rows(query) == [(told["seed_document"], 0)]
    again, _answer = export(box, "vm_export", vm="web")
    manifest = json.loads(dict(members_of(again))["manifest.json"])
    assert {key: manifest["vm"][key] for key in told} == told


def as_read_by_its_guest(box: Box, vm: dict[str, Any]) -> bytes:
    """Give what qemu reads of a disk with its template's image below it."""
    disk = box.root / "state/disks" / str(vm["disk"]) / "disk.qcow2"
    base = box.root / "state/templates" / vm["os"] / "disk.raw"
    node = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(disk)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base)}},
    }
    raw = box.root / "read.raw"
    argv = ["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", raw]
    subprocess.run(argv, check=True)
    return raw.read_bytes()


def test_standard_tools_read_the_file(box: Box, archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "web.oscloud").write_bytes(archive)
    subprocess.run(["tar", "xf", "web.oscloud"], cwd=tmp_path, check=True)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["members"] == [
        {"name": "disk.qcow2", "size": (tmp_path / "disk.qcow2").stat().st_size}
    ]
    assert (manifest["vm"]["name"], manifest["template"]["name"]) == ("web", IMAGE)
    assert box.call("vm_list") == []


def test_what_another_has_is_refused_or_given_anew(box: Box, archive: bytes) -> None:
    other = box.create("web", ip="192.168.0.9")
    for params, words in (({}, "'web' already exists"), ({"name": "web"}, "'web' already exists")):
        with pytest.raises(RpcError) as taken:
            take(box, archive, **params)
        assert (taken.value.kind, words in taken.value.message) == ("already_exists", True)
    box.call("vm_delete", vm=other["id"], force=True)
    first = take(box, archive)
    before = footprint(box)
    with pytest.raises(RpcError) as refused:
        take(box, archive, name="copy")
    assert refused.value.kind == "in_use"
    assert first["ip"] in refused.value.message
    moved = json.loads(dict(members_of(archive))["manifest.json"])["vm"]
    with pytest.raises(RpcError) as refused:
        take(box, build(members_of(archive), vm={"ip": "192.168.0.77"}), name="copy")
    assert (refused.value.kind, moved["mac"] in refused.value.message) == ("in_use", True)
    assert footprint(box) == before
    changes = {"ip": "192.168.0.77", "mac": "52:54:00:00:00:77"}
    second = take(box, build(members_of(archive), vm=changes), name="copy")
    assert second["uuid"] != first["uuid"]
    assert second["os"] == first["os"]
    with pytest.raises(RpcError) as refused:
        take(box, build(members_of(archive), vm={"network": "lab"}), name="third")
    assert (refused.value.kind, "--network" in refused.value.data["hint"]) == ("not_found", True)


def test_a_new_identity_takes_nothing_from_anybody(box: Box, archive: bytes) -> None:
    with pytest.raises(RpcError) as refused:
        take(box, archive, new_identity=True)
    assert "can't be told" in refused.value.message
    assert box.traces() == {}
    manifest, *others = members_of(archive)
    content = build([manifest, ("kernel", b"kernel"), *others])
    first = take(box, content)
    second = take(box, content, name="my_copy", new_identity=True)
    for key in ("name", "ip", "mac", "uuid", "ssh_host_keys"):
        assert first[key] != second[key], key
    query = "SELECT seed_document, identified FROM vm WHERE name = 'my_copy'"
    ((document, identified),) = box.rows(query)
    told = {
        name: base64.b64decode(value).decode()
        for name, _, value in (line.partition("=") for line in document.splitlines())
    }
    assert (told["hostname"], told["address"], told["mac"]) == (
        "my-copy", second["ip"], second["mac"],
    )  # fmt: skip
    assert (told["keep_access"], told["host_key_ed25519_public"].strip()) == (
        "1", second["ssh_host_keys"][0],
    )  # fmt: skip
    assert not identified
    # Its kernel tells it to ask, until it has what it is told.
    for name, is_told in (("web", False), ("my_copy", True)):
        pid = box.call("vm_start", vm=name)["pid"]
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert any(f"oscloud.identity={second['uuid']}" in each for each in arguments) == is_told


def test_a_new_identity_by_cloud_init_is_another_seed(box: Box, archive: bytes) -> None:
    manifest, disk, sums = members_of(archive)
    content = build(
        [manifest, ("seed.iso", b"s" * 2048), disk, sums], template={"identity": "cloud-init"}
    )
    vm = take(box, content, new_identity=True)
    seed = (box.root / "state/disks" / str(vm["disk"]) / "seed.iso").read_bytes()
    for text in (vm["uuid"], vm["ip"], vm["mac"], vm["ssh_host_keys"][0]):
        assert text.encode() in seed
    assert box.rows("SELECT seed_document FROM vm") == [("",)]


def test_its_template_goes_with_the_last_that_needs_it(box: Box, archive: bytes) -> None:
    template = take(box, archive)["os"]
    info = box.call("template_info", template=template)
    assert (info["source"], info["used_by"]) == ("vm", 1)
    for method, params, words in (
        ("vm_create", {"name": "new", "image": template, "mem_size": "64M"}, "has no image"),
        ("template_warm", {"template": template, "mem_size": "64M"}, "can't be kept warm"),
    ):
        with pytest.raises(RpcError) as refused:
            box.call(method, **params)
        assert refused.value.kind == "invalid_argument"
        assert words in refused.value.message
    box.call("vm_delete", vm="web")
    box.end()
    box.start()
    box.until(lambda: len(box.call("template_list")) == 1, "housekeeping")


def test_a_running_vm_is_not_exported(box: Box) -> None:
    box.create("web")
    with pytest.raises(RpcError) as refused:
        export(box, "vm_export", vm="web")
    assert refused.value.kind == "invalid_state"
    assert "vm-stop web" in refused.value.data["hint"]


def bad_archives(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Give what is refused, and a piece of the reason."""
    members = members_of(good)
    manifest, disk, sums = (data for _name, data in members)
    yield "no archive of a vm", b"x" * 2000
    yield "no archive of a vm", bytes(2000)
    yield "is cut off", good[:100]
    yield "by its manifest", good[:-512]
    yield "by its manifest", good + bytes(512)
    yield "'disk.qcow2' with", pack(members[1:])
    yield "'../manifest.json' with", pack([("../manifest.json", manifest), *members[1:]])
    yield "more than 4194304 bytes", build_header("manifest.json", 1 << 40, 0)
    yield "can't be read", pack([("manifest.json", b"{}"), *members[1:]])
    yield "can't be read", pack([("manifest.json", b"[" * 100_000), *members[1:]])
    yield "can't be read", build(members, version=2)
    yield "can't be read", build(members, extra=1)
    yield "names other files", build([*members[:2], ("disk.qcow2", disk), members[2]])
    yield "names other files", build([*members[:2], ("../../etc/passwd", b"x"), members[2]])
    yield "names other files", build([members[0], ("/etc/passwd", disk), members[2]])
    yield "impossible size", build(members, members=[{"name": "disk.qcow2", "size": 2 << 40}])
    yield "impossible size", build(members, members=[{"name": "disk.qcow2", "size": -1}])
    yield "disk.qcow2 in it is damaged", pack([*members[:1], ("disk.qcow2", b"x" + disk[1:]),
                                               ("SHA256SUMS", sums)])  # fmt: skip
    yield "manifest.json in it is damaged", pack([
        ("manifest.json", manifest.replace(b'"web"', b'"wab"')), *members[1:],
    ])  # fmt: skip
    yield "is damaged", pack([*members[:2], ("SHA256SUMS", b"#" * len(sums))])
    yield "no ordinary file", as_link(good)
    for part, key, value in (
        ("vm", "uuid", "../x"), ("vm", "mac", "01:00:00:00:00:01"), ("vm", "cpus", 1 << 20),
        ("vm", "host_keys", "ssh-rsa nothing"), ("vm", "seed_document", "a=b\nrm -rf /\n"),
        ("vm", "mem_size", -1), ("vm", "name", "../x"), ("vm", "ip", "10.0.0.1"),
        ("vm", "autostart", "perhaps"), ("vm", "disk_size", 1 << 20),
        ("template", "name", "../x"), ("template", "cmdline", "a\nb"),
        ("template", "cmdline", "a" * 5000), ("template", "min_mem_size", "much"),
    ):  # fmt: skip
        yield "", build(members, **{part: {key: value}})


def as_link(archive: bytes) -> bytes:
    link = tarfile.TarInfo("manifest.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return link.tobuf(tarfile.GNU_FORMAT) + archive[512:]


def test_every_bad_file_is_refused_and_leaves_nothing(box: Box, archive: bytes) -> None:
    before = footprint(box)
    seen = 0
    for words, content in bad_archives(archive):
        with pytest.raises(RpcError) as refused:
            take(box, content)
        shown = (refused.value.message, words)
        assert refused.value.kind == "invalid_argument", shown
        assert refused.value.message.startswith("web.oscloud is refused: "), shown
        assert words in refused.value.message, shown
        clear = [name for name in footprint(box)["templates"] if "-import-" not in name]
        assert clear == before["templates"], shown
        assert box.traces() == {}, shown
        seen += 1
    assert seen > 30
    take(box, archive)


def test_every_bad_image_is_refused(box: Box, archive: bytes) -> None:
    victim = box.root / "victim"
    victim.write_bytes(bytes(1 << 20))
    members = members_of(archive)
    manifest, sums = members[0], members[2]
    for bad in BAD_IMAGES:
        content = bad.build(str(victim))
        if bad.length is not None or not content or bad.said == "raw":
            continue
        with pytest.raises(RpcError) as refused:
            take(box, build([manifest, ("disk.qcow2", content), sums]))
        assert refused.value.kind == "invalid_argument", bad.name
        assert "image disk.qcow2 is refused" in refused.value.message, bad.name
        assert box.traces() == {}, bad.name
    good = build([manifest, ("disk.qcow2", qcow2()), sums], vm={"disk_size": 64 << 20})
    assert take(box, good)["disk_size"] == 64 << 20


def test_kernel_initrd_and_seed_come_with_it(box: Box, archive: bytes) -> None:
    manifest, disk, sums = members_of(archive)
    others = [("kernel", b"kernel" * 99), ("initrd", b"initrd" * 999), ("seed.iso", b"s" * 2048)]
    settings = {"cmdline": 'root=/dev/vda "quoted" ü', "identity": "cloud-init"}
    content = build([manifest, *others, disk, sums], template=settings)
    vm = take(box, content)
    template = box.root / "state/templates" / vm["os"]
    assert {path.name for path in template.iterdir()} == {
        "kernel", "initrd", "disk.raw", "template.toml", "digest",
    }  # fmt: skip
    for name, data in others[:2]:
        assert (template / name).read_bytes() == data
    seed = box.root / "state/disks" / str(vm["disk"]) / "seed.iso"
    assert seed.read_bytes() == others[2][1]
    again, _answer = export(box, "vm_export", vm="web")
    assert [each for each in members_of(again) if each[0] in dict(others)] == others
    told = json.loads(dict(members_of(again))["manifest.json"])["template"]
    assert {key: told[key] for key in settings} == settings


def begin(box: Box, line: Line, content: bytes) -> int:
    """Send half of an archive; give the job."""
    request = {"jsonrpc": "2.0", "method": "vm_import", "id": 7,
               "params": {"size": len(content), "file_name": "web.oscloud"}}  # fmt: skip
    line.send(json.dumps(request).encode() + b"\n")
    job: int = wait_for(line, "progress")["params"]["job"]
    wait_for(line, "send")
    line.send(content[: len(content) // 2])
    box.until(lambda: len(box.call("vm_list")) == 1, "the vm's row")
    return job


def test_what_does_not_come_to_its_end_leaves_nothing(box: Box, archive: bytes) -> None:
    members = members_of(archive)
    large = [members[0], ("disk.qcow2", qcow2() + os.urandom(4 << 20)), members[2]]
    content = build(large, vm={"disk_size": 64 << 20})
    with box.connect() as line:
        job = begin(box, line, content)
        seen = box.call("vm_list")[0]
        assert (seen["name"], seen["state"]) == ("web", "CREATING")
        assert box.call("job_cancel", job=job)["state"] == "CANCELLED"
        with pytest.raises(RpcError) as cancelled:
            answer_on(line)
        assert cancelled.value.kind == "cancelled"
    assert box.traces() == {}
    with box.connect() as line:
        begin(box, line, content)
    box.until(lambda: box.call("vm_list") == [], "the vm's end")
    assert box.traces() == {}
    with box.connect() as line:
        begin(box, line, content)
        box.end(9)
    box.start()
    box.until(lambda: box.call("vm_list") == [], "the vm's end")
    assert box.traces() == {}
    assert take(box, content)["name"] == "web"


def test_a_disk_that_was_made_larger_while_it_was_off_is_as_large(box: Box) -> None:
    vm = stopped(box)
    box.call("disk_resize", disk=vm["disk"], size="64M")
    raw, _answer = export(box, "disk_export", disk=vm["disk"], format="raw")
    assert len(raw) == 64 << 20
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm="web")
    taken = take(box, build(without_kernel(content)))
    assert taken["disk_size"] == 64 << 20


def test_a_vm_that_was_imported_can_be_copied(box: Box, archive: bytes) -> None:
    web = take(box, archive)
    copy = box.call("vm_clone", vm="web", name="copy", wait="started")
    assert (copy["os"], copy["disk_size"]) == (web["os"], web["disk_size"])
    assert box.call("disk_info", disk=copy["disk"])["layers"] == 1
    assert box.call("vm_start", vm="web")["state"] == "RUNNING"


def test_a_template_of_any_name_may_be_made_meanwhile(box: Box, archive: bytes) -> None:
    manifest, disk, sums = members_of(archive)
    content = build([manifest, ("kernel", b"kernel" * 99), disk, sums])
    behind_kernel = content.index(b"kernel" * 99) + 512
    with box.connect() as line:
        ask(line, "vm_import", size=len(content), file_name="web.oscloud")
        job = wait_for(line, "progress")["params"]["job"]
        wait_for(line, "send")
        line.send(content[:behind_kernel])
        making = box.root / "state/templates"
        box.until(lambda: any(making.glob(".making-*/kernel")), "its kernel")
        send(box, f"import-{job}", qcow2(), os="linux")
        send_all(line, content[behind_kernel:])
        assert answer_on(line)["name"] == "web"
