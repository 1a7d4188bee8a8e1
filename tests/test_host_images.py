"""Images: overlays that hold, strangers' headers that don't get past."""

import asyncio
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.images import (
    build_overlay_argv,
    check_downloaded_image,
    convert,
    copy_overlay,
    create_overlay,
    find_danger,
    image_info,
    parse_qcow2_header,
    virtual_size_bytes,
)


def make(path: Path, *options: str, size: str = "8M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), size], check=True)
    return path


def test_overlay_reads_the_base_and_is_larger(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "-f", "qcow2")
    overlay = tmp_path / "disk.qcow2"
    asyncio.run(create_overlay(overlay, base, "qcow2", 1 << 30))
    info = asyncio.run(image_info(overlay, "qcow2"))
    assert (info.virtual_size_bytes, info.format, info.backing) == (1 << 30, "qcow2", str(base))
    assert info.actual_size_bytes < 1 << 20


def test_overlay_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="qemu-img create failed with status 1"):
        asyncio.run(create_overlay(tmp_path / "disk", tmp_path / "none", "qcow2", 1 << 30))
    assert os.listdir(tmp_path) == []


def test_a_copy_of_a_blank_overlay_is_one_of_its_own(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2", "-f", "qcow2")
    blank, overlay = tmp_path / "blank.qcow2", tmp_path / "disk.qcow2"
    asyncio.run(create_overlay(blank, base, "qcow2", 8 << 20))
    copy_overlay(overlay, blank)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4k", overlay], check=True)
    assert asyncio.run(image_info(overlay, "qcow2")).backing == str(base)
    shown = subprocess.check_output(["qemu-io", "-f", "qcow2", "-c", "read -P 0 0 4k", blank])
    assert b"verification failed" not in shown


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


def test_names_given_to_qemu_img_are_never_protocols() -> None:
    argv = build_overlay_argv(Path("nbd:x"), Path("json:{}"), "raw", 1)
    assert all(name.startswith("/") for name in argv[-3:-1])


def test_convert_appears_whole_and_reports(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"content" * 10_000)
    fractions: list[float] = []
    destination = tmp_path / "disk.qcow2"
    asyncio.run(convert(source, "raw", destination, on_fraction=fractions.append))
    assert fractions[-1] == 1.0
    assert asyncio.run(image_info(destination, "qcow2")).virtual_size_bytes == 70144
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "disk.raw"]


def test_convert_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"no qcow2")
    with pytest.raises(HostError, match="qemu-img convert"):
        asyncio.run(convert(source, "qcow2", tmp_path / "disk.qcow2"))
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_a_plain_image_is_taken(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "-f", "qcow2")
    assert asyncio.run(check_downloaded_image(image, "qcow2")).virtual_size_bytes == 8 << 20
    old = make(tmp_path / "old", "-f", "qcow2", "-o", "compat=0.10")
    assert asyncio.run(check_downloaded_image(old, "qcow2")).format == "qcow2"


def test_a_backing_file_is_refused_before_qemu_img_sees_it(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "-f", "qcow2", "-u", "-F", "raw", "-b", "/etc/shadow")
    with pytest.raises(InvalidArgumentError, match="it names a backing file"):
        asyncio.run(check_downloaded_image(image, "qcow2"))


def test_a_data_file_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    image = make(tmp_path / "image", "-f", "qcow2", "-o", f"data_file={data}")
    with pytest.raises(InvalidArgumentError, match="keeps its data in another file"):
        asyncio.run(check_downloaded_image(image, "qcow2"))


def test_encryption_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "-f", "qcow2")
    with image.open("r+b") as file:
        file.seek(32)  # crypt_method; making a real LUKS header takes two seconds
        file.write((2).to_bytes(4, "big"))
    with pytest.raises(InvalidArgumentError, match="it is encrypted"):
        asyncio.run(check_downloaded_image(image, "qcow2"))


def header(
    *, version: int = 3, cluster_bits: int = 16, size: int = 1 << 30, bits: int = 0
) -> bytes:
    start = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        0,
        0,
        cluster_bits,
        size,
        0,
        1,
        65536,
        131072,
        1,
        0,
        0,
    )
    return start + struct.pack(">QQQII", bits, 0, 0, 4, 104)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(size=0), "zero or above 1 TiB"),
        (header(size=1 << 62), "zero or above 1 TiB"),
        (header(cluster_bits=40), "cluster size"),
        (header(bits=1), "not closed properly"),
        (header(bits=2), "marked as corrupt"),
        (header(bits=4), "another file"),
        (header(bits=1 << 63), "features this program does not know"),
    ],
)
def test_dangerous_headers_are_named(data: bytes, reason: str) -> None:
    danger = find_danger(parse_qcow2_header(data))
    assert danger is not None
    assert reason in danger


def test_harmless_header_is_no_danger() -> None:
    assert find_danger(parse_qcow2_header(header())) is None
    # Bit 3 is the compression type, bit 4 extended L2 entries: both stay inside the image.
    assert find_danger(parse_qcow2_header(header(bits=0b11000))) is None


@pytest.mark.parametrize(
    "data", [b"", b"QFI\xfb", b"<html>" * 50, header(version=4), header()[:80]], ids=repr
)
def test_what_is_no_qcow2_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_qcow2_header(data)


def test_raw_needs_no_header(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(json.dumps({"driver": "file", "filename": "/etc/shadow"}).encode() * 512)
    assert asyncio.run(check_downloaded_image(image, "raw")).format == "raw"
