"""The hooks of a template: `files/` beside its declaration, and what the declaration says of them.

They are packed when the template is made, so that all of its guests get the same.
"""

import gzip
import io
import tarfile
from pathlib import Path

from oscloudd.cloud.template_files import FILES, Declaration, ReadyTemplate
from oscloudd.errors import HostError
from oscloudd.guest.hooks import Hooks

DIRECTORY = "files"
# They are in the seed of each vm, and cloud-init keeps them in its memory.
_MOST_BYTES = 4 << 20


def pack_files(declared: Path, declaration: Declaration) -> bytes:
    """Give the files beside a declaration as a gzipped tar archive; b"" where there are none.

    Root's, with the mode they have here or are declared with. Raises HostError.
    """
    directory = declared / DIRECTORY
    paths = sorted(path for path in directory.rglob("*") if path.is_symlink() or path.is_file())
    names = {f"/{path.relative_to(directory)}" for path in paths}
    for name in declaration.guest.files:
        if name not in names:
            raise HostError(
                f"template {declared.name} declares {name!r}, and has no {directory}{name}"
            )
    if not paths:
        return b""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in paths:
            _add(tar, path, str(path.relative_to(directory)), declaration)
    packed = gzip.compress(archive.getvalue(), mtime=0)
    if len(packed) > _MOST_BYTES:
        raise HostError(
            f"{directory} has {len(packed)} bytes when packed: more than {_MOST_BYTES}",
            hint="let a command of the template fetch what is large",
        )
    return packed


def hooks_of(template: ReadyTemplate) -> Hooks:
    """Give what a template does in each of its guests."""
    guest = template.declaration.guest
    packed = template.directory / FILES
    owners = tuple((path, file.owner) for path, file in guest.files.items() if file.owner)
    files = packed.read_bytes() if packed.exists() else b""
    return Hooks(files, owners, tuple(guest.commands))


def _add(tar: tarfile.TarFile, path: Path, name: str, declaration: Declaration) -> None:
    entry = tar.gettarinfo(path, name)
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    said = declaration.guest.files.get(f"/{name}")
    if said is not None and said.mode:
        entry.mode = int(said.mode, 8)
    if not entry.isreg():
        tar.addfile(entry)
        return
    with path.open("rb") as content:
        tar.addfile(entry, content)
