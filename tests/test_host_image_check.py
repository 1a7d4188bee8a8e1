"""Strangers' images: what is refused, why, at what cost, and that nothing else is opened for it."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_images import (
    BAD_IMAGES,
    CLUSTER,
    BadImage,
    backed_by,
    extension,
    header,
    qcow2,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host import commands, image_check
from oscloudd.host.image_check import ImageFormat, Judged, build_info_argv, check_image, judge_image
from oscloudd.host.image_formats import find_kind
from oscloudd.host.image_header import find_danger, parse_qcow2_header

NOBODY = "nobody" if os.geteuid() == 0 else None
CPU_SECONDS, ADDRESS_SPACE_BYTES = 2, 1 << 30
by_name = pytest.mark.parametrize("bad", BAD_IMAGES, ids=lambda bad: bad.name)

STRACE = ("strace", "-f", "-e", "trace=open,openat,openat2,execve", "-o")

# Judges what standard input names, one after the other as the daemon would, with an image's limits;
# says what each was refused with, and what that took.
JUDGE = """
import asyncio, json, resource, sys
from pathlib import Path
from oscloudd.errors import InvalidArgumentError
from oscloudd.host.image_check import check_image

def used():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
answers = []
for path, said, user in json.load(sys.stdin):
    before = used()
    try:
        answer = str(asyncio.run(check_image(Path(path), said, user)))
    except InvalidArgumentError as error:
        answer = error.message
    answers.append((answer, used() - before))
print(json.dumps(answers))
"""

# Stands in for qemu-img: says on its last line who it is, what it may use, and what it was given.
TELL = (
    sys.executable,
    "-Ic",
    "import os, resource, sys\n"
    "limits = [resource.getrlimit(what)[1] for what in (resource.RLIMIT_CPU, resource.RLIMIT_AS)]\n"
    "start = open(f'/proc/self/fd/{sys.argv[1]}', 'rb').read(3).decode()\n"
    "sys.exit(f'{os.getuid()} {limits[0]} {limits[1]} {start}')",
)


def check(path: Path, said: ImageFormat | None = None) -> Judged:
    path.chmod(0o444)
    return asyncio.run(check_image(path, said, NOBODY))


def make(path: Path, *options: str, size: str = "8M") -> Path:
    subprocess.run(["qemu-img", "create", "-q", *options, str(path), size], check=True)
    return path


@by_name
def test_it_is_refused_by_its_bytes_alone(bad: BadImage, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"\0" * 512)
    with pytest.raises(InvalidArgumentError) as refused:
        judge_image(bad.write(tmp_path, victim), bad.said)
    assert bad.reason in refused.value.message


@pytest.mark.parametrize(
    "options",
    [
        ("compat=1.1",), ("compat=0.10",), ("cluster_size=512",), ("cluster_size=2M",),
        ("extended_l2=on",), ("compression_type=zstd",), ("lazy_refcounts=on",),
        ("refcount_bits=1",), ("refcount_bits=64",), ("preallocation=metadata",),
    ],
    ids=str,
)  # fmt: skip
def test_what_qemu_makes_is_taken(tmp_path: Path, options: tuple[str, ...]) -> None:
    image = make(tmp_path / "image", "-f", "qcow2", *(f"-o{option}" for option in options))
    assert check(image, "qcow2") == check(image) == Judged("qcow2", 8 << 20)


def test_a_large_image_with_data_snapshots_and_bitmaps_is_taken(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "-f", "qcow2", size="1T")
    for command in ("write -P 1 0 1M", "write -P 2 900G 1M"):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, image], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", image, "changed"], check=True)
    assert check(image).virtual_size_bytes == 1 << 40


def test_the_honest_one_that_the_bad_ones_are_made_from_is_taken(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for honest in (
        qcow2(),
        qcow2(version=2),
        qcow2(snapshots=1, snapshots_offset=4 * CLUSTER, behind=snapshot()),
        qcow2(extension(0x12345678, b"what nobody knows"), extension(0)),
    ):
        image.unlink(missing_ok=True)
        image.write_bytes(honest)
        assert judge_image(image, "qcow2").virtual_size_bytes == 64 << 20
    image.unlink()
    image.write_bytes(qcow2())
    assert check(image, "qcow2").virtual_size_bytes == 64 << 20


def test_a_raw_disk_is_taken_by_its_boot_record_or_by_word(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(510) + b"\x55\xaa" + bytes(1 << 20))
    assert check(image).format == "raw"
    image.chmod(0o644)
    image.write_bytes(json.dumps({"driver": "file", "filename": "/etc/shadow"}).encode() * 512)
    assert check(image, "raw").format == "raw"


def test_what_is_refused_is_named_with_what_to_do(tmp_path: Path) -> None:
    image = tmp_path / "disk.vmdk"
    image.write_bytes(b"KDMV" + bytes(1000))
    with pytest.raises(InvalidArgumentError, match=r"disk\.vmdk is refused: it is a VMDK") as error:
        check(image)
    assert error.value.hint == "convert it first: qemu-img convert -O qcow2"


def test_qemu_img_is_asked_as_nobody_and_under_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(qcow2())
    monkeypatch.setattr(image_check, "build_info_argv", lambda fd, _format: [*TELL, str(fd)])
    with pytest.raises(InvalidArgumentError, match="qemu-img does not take it") as refused:
        check(image)
    user = 65534 if NOBODY else os.geteuid()
    assert refused.value.message.endswith(f"{user} {CPU_SECONDS} {ADDRESS_SPACE_BYTES} QFI")


def test_it_is_not_the_images_fault_where_qemu_img_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(qcow2())
    monkeypatch.setattr(commands, "start_process", _missing)
    with pytest.raises(HostError, match="can't be started"):
        check(image)


def test_qemu_img_gets_the_format_told_and_no_name_of_ours() -> None:
    argv = build_info_argv(7, "raw")
    assert argv[argv.index("-f") + 1] == "raw"
    assert argv[-1] == "/proc/self/fd/7"


def test_all_are_refused_within_two_seconds_and_a_gibibyte_each(tmp_path: Path) -> None:
    answers = judge_all(tmp_path, tmp_path / "victim")
    for bad, (answer, used) in zip(BAD_IMAGES, answers, strict=True):
        assert bad.reason in answer, bad.name
        assert used < CPU_SECONDS, bad.name


def test_no_file_that_an_image_names_is_opened(tmp_path: Path) -> None:
    victim = tmp_path / "the-named-file"
    trace = tmp_path / "trace"
    # A file that is there: one that is missing could be passed over for that.
    victim.write_bytes(bytes(1 << 20))
    judge_all(tmp_path, victim, *STRACE, str(trace))
    seen = trace.read_text()
    for bad in BAD_IMAGES:
        assert f"/{bad.name}.img" in seen
    assert victim.name not in seen
    # Our own code refuses them all, before qemu's tools have seen any.
    assert "qemu-img" not in seen


def test_the_trace_would_show_it(tmp_path: Path) -> None:
    victim, image, trace = tmp_path / "the-named-file", tmp_path / "image", tmp_path / "trace"
    victim.write_bytes(bytes(1 << 20))
    image.write_bytes(backed_by(str(victim)))
    careless = ["qemu-img", "info", "--backing-chain", "-f", "qcow2", str(image)]
    subprocess.run([*STRACE, str(trace), *careless], check=True, capture_output=True)
    assert victim.name in trace.read_text()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 111))
def test_no_header_is_too_strange_to_be_judged(noise: bytes, place: int) -> None:
    data = bytearray(header() + bytes(8))
    data[place : place + len(noise)] = noise
    with contextlib.suppress(InvalidArgumentError):
        find_danger(parse_qcow2_header(bytes(data)), 5 * CLUSTER)
    find_kind(noise, noise)


def judge_all(directory: Path, victim: Path, *wrapper: str) -> list[tuple[str, float]]:
    """Judge every bad image in a process with an image's limits; give answers and seconds."""
    todo = []
    for bad in BAD_IMAGES:
        path = bad.write(directory, victim)
        path.chmod(0o444)
        todo.append([str(path), bad.said, NOBODY])
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", JUDGE],
        input=json.dumps(todo),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[tuple[str, float]] = json.loads(done.stdout)
    return answers


def _missing(argv: list[str], **_options: object) -> None:
    raise HostError(f"{argv[0]} can't be started: there is none")
