"""The file a vm travels in: a tar with a manifest first, its images, and their checksums last.

Pure: builds and reads headers, manifest and checksums. `tar` unpacks the file and `sha256sum -c
SHA256SUMS` checks it. It is read as it comes, so nothing in it names a place on this host: members
have the names and the order given here, and no others.
"""

import tarfile
from collections.abc import Iterable
from typing import Literal

import msgspec

from oscloudd.cloud.template_files import Identity
from oscloudd.errors import InvalidArgumentError
from oscloudd.host.checksums import parse_checksums

BLOCK_BYTES = 512
# POSIX ustar: two blocks of zeros end it.
END = bytes(2 * BLOCK_BYTES)

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
DISK, KERNEL, INITRD, SEED = "disk.qcow2", "kernel", "initrd", "seed.iso"
# The large one last: what the others are decides where it goes.
_MEMBERS = (KERNEL, INITRD, SEED, DISK)

# The document that a guest may still have to be told holds the user's keys, and a request has at
# most 1 MiB of them, in base64 here.
MAX_MANIFEST_BYTES = 4 << 20
MAX_SUMS_BYTES = 4096
# Debian's largest kernel and initrd have 80 MB; our seeds 0.4.
_MOST_BYTES = {DISK: 1 << 40, KERNEL: 256 << 20, INITRD: 1 << 30, SEED: 64 << 20}


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, and its size in bytes."""

    name: str
    size: int


class ExportedVm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a vm is, and who its guest thinks it is; sizes in bytes.

    `seed_document` is what the guest has yet to be told, "" when its disk has it.
    """

    name: str
    uuid: str
    network: str
    ip: str
    mac: str
    mem_size: int
    cpus: int
    disk_size: int
    host_keys: str
    identified: bool
    seed_document: str
    autostart: Literal["no", "yes", "last-state"]
    restart: Literal["no", "on-failure", "always"]


class ExportedTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a guest of its template boots and is told who it is."""

    name: str
    os: str
    cmdline: str
    identity: Identity
    login_prompt: str
    min_mem_size: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json: `made_at` in seconds since 1970, `made_by` a version of this program."""

    format: Literal["oscloud-vm"]
    version: Literal[1]
    made_at: float
    made_by: str
    vm: ExportedVm
    template: ExportedTemplate
    members: list[Member]


def build_header(name: str, size_bytes: int, made_at: float) -> bytes:
    """Give the header of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size_bytes, 0o600, int(made_at)
    # GNU's has room for sizes above 8 GiB in the header itself.
    return info.tobuf(tarfile.GNU_FORMAT)


def padding(size_bytes: int) -> bytes:
    """Give the zeros between a member's end and the next header."""
    return bytes(-size_bytes % BLOCK_BYTES)


def archive_bytes(sizes: Iterable[int]) -> int:
    """Give how long an archive of members of these sizes is."""
    return sum(BLOCK_BYTES + size + len(padding(size)) for size in sizes) + len(END)


def parse_header(block: bytes) -> tuple[str, int]:
    """Give the name and the size of the member that has this header."""
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise InvalidArgumentError("it is no archive of a vm, or is damaged") from error
    if info.type != tarfile.REGTYPE or info.size < 0:
        raise InvalidArgumentError(f"{info.name!r:.80} in it is no ordinary file")
    return info.name, info.size


def parse_manifest(text: bytes) -> Manifest:
    """Read the manifest; raises InvalidArgumentError for what no export has."""
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgumentError(
            f"its manifest can't be read: {error!s:.200}",
            hint="it may be of a newer version of OS Cloud",
        ) from error
    names = [member.name for member in manifest.members]
    if names != [name for name in _MEMBERS if name in names] or DISK not in names:
        raise InvalidArgumentError(f"its manifest names other files than a vm has: {names!r:.200}")
    for member in manifest.members:
        if not 0 <= member.size <= _MOST_BYTES[member.name]:
            raise InvalidArgumentError(f"{member.name} in it has an impossible size")
    return manifest


def build_sums(digests: dict[str, str]) -> bytes:
    """Give the member SHA256SUMS: hexadecimal digests by name, as sha256sum(1) reads them."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


def check_sums(text: bytes, digests: dict[str, str]) -> None:
    """Compare what was announced with what came; raises InvalidArgumentError naming the file."""
    announced = parse_checksums(text.decode("ascii", "replace"))
    for name, digest in digests.items():
        if name not in announced or announced[name].digest != digest:
            raise InvalidArgumentError(
                f"{name} in it is damaged: it has SHA256 {digest}", hint="copy or export it again"
            )
