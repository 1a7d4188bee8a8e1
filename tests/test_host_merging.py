"""Two images made one: it reads as both did, whatever they had, lacked, or had as zeros."""

import asyncio
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_host_flatten import NOBODY, needs_root, small_disk

from oscloudd.errors import ExhaustedError, HostError
from oscloudd.host.image_chain import Layer, OpenLayer, measure, open_chain
from oscloudd.host.image_header import read_backing_name
from oscloudd.host.merging import build_merge_argv, merge

BASE, LOWEST, LOWER, UPPER = "base.raw", "lowest.qcow2", "lower.qcow2", "upper.qcow2"
# Whole clusters of 64 KiB and parts of them, written, zeroed and given back, over one another.
WRITTEN: dict[str, tuple[str, Sequence[str]]] = {
    LOWEST: ("8M", ["write -P 2 1M 64k", "write -z 2M 64k", "write -P 2 7M 1M"]),
    LOWER: ("8M", ["write -P 3 4M 128k", "write -P 3 1M 2k", "write -z 3M 4k", "write -z 7M 64k"]),
    UPPER: (
        "12M",
        ["write -P 4 4M 2k", "write -z 4100k 4k", "write -P 4 5M 2k", "write -z -u 6M 2k",
         "write -z 1M 2k", "discard 4160k 64k", "write -P 4 10M 2k", "write -P 4 7200k 2k"],
    ),
}  # fmt: skip


def make_chain(directory: Path) -> list[Layer]:
    """Make three overlays as disks are made, the top first, on a base that is not zero."""
    base = directory / BASE
    base.write_bytes(b"\1" * (8 << 20))
    chain = [Layer(base, "raw")]
    for name, (size, commands) in WRITTEN.items():
        below, path = chain[0], directory / name
        told = ["-o", "extended_l2=on", "-F", below.format, "-b", str(below.path)]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *told, path, size], check=True)
        for command in commands:
            write(path, command)
        path.chmod(0o400)
        chain.insert(0, Layer(path, "qcow2"))
    return chain


def write(path: Path, command: str) -> None:
    argv = ["qemu-io", "-f", "qcow2", "-c", command, path]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def read(path: Path) -> bytes:
    raw = path.with_suffix(".read")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def merge_upper(chain: list[Layer], destination: Path | None = None) -> None:
    with open_chain(chain) as opened:
        asyncio.run(merge(opened, destination or chain[0].path, NOBODY, on_fraction=print))


def test_nothing_but_what_is_told_counts() -> None:
    chain = [OpenLayer(8, "qcow2"), OpenLayer(9, "qcow2"), OpenLayer(10, "raw")]
    file = '"file":{"driver":"file","filename":"/proc/self/fd/'
    assert build_merge_argv(chain) == [
        "qemu-img", "commit", "-d", "-p", "-t", "writeback",
        f'json:{{"driver":"qcow2",{file}8"}},"backing":{{"driver":"qcow2",{file}9"}},'
        f'"backing":{{"driver":"raw",{file}10"}}}}}}}}',
    ]  # fmt: skip


def test_it_reads_as_both_did(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    before = read(chain[0].path)
    lower = chain[1].path.read_bytes()
    for _ in range(2):  # a daemon that died may have had it done
        merge_upper(chain)
        assert read(chain[0].path) == before
    assert chain[1].path.read_bytes() == lower
    with chain[0].path.open("rb") as image:
        assert read_backing_name(image) == str(tmp_path / LOWEST)
    chain[1].path.unlink()
    assert read(chain[0].path) == before
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", chain[0].path], check=True)
    assert chain[0].path.stat().st_mode & 0o777 == 0o400
    assert {path.name for path in tmp_path.iterdir()} == {BASE, LOWEST, UPPER, "upper.read"}


def test_the_lowest_may_be_one_of_them(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    top, second = read(chain[0].path), read(chain[1].path)
    merge_upper(chain[1:])
    assert (read(chain[0].path), read(chain[1].path)) == (top, second)


def test_one_that_is_written_to_is_not_measured(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    argv = ["qemu-io", "-f", "qcow2", chain[0].path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.read(8) == b"qemu-io>"
        with open_chain(chain) as opened, pytest.raises(HostError, match="measure") as error:
            asyncio.run(measure(opened[:2], NOBODY))
        assert "another process using the image" in error.value.details["output"]
        writer.stdin.close()


@needs_root
def test_a_full_disk_leaves_all_as_it_was(tmp_path: Path) -> None:
    chain = make_chain(tmp_path)
    chain[1].path.chmod(0o600)
    write(chain[1].path, "write -P 9 0 4M")
    small = tmp_path / "small"
    with small_disk(small):
        with pytest.raises(ExhaustedError):
            merge_upper(chain, small / "upper.qcow2")
        assert list(small.iterdir()) == []
        assert os.statvfs(small).f_bfree > 200
