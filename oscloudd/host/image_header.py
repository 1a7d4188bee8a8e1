"""A qcow2's header and tables, read from its bytes, and why a stranger's may not be opened.

Our own code, because a qcow2 can name any file of the host as its backing or data file, and the
tools that read it have been holes themselves (CVE-2024-4467). Reads; starts no program.

Layout and limits are those of docs/interop/qcow2.txt and block/qcow2.h of qemu 7.2.
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from oscloudd.errors import InvalidArgumentError

# Larger than any vendor's cloud image by two orders of magnitude.
MAX_SIZE_BYTES = 1 << 40
# Version 2 has 72 bytes, version 3 adds what follows, and the compression type behind that.
HEADER_BYTES = 112
_HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQII")
_HEADER_V3_BYTES = _HEADER_V2.size + _HEADER_V3.size
_MAGIC = b"QFI\xfb"

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = 0b11111
_KNOWN_COMPRESSIONS = (0, 1)  # zlib, zstd
_MIN_EXTENDED_L2_BITS = 14
_MAX_CLUSTER_BITS = 21
_MAX_REFCOUNT_ORDER = 6
_MAX_L1_BYTES = 32 << 20
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20
_OFFSET_MASK = 0x00FFFFFFFFFFFE00

_EXTENSION = struct.Struct(">II")
_MAX_EXTENSIONS = 32
_END, _BITMAPS = 0, 0x23852875
_BAD_EXTENSIONS = {
    0xE2792ACA: "it names the format of a backing file",
    0x44415441: "it names another file for its data",
    0x0537BE77: "it is encrypted",
}

# A template is one disk as it stands: what it was before is of no use to anybody.
_MAX_SNAPSHOTS = 16
_MAX_SNAPSHOT_EXTRA_BYTES = 1024
_SNAPSHOT = struct.Struct(">QIHHIIQII")


@dataclass(frozen=True)
class Qcow2Header:
    """The fields of a qcow2 header that decide whether the image may be opened."""

    version: int
    virtual_size_bytes: int
    cluster_bits: int
    backing_offset: int
    backing_bytes: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    refcount_order: int = 4
    length_bytes: int = _HEADER_V2.size
    compression_type: int = 0

    @property
    def cluster_bytes(self) -> int:
        """The unit in which the file is laid out."""
        return 1 << self.cluster_bits

    @property
    def least_l1_entries(self) -> int:
        """How many tables it takes to cover the whole disk."""
        entry_bytes = 16 if self.incompatible_features & _EXTENDED_L2 else 8
        covered = self.cluster_bytes * (self.cluster_bytes // entry_bytes)
        return -(-self.virtual_size_bytes // covered)


def parse_qcow2_header(header: bytes) -> Qcow2Header:
    """Read the first bytes of a qcow2; raise InvalidArgumentError when they are none's."""
    if len(header) < _HEADER_V2.size or header[:4] != _MAGIC:
        raise InvalidArgumentError("this is not a qcow2 image: it does not start like one")
    fields = _HEADER_V2.unpack_from(header)
    version = fields[1]
    if version not in (2, 3) or (version == 3 and len(header) < _HEADER_V3_BYTES):
        raise InvalidArgumentError(
            f"this qcow2 image has version {version}, not 2 or 3, or is cut off"
        )
    common = {
        "version": version,
        "backing_offset": fields[2],
        "backing_bytes": fields[3],
        "cluster_bits": fields[4],
        "virtual_size_bytes": fields[5],
        "crypt_method": fields[6],
        "l1_entries": fields[7],
        "l1_offset": fields[8],
        "refcount_offset": fields[9],
        "refcount_clusters": fields[10],
        "snapshots": fields[11],
        "snapshots_offset": fields[12],
    }
    if version == 2:
        return Qcow2Header(**common)
    features, _compatible, _autoclear, order, length = _HEADER_V3.unpack_from(
        header, _HEADER_V2.size
    )
    return Qcow2Header(
        **common,
        incompatible_features=features,
        refcount_order=order,
        length_bytes=length,
        compression_type=header[_HEADER_V3_BYTES] if length > _HEADER_V3_BYTES else 0,
    )


def is_blank(image: IO[bytes], file_bytes: int) -> bool:
    """Tell whether an overlay is as it was made: whoever reads it reads what it stands on.

    qemu-img writes the first table (L1) last, and all that is written later is behind it.
    """
    header = parse_qcow2_header(image.read(HEADER_BYTES))
    table_bytes = header.l1_entries * 8
    is_as_long = file_bytes <= header.l1_offset + table_bytes
    return is_as_long and not any(_read(image, header.l1_offset, table_bytes))


def read_backing_name(image: IO[bytes]) -> str:
    """Give what a qcow2 says that it stands on, "" for nothing; what is no UTF-8 is replaced."""
    header = parse_qcow2_header(image.read(HEADER_BYTES))
    # qemu takes up to 1,023 bytes, in the first cluster (block/qcow2.c).
    size_bytes = min(header.backing_bytes, 1023)
    if not 0 < header.backing_offset <= 1 << _MAX_CLUSTER_BITS:
        return ""
    return _read(image, header.backing_offset, size_bytes).decode("utf-8", "replace")


def stands_alone(header: Qcow2Header) -> bool:
    """Tell whether an image of our own making has its data in its file, for all to read."""
    return not header.incompatible_features & _DATA_FILE and header.crypt_method == 0


def find_danger(header: Qcow2Header, file_bytes: int) -> str | None:
    """Give why a stranger's image with this header may not be opened, or None."""
    return next((reason for found, reason in _dangers(header, file_bytes) if found), None)


def judge_qcow2(file: IO[bytes], file_bytes: int) -> Qcow2Header:
    """Read and judge the header, its extensions, the snapshots and the first table.

    Raises InvalidArgumentError with the reason when the image may not be opened. Blocks.
    """
    file.seek(0)
    header = parse_qcow2_header(file.read(HEADER_BYTES))
    reason = (
        find_danger(header, file_bytes)
        or _find_bad_extension(header, _read(file, 0, header.cluster_bytes), file_bytes)
        or _find_bad_snapshot(header, file, file_bytes)
        or _find_bad_table(header, file, file_bytes)
    )
    if reason is not None:
        raise InvalidArgumentError(reason)
    return header


def _dangers(header: Qcow2Header, file_bytes: int) -> Iterator[tuple[bool, str]]:
    features = header.incompatible_features
    yield header.backing_offset != 0, "it names a backing file"
    yield bool(features & _DATA_FILE), "it keeps its data in another file"
    yield header.crypt_method != 0, "it is encrypted"
    yield bool(features & _CORRUPT), "it is marked as corrupt"
    yield bool(features & _DIRTY), "it was not closed properly"
    yield bool(features & ~_KNOWN_FEATURES), "it needs features this program does not know"
    yield not 9 <= header.cluster_bits <= _MAX_CLUSTER_BITS, "its cluster size is out of range"
    yield (
        bool(features & _EXTENDED_L2) and header.cluster_bits < _MIN_EXTENDED_L2_BITS,
        "its clusters are too small for the extended tables it has",
    )
    size = header.virtual_size_bytes
    yield not 0 < size <= MAX_SIZE_BYTES, "its size is zero or above 1 TiB"
    yield header.refcount_order > _MAX_REFCOUNT_ORDER, "its refcounts are wider than 64 bits"
    yield not _is_known_length(header), "its header has an impossible length"
    yield not _is_known_compression(header), "it is compressed in a way this program does not know"
    yield from _table_dangers(header, file_bytes)


def _is_known_length(header: Qcow2Header) -> bool:
    length = header.length_bytes
    least = _HEADER_V2.size if header.version == 2 else _HEADER_V3_BYTES
    return least <= length <= header.cluster_bytes and length % 8 == 0


def _is_known_compression(header: Qcow2Header) -> bool:
    # The bit is set if, and only if, the type is not the default.
    is_marked = bool(header.incompatible_features & _COMPRESSION)
    known = header.compression_type in _KNOWN_COMPRESSIONS
    return known and is_marked == (header.compression_type != 0)


def _table_dangers(header: Qcow2Header, file_bytes: int) -> Iterator[tuple[bool, str]]:
    l1_bytes = header.l1_entries * 8
    yield (
        not header.least_l1_entries <= header.l1_entries or l1_bytes > _MAX_L1_BYTES,
        "its first table (L1) has an impossible size",
    )
    yield (
        _is_misplaced(header, header.l1_offset, l1_bytes, file_bytes),
        "its first table (L1) lies outside of the file",
    )
    refcount_bytes = header.refcount_clusters << header.cluster_bits
    yield (
        not 0 < refcount_bytes <= _MAX_REFCOUNT_TABLE_BYTES,
        "its refcount table has an impossible size",
    )
    yield (
        _is_misplaced(header, header.refcount_offset, refcount_bytes, file_bytes),
        "its refcount table lies outside of the file",
    )
    yield header.snapshots > _MAX_SNAPSHOTS, f"it has more than {_MAX_SNAPSHOTS} snapshots inside"
    yield (
        header.snapshots > 0
        and _is_misplaced(header, header.snapshots_offset, _SNAPSHOT.size, file_bytes),
        "its table of snapshots lies outside of the file",
    )


def _is_misplaced(header: Qcow2Header, offset: int, size_bytes: int, file_bytes: int) -> bool:
    # The first cluster is the header's.
    is_aligned = offset >= header.cluster_bytes and offset % header.cluster_bytes == 0
    return not is_aligned or offset + size_bytes > file_bytes


def _find_bad_extension(header: Qcow2Header, start: bytes, file_bytes: int) -> str | None:
    position = header.length_bytes
    for _ in range(_MAX_EXTENSIONS):
        if position + _EXTENSION.size > len(start):
            return None
        kind, length = _EXTENSION.unpack_from(start, position)
        position += _EXTENSION.size
        if kind == _END:
            return None
        if kind in _BAD_EXTENSIONS:
            return _BAD_EXTENSIONS[kind]
        if position + length > len(start):
            return "an extension of its header does not fit into it"
        if kind == _BITMAPS and _are_bitmaps_outside(start[position:][:length], file_bytes):
            return "its directory of bitmaps lies outside of the file"
        position += -(-length // 8) * 8
    return f"its header has more than {_MAX_EXTENSIONS} extensions"


def _are_bitmaps_outside(extension: bytes, file_bytes: int) -> bool:
    layout = struct.Struct(">IIQQ")
    if len(extension) != layout.size:
        return True
    _count, _reserved, size_bytes, offset = layout.unpack(extension)
    return bool(offset + size_bytes > file_bytes)


def _find_bad_snapshot(header: Qcow2Header, file: IO[bytes], file_bytes: int) -> str | None:
    position = header.snapshots_offset
    for _ in range(header.snapshots):
        entry = _read(file, position, _SNAPSHOT.size)
        if len(entry) < _SNAPSHOT.size:
            return "its table of snapshots lies outside of the file"
        l1_offset, l1_entries, id_bytes, name_bytes, *_times, extra = _SNAPSHOT.unpack(entry)
        if extra > _MAX_SNAPSHOT_EXTRA_BYTES:
            return "a snapshot inside has more to say than qemu can hear"
        l1_bytes = l1_entries * 8
        if l1_bytes > _MAX_L1_BYTES or _is_misplaced(header, l1_offset, l1_bytes, file_bytes):
            return "a snapshot inside has its table outside of the file"
        position += -(-(_SNAPSHOT.size + extra + id_bytes + name_bytes) // 8) * 8
    return None


def _find_bad_table(header: Qcow2Header, file: IO[bytes], file_bytes: int) -> str | None:
    entries = array("Q", _read(file, header.l1_offset, header.l1_entries * 8))
    entries.byteswap()  # from big-endian; x86 is little-endian
    if max(map(_OFFSET_MASK.__and__, entries)) + header.cluster_bytes > file_bytes:
        return "its first table (L1) points outside of the file: it is cut off"
    return None


def _read(file: IO[bytes], offset: int, size_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(size_bytes)
