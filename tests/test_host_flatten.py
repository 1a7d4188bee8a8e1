"""Chains of images made one: what qemu-img is told, and what a full disk says."""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oscloudd.errors import ExhaustedError, HostError
from oscloudd.host.flatten import build_flatten_argv, flatten
from oscloudd.host.image_chain import Layer, OpenLayer, measure, open_chain

NOBODY = "nobody" if os.geteuid() == 0 else None
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def make_chain(directory: Path) -> list[Layer]:
    """Make a raw image, and two overlays on it, each with one block of its own."""
    base, middle, top = (directory / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    base.write_bytes(b"base".ljust(512, b"\0") * 256)
    for path, below, kind, offset in ((middle, base, "raw", 0), (top, middle, "qcow2", 4096)):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind, "-b", below, path, "1M"],
            check=True,
        )
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {offset >> 12 | 64} {offset} 512", path],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        path.chmod(0o600)
    return [Layer(top, "qcow2"), Layer(middle, "qcow2"), Layer(base, "raw")]


def flattened(chain: list[Layer], directory: Path | None = None) -> bytes:
    fractions: list[float] = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as image:
        with open_chain(chain) as opened:
            work = flatten(opened, image.fileno(), "raw", NOBODY, on_fraction=fractions.append)
            asyncio.run(work)
        assert fractions[-1] == 1.0
        return image.read()


def test_the_chain_is_told_whole() -> None:
    chain = [OpenLayer(8, "qcow2"), OpenLayer(9, "raw")]
    assert build_flatten_argv(chain, 10, "qcow2") == [
        "qemu-img", "convert", "-p", "-t", "writeback", "-O", "qcow2",
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"/proc/self/fd/8"},'
        '"backing":{"driver":"raw","file":{"driver":"file","filename":"/proc/self/fd/9"}}}',
        "/proc/self/fd/10",
    ]  # fmt: skip
    alone = build_flatten_argv(chain[:1], 10, "raw")
    assert alone[-2].endswith('"backing":null}')


def test_every_layer_is_read(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    content = flattened(chain)
    assert len(content) == 1 << 20
    assert content[:512] == b"\x40" * 512
    assert content[512:516] == b"base"
    assert content[4096:4608] == b"\x41" * 512
    assert content[128 << 10 :].strip(b"\0") == b""
    with open_chain(chain) as opened:
        assert 0 < asyncio.run(measure(opened, NOBODY)) < 2 << 20
    # Whoever may read the file by its descriptor has no way to its name.
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_the_word_of_a_file_for_its_base_does_not_count(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-F", "raw", "-b", "/etc/passwd", "-f", "qcow2",
         chain[1].path], check=True,
    )  # fmt: skip
    assert flattened(chain)[512:516] == b"base"


def test_what_can_not_be_read_is_named(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    with pytest.raises(HostError, match=r"none\.qcow2 can't be read: No such file"):
        flattened([Layer(tmp_path / "none.qcow2", "qcow2"), *chain[1:]])
    chain[1].path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(4096, b"\0"))
    with pytest.raises(HostError, match="qemu-img convert failed"):
        flattened(chain)


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    directory.mkdir()
    options = ["-o", "size=1M,mode=0700"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@needs_root
def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(os.urandom(4 << 20))
    with small_disk(tmp_path / "small"), pytest.raises(ExhaustedError) as full:
        flattened([Layer(source, "raw")], tmp_path / "small")
    assert full.value.details["resource"] == "disk"
