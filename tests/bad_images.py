"""Images a stranger might send, built from bytes: one that is honest, and many that are not.

Each bad one has a name, what it is said to be, and a piece of the reason it is refused with.
Those that name a file of the host name `victim`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oscloudd.host.image_check import ImageFormat

CLUSTER = 65536
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_FIELDS = (
    "magic", "version", "backing_offset", "backing_bytes", "cluster_bits", "size", "crypt",
    "l1_entries", "l1_offset", "refcount_offset", "refcount_clusters", "snapshots",
    "snapshots_offset", "features", "compatible", "autoclear", "refcount_order", "length",
)  # fmt: skip

BACKING_FORMAT, DATA_FILE, CRYPTO, BITMAPS = 0xE2792ACA, 0x44415441, 0x0537BE77, 0x23852875


def header(**changes: int) -> bytes:
    """Give the header of an honest, empty disk of 64 MiB, but for `changes`."""
    fields = {
        "magic": b"QFI\xfb", "version": 3, "cluster_bits": 16, "size": 64 << 20,
        "l1_entries": 1, "l1_offset": 3 * CLUSTER, "refcount_offset": CLUSTER,
        "refcount_clusters": 1, "refcount_order": 4, "length": 104, **changes,
    }  # fmt: skip
    values = [fields.get(name, 0) for name in _FIELDS]
    start = _V2.pack(*values[:13])
    return start if fields["version"] == 2 else start + _V3.pack(*values[13:])


def extension(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def qcow2(
    *extensions: bytes, behind: bytes = b"", l1: int = 0, length: int | None = None, **changes: int
) -> bytes:
    """Give a whole qcow2 of five clusters; qemu itself takes it where nothing is changed."""
    first = header(**changes) + b"".join(extensions)
    image = bytearray(5 * CLUSTER)
    image[: len(first)] = first
    image[CLUSTER : CLUSTER + 8] = (2 * CLUSTER).to_bytes(8, "big")
    for cluster in range(4):
        image[2 * CLUSTER + 2 * cluster + 1] = 1
    image[3 * CLUSTER : 3 * CLUSTER + 8] = l1.to_bytes(8, "big")
    image[4 * CLUSTER : 4 * CLUSTER + len(behind)] = behind
    return bytes(image[:length])


def snapshot(l1_offset: int = 3 * CLUSTER, l1_entries: int = 1, extra: int = 0) -> bytes:
    return struct.pack(">QIHHIIQII", l1_offset, l1_entries, 1, 1, 0, 0, 0, 0, extra) + b"1s" + b"\0"


def backed_by(victim: str, **changes: int) -> bytes:
    """Name a file of the host as backing file."""
    name = victim.encode()
    return qcow2(
        extension(BACKING_FORMAT, b"raw"), extension(0), name,
        backing_offset=104 + 16 + 8, backing_bytes=len(name), **changes,
    )  # fmt: skip


def data_in(victim: str, **changes: int) -> bytes:
    """Name a file of the host as the file with the data."""
    return qcow2(extension(DATA_FILE, victim.encode()), extension(0), **changes)


@dataclass(frozen=True)
class BadImage:
    name: str
    reason: str
    build: Callable[[str], bytes]
    said: ImageFormat | None = None
    length: int | None = None  # a sparse file's

    def write(self, directory: Path, victim: Path) -> Path:
        path = directory / f"{self.name}.img"
        path.write_bytes(self.build(str(victim)))
        if self.length is not None:
            with path.open("r+b") as file:
                file.truncate(self.length)
        return path


def _of(data: bytes) -> Callable[[str], bytes]:
    return lambda _victim: data


def _at(offset: int, mark: bytes, size: int = 1 << 17) -> Callable[[str], bytes]:
    return _of((bytes(offset) + mark).ljust(size, b"\0"))


def _vmdk(victim: str) -> bytes:
    return (
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 2048 FLAT "{victim}" 0\n'
    ).encode()


def _with_length(length: int, compression: int = 0, **changes: int) -> bytes:
    """Say another length of the header, and the way of compression that comes behind it."""
    image = qcow2(**changes)
    return image[:100] + length.to_bytes(4, "big") + bytes([compression]) + image[105:]


_NEST = extension(0x12345678) * 40
_COMPRESSED = 1 << 3

BAD_IMAGES = (
    BadImage("backing", "names a backing file", backed_by),
    BadImage("backing-json", "names a backing file", lambda victim: backed_by(
        f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{victim}"}}}}')),
    BadImage("backing-v2", "names a backing file", lambda victim: backed_by(victim, version=2)),
    BadImage("backing-format", "the format of a backing file",
             _of(qcow2(extension(BACKING_FORMAT, b"raw"), extension(0)))),
    BadImage("data-file", "keeps its data in another file",
             lambda victim: data_in(victim, features=1 << 2)),
    BadImage("data-file-name", "another file for its data", data_in),
    # CVE-2024-4467: the name of the data file is itself a description with files in it.
    BadImage("data-file-json", "keeps its data in another file", lambda victim: data_in(
        f'json:{{"driver":"qcow2","file.filename":"{victim}"}}', features=1 << 2)),
    BadImage("encrypted", "encrypted", _of(qcow2(crypt=2))),
    BadImage("encrypted-aes", "encrypted", _of(qcow2(crypt=1, version=2))),
    BadImage("crypto-header", "encrypted", _of(qcow2(extension(CRYPTO, bytes(16))))),
    BadImage("dirty", "not closed properly", _of(qcow2(features=1))),
    BadImage("corrupt", "marked as corrupt", _of(qcow2(features=2))),
    BadImage("unknown-feature", "does not know", _of(qcow2(features=1 << 5))),
    BadImage("last-feature", "does not know", _of(qcow2(features=1 << 63))),
    BadImage("version-4", "version 4", _of(qcow2(version=4))),
    BadImage("version-1", "version 1", _of(qcow2(version=1))),
    BadImage("no-size", "zero or above 1 TiB", _of(qcow2(size=0))),
    BadImage("2-tib", "zero or above 1 TiB", _of(qcow2(size=2 << 40))),
    BadImage("8-eib", "zero or above 1 TiB", _of(qcow2(size=(1 << 64) - 1))),
    BadImage("cluster-1", "cluster size", _of(qcow2(cluster_bits=0))),
    BadImage("cluster-4m", "cluster size", _of(qcow2(cluster_bits=22))),
    BadImage("cluster-huge", "cluster size", _of(qcow2(cluster_bits=(1 << 32) - 1))),
    BadImage("extended-small", "too small for the extended",
             _of(qcow2(features=1 << 4, cluster_bits=13))),
    BadImage("refcount-wide", "refcounts", _of(qcow2(refcount_order=7))),
    BadImage("header-short", "impossible length", _of(_with_length(72))),
    BadImage("header-long", "impossible length",
             _of(_with_length(1 << 31))),
    BadImage("compressed-unmarked", "compressed in a way",
             _of(_with_length(112, compression=1))),
    BadImage("compressed-unknown", "compressed in a way",
             _of(_with_length(112, compression=2, features=_COMPRESSED))),
    BadImage("compressed-missing", "compressed in a way", _of(qcow2(features=_COMPRESSED))),
    BadImage("l1-huge", "(L1) has an impossible size", _of(qcow2(l1_entries=(1 << 32) - 1))),
    BadImage("l1-small", "(L1) has an impossible size", _of(qcow2(l1_entries=0))),
    BadImage("l1-beyond", "(L1) lies outside", _of(qcow2(l1_offset=1 << 40))),
    BadImage("l1-overflow", "(L1) lies outside", _of(qcow2(l1_offset=(1 << 64) - CLUSTER))),
    BadImage("l1-in-header", "(L1) lies outside", _of(qcow2(l1_offset=0))),
    BadImage("l1-askew", "(L1) lies outside", _of(qcow2(l1_offset=3 * CLUSTER + 8))),
    BadImage("l2-beyond", "points outside", _of(qcow2(l1=1 << 63 | 1 << 40))),
    BadImage("refcount-none", "refcount table has an impossible",
             _of(qcow2(refcount_clusters=0))),
    BadImage("refcount-huge", "refcount table has an impossible",
             _of(qcow2(refcount_clusters=(1 << 32) - 1))),
    BadImage("refcount-beyond", "refcount table lies outside",
             _of(qcow2(refcount_offset=1 << 50))),
    BadImage("snapshots-deep", "more than 16 snapshots",
             _of(qcow2(snapshots=65536, snapshots_offset=4 * CLUSTER))),
    BadImage("snapshots-beyond", "snapshots lies outside",
             _of(qcow2(snapshots=1, snapshots_offset=1 << 40))),
    BadImage("snapshots-cut", "snapshots lies outside", _of(qcow2(
        snapshots=2, snapshots_offset=4 * CLUSTER, behind=snapshot(), length=4 * CLUSTER + 50))),
    BadImage("snapshot-l1-beyond", "has its table outside", _of(qcow2(
        snapshots=1, snapshots_offset=4 * CLUSTER, behind=snapshot(l1_offset=1 << 41)))),
    BadImage("snapshot-l1-huge", "has its table outside", _of(qcow2(
        snapshots=1, snapshots_offset=4 * CLUSTER, behind=snapshot(l1_entries=(1 << 32) - 1)))),
    BadImage("snapshot-extra", "more to say", _of(qcow2(
        snapshots=1, snapshots_offset=4 * CLUSTER, behind=snapshot(extra=(1 << 32) - 1)))),
    BadImage("extensions-many", "more than 32 extensions", _of(qcow2(_NEST))),
    BadImage("extension-long", "does not fit",
             _of(qcow2(struct.pack(">II", 0x12345678, (1 << 32) - 1)))),
    BadImage("bitmaps-beyond", "directory of bitmaps",
             _of(qcow2(extension(BITMAPS, struct.pack(">IIQQ", 1, 0, 64, 1 << 40))))),
    BadImage("bitmaps-short", "directory of bitmaps", _of(qcow2(extension(BITMAPS, bytes(8))))),
    BadImage("cut-off", "lies outside", _of(qcow2(length=2 * CLUSTER))),
    BadImage("header-only", "cut off", _of(header()[:80])),
    BadImage("empty", "empty", _of(b"")),
    BadImage("sparse", "longer than 1 TiB", _of(qcow2()), length=2 << 40),
    BadImage("sparse-raw", "longer than 1 TiB", _of(b"\0"), said="raw", length=2 << 40),
    BadImage("not-qcow2", "does not start like one", _of(bytes(1 << 16)), said="qcow2"),
    BadImage("vmdk-as-qcow2", "said to be qcow2, and is a VMDK", _vmdk, said="qcow2"),
    BadImage("raw-is-qcow2", "said to be raw, and is a qcow2", _of(qcow2()), said="raw"),
    BadImage("raw-is-backed", "said to be raw, and is a qcow2", backed_by, said="raw"),
    BadImage("vmdk", "said to be raw, and is a VMDK", _vmdk, said="raw"),
    BadImage("vmdk-no-title", "is a VMDK",
             lambda victim: b"#\n\n" + _vmdk(victim).partition(b"\n")[2], said="raw"),
    BadImage("vmdk-sparse", "is a VMDK", _at(0, b"KDMV"), said="raw"),
    BadImage("vmdk-esx", "is a VMDK", _at(0, b"COWD"), said="raw"),
    BadImage("vdi", "is a VDI", _at(64, b"\x7f\x10\xda\xbe"), said="raw"),
    BadImage("vhdx", "is a VHDX", _at(0, b"vhdxfile"), said="raw"),
    BadImage("vhd", "is a VHD", _at(0, b"conectix"), said="raw"),
    BadImage("vhd-fixed", "is a VHD", _of(bytes(1 << 16) + b"conectix" + bytes(504)), said="raw"),
    BadImage("dmg", "is a DMG", _of(bytes(1 << 16) + b"koly" + bytes(508)), said="raw"),
    BadImage("qed", "is a QED", _at(0, b"QED\0"), said="raw"),
    BadImage("luks", "an encrypted LUKS", _at(0, b"LUKS\xba\xbe"), said="raw"),
    BadImage("parallels", "is a Parallels", _at(0, b"WithoutFreeSpace"), said="raw"),
    BadImage("parallels-2", "is a Parallels", _at(0, b"WithouFreSpacExt"), said="raw"),
    BadImage("bochs", "is a Bochs", _at(0, b"Bochs Virtual HD Image"), said="raw"),
    BadImage("cloop", "is a cloop",
             _at(0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"), said="raw"),
    BadImage("iso", "it is an ISO", _at(32769, b"CD001")),
    BadImage("gzip", "it is a gzip", _at(0, b"\x1f\x8b\x08")),
    BadImage("xz", "it is an xz", _at(0, b"\xfd7zXZ\0")),
    BadImage("zstd", "it is a zstd", _at(0, b"\x28\xb5\x2f\xfd")),
    BadImage("zip", "it is a zip", _at(0, b"PK\x03\x04")),
    BadImage("ova", "it is a tar", _at(257, b"ustar")),
    BadImage("web-page", "it is a web page", _of(b"\n<!DOCTYPE html><title>404</title>")),
    BadImage("anything", "nothing in it tells", _at(0, b"root:x:0:0:")),
)  # fmt: skip
