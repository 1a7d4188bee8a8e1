"""What a template is: its declaration, a TOML file, and the files made from it.

Reads both; makes and removes nothing.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.units import check_name, parse_size

DECLARATION = "template.toml"
DIGEST = "digest"
FILES = "files.tar.gz"


Firmware = Literal["bios", "uefi"]
Identity = Literal["serial", "cloud-init", "dhcp"]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[source]: where the image comes from; with "vm" there is none, see `kernel_templates`."""

    kind: Literal["build", "download", "import", "publish", "vm"]
    url: str = ""
    checksums_url: str = ""
    file_name: str = ""
    format: Literal["qcow2", "raw"] = "qcow2"


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[boot]: a kernel given to qemu directly; without one the image boots by itself."""

    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    firmware: Firmware = "bios"

    def __post_init__(self) -> None:
        if self.kernel and self.firmware != "bios":
            raise ValueError("a kernel given directly starts without firmware of another kind")


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[image]: the base of every disk made from this template."""

    file: str = "disk.qcow2"
    format: Literal["qcow2", "raw"] = "qcow2"


class PlacedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[guest.files."/path"]: whose a file in the guest is, and its mode, where not as usual."""

    owner: Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9_][a-z0-9_.-]*(:[a-z0-9_.-]+)?)?\Z")] = ""
    mode: Annotated[str, msgspec.Meta(pattern=r"^([0-7]{3,4})?\Z")] = ""


class Guest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[guest]: how it is told who it is, its login prompt, and what is done in it at first boot.

    By "dhcp" it is told its address and hostname and nothing else. `commands` and `files` are for
    cloud-init: a template that is built does all that in `build`. `ipv6` says of one that is built
    that it takes in an IPv6 address, too; cloud-init does.
    """

    identity: Identity
    ipv6: bool = False
    login_prompt: str = "login:"
    commands: list[str] = []
    files: dict[str, PlacedFile] = {}

    def __post_init__(self) -> None:
        if self.identity != "cloud-init" and (self.commands or self.files):
            raise ValueError("commands and files are for an identity by cloud-init")

    @property
    def takes_ipv6(self) -> bool:
        """Whether a guest that is told an IPv6 address uses it."""
        return self.ipv6 or self.identity == "cloud-init"


class Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """template.toml."""

    description: str
    os: str
    source: Source
    guest: Guest
    boot: Boot = Boot()
    image: Image = Image()
    min_mem_size: str = "128M"

    @property
    def min_mem_bytes(self) -> int:
        """The least memory its kernel starts with."""
        return parse_size(self.min_mem_size, parameter="min_mem_size")


@dataclass(frozen=True)
class ReadyTemplate:
    """A template whose files are all there, read-only for as long as it exists."""

    name: str
    directory: Path
    declaration: Declaration
    digest: str

    @property
    def image(self) -> Path:
        """The base image."""
        return self.directory / self.declaration.image.file

    @property
    def kernel(self) -> Path | None:
        """The kernel, where qemu is to load it."""
        return self._optional(self.declaration.boot.kernel)

    @property
    def initrd(self) -> Path | None:
        """The initial RAM disk that goes with it."""
        return self._optional(self.declaration.boot.initrd)

    @property
    def is_uefi(self) -> bool:
        """Whether its image boots by UEFI."""
        return self.declaration.boot.firmware == "uefi"

    @property
    def has_no_image(self) -> bool:
        """Whether the disks on it are whole in themselves: it is what an imported vm boots with."""
        return self.declaration.source.kind == "vm"

    @property
    def has_identity(self) -> bool:
        """Whether a disk on it is somebody's already, when its vm begins."""
        return self.has_no_image or self.declaration.source.kind == "publish"

    @property
    def has_hooks(self) -> bool:
        """Whether something of its own is done at the first boot of each of its guests."""
        return bool(self.declaration.guest.commands) or (self.directory / FILES).exists()

    def _optional(self, name: str) -> Path | None:
        return self.directory / name if name else None


def format_declaration(declaration: Declaration) -> str:
    """Write a template.toml; every text in it has to be printable, and it places no files."""
    lines: list[str] = []
    sections: list[str] = []
    for name, value in msgspec.to_builtins(declaration).items():
        if isinstance(value, dict):
            sections += ["", f"[{name}]", *(_assign(key, each) for key, each in value.items())]
        else:
            lines.append(_assign(name, value))
    return "\n".join([*lines, *sections, ""])


def _assign(key: str, value: object) -> str:
    # A basic string of TOML takes what JSON escapes, for as long as it is printable.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"


def read_declaration(directory: Path) -> Declaration:
    """Read template.toml; raises HostError naming the file and the mistake."""
    path = directory / DECLARATION
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Declaration)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise HostError(f"template declaration {path}: {error}") from error


def read_ready(directory: Path) -> ReadyTemplate | None:
    """Read a made template, or None where there is none."""
    digest = directory / DIGEST
    if not digest.is_file():
        return None
    return ReadyTemplate(
        directory.name, directory, read_declaration(directory), digest.read_text().strip()
    )


def find_declarations(template_dirs: list[str]) -> dict[str, Path]:
    """Give the directory of every declared template by name; the first directory wins."""
    found: dict[str, Path] = {}
    for template_dir in map(Path, template_dirs):
        for path in sorted(template_dir.glob(f"*/{DECLARATION}")):
            if _can_name(path.parent.name):
                found.setdefault(path.parent.name, path.parent)
    return found


def check_template_name(name: str) -> str:
    """Give `name` back if it can name a template; raise InvalidArgumentError otherwise."""
    # Vendors' names have dots ("ubuntu_22.04"), which no vm's has.
    try:
        check_name(name.replace(".", "_"))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"name {name!r:.80} can't be used for a template",
            hint="use 1 to 63 letters, digits, dots, _ or -, the first a letter or a digit, and"
            " not digits alone",
            parameter="name",
        ) from error
    return name


def _can_name(name: str) -> bool:
    try:
        check_template_name(name)
    except InvalidArgumentError:
        return False
    return True
