"""What a template does in its guests at their first boot: as declared, as packed."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from oscloudd.cloud.template_files import FILES, ReadyTemplate, read_declaration
from oscloudd.cloud.template_hooks import hooks_of, pack_files
from oscloudd.errors import HostError
from oscloudd.guest.hooks import Hooks

BASICS = """\
description = "Mine"
os = "Mine 1"
[source]
kind = "download"
[guest]
identity = "cloud-init"
"""


def declare(directory: Path, more: str = "", basics: str = BASICS) -> Path:
    (directory / "template.toml").write_text(basics + more)
    return directory


def place(directory: Path, name: str, content: str = "x", mode: int = 0o644) -> None:
    path = directory / "files" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def packed(directory: Path) -> dict[str, tarfile.TarInfo]:
    archive = pack_files(directory, read_declaration(directory))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name: entry for entry in tar}


def test_files_are_roots_and_keep_their_mode(tmp_path: Path) -> None:
    declare(tmp_path, '[guest.files."/srv/key"]\nowner = "debian:users"\nmode = "0600"\n')
    place(tmp_path, "etc/update-motd.d/99-welcome", mode=0o755)
    place(tmp_path, "srv/key", mode=0o644)
    (tmp_path / "files/etc/link").symlink_to("hosts")
    if os.geteuid() == 0:
        os.chown(tmp_path / "files/srv/key", 1000, 1000)
    entries = packed(tmp_path)
    assert {name: entry.mode for name, entry in entries.items() if entry.isreg()} == {
        "etc/update-motd.d/99-welcome": 0o755,
        "srv/key": 0o600,
    }
    assert {(entry.uid, entry.gid, entry.uname) for entry in entries.values()} == {(0, 0, "root")}
    assert entries["etc/link"].linkname == "hosts"


def test_the_same_files_are_packed_the_same(tmp_path: Path) -> None:
    place(declare(tmp_path), "etc/one")
    declaration = read_declaration(tmp_path)
    archive = pack_files(tmp_path, declaration)
    assert archive[4:8] == bytes(4)  # RFC 1952, MTIME
    assert archive == pack_files(tmp_path, declaration)


def test_a_made_template_has_its_hooks(tmp_path: Path) -> None:
    declare(tmp_path, 'commands = ["one"]\n[guest.files."/a"]\nowner = "debian"\n')
    template = ReadyTemplate("mine", tmp_path, read_declaration(tmp_path), "sha256:0")
    assert hooks_of(template) == Hooks(b"", (("/a", "debian"),), ("one",))
    (tmp_path / FILES).write_bytes(b"packed")
    assert hooks_of(template).files == b"packed"


def test_a_file_that_is_declared_and_not_there_is_refused(tmp_path: Path) -> None:
    declare(tmp_path, '[guest.files."/etc/one"]\nmode = "0600"\n')
    with pytest.raises(HostError, match="declares '/etc/one'"):
        packed(tmp_path)


def test_files_too_large_for_a_seed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oscloudd.cloud.template_hooks._MOST_BYTES", 100)
    place(declare(tmp_path), "etc/one")
    with pytest.raises(HostError, match="more than 100"):
        packed(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        'commands = "one"\n',
        '[guest.files."/a"]\nmode = "rw"\n',
        '[guest.files."/a"]\nmode = "0999"\n',
        '[guest.files."/a"]\nowner = "a b"\n',
        '[guest.files."/a"]\nowner = "-R"\n',
        '[guest.files."/a"]\ngroup = "users"\n',
    ],
)
def test_a_mistake_in_a_declaration_is_refused(tmp_path: Path, more: str) -> None:
    with pytest.raises(HostError, match=r"template\.toml"):
        read_declaration(declare(tmp_path, more))


def test_firmware_is_for_images_that_boot_by_themselves(tmp_path: Path) -> None:
    uefi = '[boot]\nfirmware = "uefi"\n'
    assert read_declaration(declare(tmp_path, uefi)).boot.firmware == "uefi"
    with pytest.raises(HostError, match="kernel given directly"):
        read_declaration(declare(tmp_path, uefi + 'kernel = "vmlinuz"\n'))


def test_a_template_that_is_built_has_no_commands(tmp_path: Path) -> None:
    basics = BASICS.replace("cloud-init", "serial")
    with pytest.raises(HostError, match="for an identity by cloud-init"):
        read_declaration(declare(tmp_path, 'commands = ["one"]\n', basics))
