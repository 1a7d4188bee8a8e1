"""The file a vm travels in: a tar with a manifest first, its images, and their checksums last.

Pure: builds and reads headers, manifest and checksums. `tar` unpacks the file and `sha256sum -c
SHA256SUMS` checks it. It is read as it comes, so nothing in it names a place on this host: members
have the names and the order given here, and no others.

What came later than the first version has a default, and is left out where it has that: so an
older version reads whatever has nothing new in it, and refuses the rest.
"""

import tarfile
from collections.abc import Iterable
from typing import Literal

import msgspec

from oscloudd.cloud.template_files import Firmware, Identity
from oscloudd.errors import InvalidArgumentError
from oscloudd.host.checksums import parse_checksums
from oscloudd.machine.arguments import PORTS
from oscloudd.units import check_name

BLOCK_BYTES = 512
# POSIX ustar: two blocks of zeros end it.
END = bytes(2 * BLOCK_BYTES)

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
DISK, KERNEL, INITRD, SEED = "disk.qcow2", "kernel", "initrd", "seed.iso"
VARIABLES = "variables.fd"
# The large ones last, and data disks behind this: what the others are decides where they go.
_MEMBERS = (KERNEL, INITRD, SEED, VARIABLES, DISK)

# The document that a guest may still have to be told holds the user's keys, and a request has at
# most 1 MiB of them, in base64 here.
MAX_MANIFEST_BYTES = 4 << 20
MAX_SUMS_BYTES = 4096
MAX_DISK_BYTES = 1 << 40
# A qcow2 that is full has its tables besides: 8 bytes and 2 for each cluster of 64 KiB.
_MAX_IMAGE_BYTES = MAX_DISK_BYTES + (MAX_DISK_BYTES >> 8)
# Debian's largest kernel and initrd have 80 MB; our seeds 0.4. qemu takes 8 MiB of flash.
_MOST_BYTES = {KERNEL: 256 << 20, INITRD: 1 << 30, SEED: 64 << 20, VARIABLES: 8 << 20}
_SECTOR_BYTES = 512
# With all that is not a disk, in round numbers.
MAX_ARCHIVE_BYTES = (PORTS + 2) * MAX_DISK_BYTES


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, and its size in bytes."""

    name: str
    size: int


class ExportedNic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card beside the first one; `network` is its network's name."""

    network: str
    ip: str
    mac: str


class ExportedVm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a vm is, and who its guest thinks it is; sizes in bytes.

    `seed_document` is what the guest has yet to be told, "" when its disk has it. Older versions
    know no `nics`, so a vm with one card has none.
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
    nics: list[ExportedNic] = []


class ExportedDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data disk: in which of the vm's slots it is, and its size in bytes.

    Its guest knows it by the beginning of its name.
    """

    slot: int
    name: str
    size: int

    @property
    def member(self) -> str:
        """The file that it is."""
        return f"data{self.slot}.qcow2"


class ExportedTemplate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a guest of its template boots and is told who it is."""

    name: str
    os: str
    cmdline: str
    identity: Identity
    login_prompt: str
    min_mem_size: str
    firmware: Firmware = "bios"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """manifest.json: `made_at` in seconds since 1970, `made_by` a version of this program.

    `disks` are the data disks, by slot.
    """

    format: Literal["oscloud-vm"]
    version: Literal[1]
    made_at: float
    made_by: str
    vm: ExportedVm
    template: ExportedTemplate
    members: list[Member]
    disks: list[ExportedDisk] = []


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
    _check_disks(manifest.disks)
    names = [member.name for member in manifest.members]
    possible = [*_MEMBERS, *(disk.member for disk in manifest.disks)]
    needed = {DISK, *possible[len(_MEMBERS) :]}
    if manifest.template.firmware == "uefi":
        possible.remove(KERNEL)
        needed.add(VARIABLES)
    else:
        possible.remove(VARIABLES)
    if names != [name for name in possible if name in names] or not needed <= set(names):
        raise InvalidArgumentError(f"its manifest names other files than a vm has: {names!r:.200}")
    for member in manifest.members:
        if not 0 <= member.size <= _MOST_BYTES.get(member.name, _MAX_IMAGE_BYTES):
            raise InvalidArgumentError(f"{member.name} in it has an impossible size")
    return manifest


def _check_disks(disks: list[ExportedDisk]) -> None:
    """Raise InvalidArgumentError unless a vm can have these data disks, in this order."""
    slots, names = [disk.slot for disk in disks], {disk.name for disk in disks}
    if slots != sorted(set(slots) & set(range(1, PORTS + 1))):
        raise InvalidArgumentError(
            f"its manifest has data disks in slots {slots!r:.80}, and a vm has slots 1 to {PORTS}"
        )
    if len(names) != len(disks):
        raise InvalidArgumentError("its manifest has two data disks of one name")
    for disk in disks:
        check_name(disk.name)
        if not 0 < disk.size <= MAX_DISK_BYTES or disk.size % _SECTOR_BYTES:
            raise InvalidArgumentError(f"data disk {disk.name!r} in it has an impossible size")


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
