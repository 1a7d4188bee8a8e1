"""Images: overlays that hold."""

import asyncio
import io
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bad_images import qcow2

from oscloudd.errors import HostError
from oscloudd.host.image_header import is_blank, read_backing_name
from oscloudd.host.images import (
    build_overlay_argv,
    copy_overlay,
    copy_steady,
    create_overlay,
    publish,
    virtual_size_bytes,
)


def make(path: Path, *options: str, size: str = "8M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), size], check=True)
    return path


def describe(image: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(
        subprocess.check_output(["qemu-img", "info", "-f", "qcow2", "--output=json", str(image)])
    )
    return answer


def test_overlay_reads_the_base_and_is_larger(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "-f", "qcow2")
    overlay = tmp_path / "disk.qcow2"
    asyncio.run(create_overlay(overlay, base, "qcow2", 1 << 30))
    info = describe(overlay)
    assert (info["virtual-size"], info["backing-filename"]) == (1 << 30, str(base))
    assert info["backing-filename-format"] == "qcow2"
    assert info["actual-size"] < 1 << 20


def test_overlay_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"there is no .*/none for a disk"):
        asyncio.run(create_overlay(tmp_path / "disk", tmp_path / "none", "qcow2", 1 << 30))
    base = make(tmp_path / "base", "-f", "qcow2")
    with pytest.raises(HostError, match="qemu-img create failed with status 1"):
        asyncio.run(create_overlay(tmp_path / "disk", base, "nonsense", 1 << 30))
    base.unlink()
    assert os.listdir(tmp_path) == []


def test_what_is_gone_can_not_be_published(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"/none can't be written to disk: No such file"):
        publish(tmp_path / "none", tmp_path / "disk")


def test_an_overlay_is_made_beside_one_that_a_dead_daemon_had_begun(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "-f", "qcow2")
    begun = tmp_path / ".disk.qcow2.1.part"
    begun.write_bytes(b"half")
    asyncio.run(create_overlay(tmp_path / "disk.qcow2", base, "qcow2", 8 << 20))
    assert {path.name for path in tmp_path.iterdir()} == {base.name, "disk.qcow2"}


def test_a_copy_of_a_blank_overlay_is_one_of_its_own(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "-f", "qcow2")
    blank, overlay = tmp_path / "blank.qcow2", tmp_path / "disk.qcow2"
    asyncio.run(create_overlay(blank, base, "qcow2", 8 << 20))
    copy_overlay(overlay, blank)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4k", overlay], check=True)
    assert describe(overlay)["backing-filename"] == str(base)
    shown = subprocess.check_output(["qemu-io", "-f", "qcow2", "-c", "read -P 0 0 4k", blank])
    assert b"verification failed" not in shown


def test_an_overlay_is_blank_until_something_is_written(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "-f", "qcow2")
    overlay = tmp_path / "disk.qcow2"
    asyncio.run(create_overlay(overlay, base, "qcow2", 8 << 20))

    def looks_blank() -> bool:
        with overlay.open("rb") as file:
            return is_blank(file, overlay.stat().st_size)

    assert looks_blank()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read 0 4k", overlay], check=True)
    assert looks_blank()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -z 0 4k", overlay], check=True)
    assert not looks_blank()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        copy_overlay(tmp_path / "disk", tmp_path / "none")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_size_of_an_image_is_read_without_qemu_img(tmp_path: Path, image_format: str) -> None:
    image = make(tmp_path / "image", "-f", image_format, size="12M")
    assert virtual_size_bytes(image, image_format) == 12 << 20


def test_the_size_of_no_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        virtual_size_bytes(tmp_path / "none", "qcow2")


def test_what_an_image_says_it_stands_on(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(bytes(512))
    asyncio.run(create_overlay(overlay, base, "raw", 1 << 20))
    with overlay.open("rb") as image:
        assert read_backing_name(image) == str(base)
    # A guest that has taken its qemu over can write anything here.
    for changes in ({}, {"backing_offset": (1 << 64) - 1, "backing_bytes": (1 << 32) - 1}):
        assert read_backing_name(io.BytesIO(qcow2(**changes))) == ""


def test_names_given_to_qemu_img_are_never_protocols() -> None:
    argv = build_overlay_argv(Path("nbd:x"), Path("json:{}"), "raw", 1)
    assert all(name.startswith("/") for name in argv[-3:-1])


def test_a_file_that_is_being_written_to_is_copied_as_it_was_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = tmp_path / "variables.fd", tmp_path / "copy"
    source.write_bytes(b"old old")
    readings = [b"old old", b"new old", b"new new", b"new new"]
    monkeypatch.setattr(Path, "read_bytes", lambda _path: readings.pop(0))
    copy_steady(source, copy)
    monkeypatch.undo()
    assert (copy.read_bytes(), readings) == (b"new new", [])
    endless = itertools.count()
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"%d" % next(endless))
    with pytest.raises(HostError, match="written to all the time"):
        copy_steady(source, tmp_path / "other")
    monkeypatch.undo()
    with pytest.raises(HostError, match="none can't be copied"):
        copy_steady(tmp_path / "none", copy)
    assert sorted(os.listdir(tmp_path)) == ["copy", "variables.fd"]
