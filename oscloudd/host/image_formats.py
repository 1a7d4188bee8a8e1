"""What a file is, by its own bytes: disk images of every kind, and what is often taken for one.

Pure; what a file may be used for is judged in `image_header` and `image_check`.
"""

import re
from dataclasses import dataclass

# ISO 9660 has its mark behind sixteen blocks of 2048 bytes and a type byte.
HEAD_BYTES = 33 * 1024
# A fixed VHD and a DMG have theirs in their last 512 bytes.
TAIL_BYTES = 512

_UNPACK = "unpack it first"
_CONVERT = "convert it first: qemu-img convert -O qcow2"


@dataclass(frozen=True)
class Kind:
    """A sort of file, in words for people, and what to do about one that is no image for us."""

    name: str
    words: str
    advice: str = _CONVERT


_QCOW2 = Kind("qcow2", "a qcow2 image", "import it as qcow2")
_VMDK = Kind("vmdk", "a VMDK image")
_VHD = Kind("vhd", "a VHD image")
_DMG = Kind("dmg", "a DMG image")
_PARALLELS = Kind("parallels", "a Parallels image")
_PAGE = Kind("html", "a web page", "give the address of the image itself")

# All that qemu 7.2 would take a file for by looking at it (the bdrv_*_probe functions of block/),
# and what else is handed around as "the image".
_MARKS = (
    (0, b"QFI\xfb", _QCOW2),
    (0, b"QED\0", Kind("qed", "a QED image")),
    (0, b"KDMV", _VMDK),
    (0, b"COWD", _VMDK),
    (0, b"# Disk DescriptorFile", _VMDK),
    (64, b"\x7f\x10\xda\xbe", Kind("vdi", "a VDI image")),
    (0, b"vhdxfile", Kind("vhdx", "a VHDX image")),
    (0, b"conectix", _VHD),
    (0, b"LUKS\xba\xbe", Kind("luks", "an encrypted LUKS volume", "decrypt it first")),
    (0, b"WithoutFreeSpace", _PARALLELS),
    (0, b"WithouFreSpacExt", _PARALLELS),
    (0, b"Bochs Virtual HD Image", Kind("bochs", "a Bochs image")),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", Kind("cloop", "a cloop image")),
    (32769, b"CD001", Kind("iso", "an ISO image, made for a CD drive", "import a disk image")),
    (0, b"\x1f\x8b", Kind("gzip", "a gzip archive", _UNPACK)),
    (0, b"\xfd7zXZ\0", Kind("xz", "an xz archive", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Kind("zstd", "a zstd archive", _UNPACK)),
    (0, b"BZh", Kind("bzip2", "a bzip2 archive", _UNPACK)),
    (0, b"PK\x03\x04", Kind("zip", "a zip archive", _UNPACK)),
    (257, b"ustar", Kind("tar", "a tar archive, an OVA perhaps", _UNPACK)),
)  # fmt: skip
_TAIL_MARKS = ((b"conectix", _VHD), (b"koly", _DMG))
# The rule of qemu's vmdk_probe: after comments and empty lines, the descriptor's version.
_VMDK_TEXT = re.compile(rb"(?:#[^\n]*\n|[ \r]*\n)*version=[1-3]\r?\n")
_HTML = re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)
_BOOT_SIGNATURE = b"\x55\xaa"


def find_kind(head: bytes, tail: bytes = b"") -> Kind | None:
    """Tell what a file with these first and last bytes is; None where nothing gives it away."""
    for offset, mark, kind in _MARKS:
        if head.startswith(mark, offset):
            return kind
    if _VMDK_TEXT.match(head):
        return _VMDK
    if _HTML.match(head):
        return _PAGE
    return next((kind for mark, kind in _TAIL_MARKS if tail.startswith(mark)), None)


def has_boot_sector(head: bytes) -> bool:
    """Tell whether it starts as a disk does that a machine can boot: with a boot record."""
    return head[510:512] == _BOOT_SIGNATURE
