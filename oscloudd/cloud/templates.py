"""Templates: what vms are made from. Declared in files, made once, read-only from then on.

Owns `state_dir/templates`. A template is made in a directory of its own and gets its name in one
rename, so it is there whole or not at all.
"""

import asyncio
import os
import shutil
from pathlib import Path

import msgspec
from peewee import fn

from oscloudd.cloud.jobs import Job, JobInfo, Jobs, Order
from oscloudd.cloud.missing import missing
from oscloudd.cloud.template_files import (
    DECLARATION,
    DIGEST,
    Declaration,
    ReadyTemplate,
    find_declarations,
    read_declaration,
    read_ready,
)
from oscloudd.config import Config
from oscloudd.errors import (
    AlreadyExistsError,
    HostError,
    InUseError,
    InvalidArgumentError,
    InvalidStateError,
)
from oscloudd.host.downloads import download, fetch_checksum
from oscloudd.host.image_check import check_image
from oscloudd.host.images import durable, sha256_of, virtual_size_bytes
from oscloudd.host.transient_services import run_apart
from oscloudd.host.users import resolve_qemu_user
from oscloudd.store.database import Database
from oscloudd.store.models import Disk

# debian_12 takes 70 s on two idle cores; a slow mirror takes the rest.
_BUILD_SECONDS = 3600
# What the column `template_name` holds; a file's own limit is 255 bytes.
_MAX_NAME_LENGTH = 63
_MAKING = ".making-"
_PROGRESS = "progress: "


class TemplateInfo(msgspec.Struct, frozen=True):
    """The answer of `template_info`; sizes in bytes, None where it is not made yet."""

    name: str
    description: str
    os: str
    source: str
    state: str
    identity: str
    size: int | None
    min_disk_size: int | None
    min_mem_size: int
    digest: str | None
    made_at: float | None
    used_by: int


class Templates:
    """All templates, declared and made."""

    def __init__(self, config: Config, database: Database, jobs: Jobs) -> None:
        self._declared_in = config.template_dirs
        self._user = resolve_qemu_user(config.qemu.user).name
        self._directory = config.state_path / "templates"
        self._database = database
        self._jobs = jobs
        self._making: dict[str, str] = {}

    def remove_leftovers(self) -> None:
        """Remove what an earlier daemon had not finished making; downloads keep their beginning."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"{_MAKING}*"):
            shutil.rmtree(path)

    def get_ready(self, name: str) -> ReadyTemplate:
        """Give a template that vms can be made from; raises NotFoundError or InvalidStateError."""
        _check_file_name(name)
        ready = read_ready(self._directory / name)
        if ready is not None:
            return ready
        declaration = self._get_declaration(name)
        verb = declaration.source.kind
        raise InvalidStateError(
            f"disk template {name!r} has not been made yet",
            hint=f"make it: oscloudctl template-{verb} {name}",
            template=name,
        )

    async def list(self) -> list[TemplateInfo]:
        """Describe every template, declared or made."""
        made = {path.parent.name for path in self._directory.glob(f"[!.]*/{DIGEST}")}
        names = sorted(made | find_declarations(self._declared_in).keys())
        return [await self.info(name) for name in names]

    async def info(self, name: str) -> TemplateInfo:
        """Describe one template; raises NotFoundError."""
        _check_file_name(name)
        ready = await asyncio.to_thread(read_ready, self._directory / name)
        declaration = ready.declaration if ready else self._get_declaration(name)
        used_by = await self._database.run(
            lambda: Disk.select(fn.COUNT(Disk.id)).where(Disk.template_name == name).scalar()
        )
        size = virtual_size_bytes(ready.image, declaration.image.format) if ready else None
        return TemplateInfo(
            name=name,
            description=declaration.description,
            os=declaration.os,
            source=declaration.source.kind,
            state="READY" if ready else self._making.get(name, "MISSING"),
            identity=declaration.guest.identity,
            size=_size_of(ready.directory) if ready else None,
            min_disk_size=size,
            min_mem_size=declaration.min_mem_bytes,
            digest=ready.digest if ready else None,
            made_at=ready.image.stat().st_mtime if ready else None,
            used_by=int(used_by),
        )

    async def build(self, name: str, order: Order) -> TemplateInfo | JobInfo:
        """Build a template here from its own `build` program."""
        return await self._make(name, "build", order)

    async def download(self, name: str, order: Order) -> TemplateInfo | JobInfo:
        """Fetch a template's image from its vendor and check it against the vendor's checksum."""
        return await self._make(name, "download", order)

    async def _make(self, name: str, kind: str, order: Order) -> TemplateInfo | JobInfo:
        _check_file_name(name)
        declaration = self._get_declaration(name)
        self._check_can_make(name, kind, declaration)
        self._making[name] = "BUILDING" if kind == "build" else "DOWNLOADING"
        try:
            job = await self._jobs.begin(f"template_{kind}", name, order)
        except BaseException:
            del self._making[name]
            raise
        job.cancellable = True
        task = self._jobs.run(job, job.interruptible(self._fill(name, declaration, job)))
        task.add_done_callback(lambda _done: self._making.pop(name, None))
        if not order.wait:
            return await self._jobs.info(job.id)
        await asyncio.shield(task)
        return await self.info(name)

    def _check_can_make(self, name: str, kind: str, declaration: Declaration) -> None:
        if declaration.source.kind != kind:
            raise InvalidArgumentError(
                f"template {name!r} can't be made by {kind}",
                hint=f"use: oscloudctl template-{declaration.source.kind} {name}",
                parameter="template",
            )
        if name in self._making:
            raise InUseError(f"template {name!r} is being made already", hint="wait for it")
        if read_ready(self._directory / name) is not None:
            raise AlreadyExistsError(
                f"template {name!r} is made already", object="template", name=name
            )

    async def _fill(self, name: str, declaration: Declaration, job: Job) -> None:
        making = self._directory / f"{_MAKING}{name}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            if declaration.source.kind == "build":
                await _run_build(find_declarations(self._declared_in)[name], making, job)
            else:
                await self._fetch(name, declaration, making, job)
            job.report("checking", "computing the image's digest")
            shutil.copyfile(
                find_declarations(self._declared_in)[name] / DECLARATION, making / DECLARATION
            )
            await asyncio.to_thread(_seal, making, declaration)
            making.rename(self._directory / name)
            await asyncio.to_thread(durable, self._directory / name)
        finally:
            shutil.rmtree(making, ignore_errors=True)

    async def _fetch(self, name: str, declaration: Declaration, making: Path, job: Job) -> None:
        source = declaration.source
        job.report("checksum", f"asking for the checksum of {source.file_name}")
        expected = await fetch_checksum(source.checksums_url, source.file_name)
        # Outside of the directory being made: a download cut short goes on from where it was.
        kept = self._directory / f".download-{name}"
        kept.mkdir(exist_ok=True)

        def report(received_bytes: int, total_bytes: int | None) -> None:
            fraction = received_bytes / total_bytes if total_bytes else None
            job.report("downloading", f"{received_bytes >> 20} MiB of {source.file_name}", fraction)

        image = kept / declaration.image.file
        await download(source.url, image, expected=expected, on_progress=report)
        image.chmod(0o444)
        await check_image(image, source.format, self._user)
        image.rename(making / declaration.image.file)
        shutil.rmtree(kept)

    def _get_declaration(self, name: str) -> Declaration:
        directory = find_declarations(self._declared_in).get(name)
        if directory is None:
            raise missing("template", name)
        return read_declaration(directory)


async def _run_build(declared: Path, making: Path, job: Job) -> None:
    program = declared / "build"
    if not os.access(program, os.X_OK):
        raise HostError(f"{program} is missing or not executable")
    job.report("building", f"building {declared.name} from Debian packages")

    def take(line: str) -> None:
        if line.startswith(_PROGRESS):
            percent, _, message = line.removeprefix(_PROGRESS).partition(" ")
            fraction = float(percent) / 100 if percent.isdigit() else None
            job.report("building", message, fraction)

    unit = f"oscloud-build-{declared.name}.service"
    argv = [str(program), str(making)]
    await run_apart(argv, unit, timeout_seconds=_BUILD_SECONDS, on_line=take)


def _seal(making: Path, declaration: Declaration) -> None:
    """Make the files read-only and durable, the digest last: it is what makes a template."""
    boot = declaration.boot
    for name in filter(None, (declaration.image.file, boot.kernel, boot.initrd)):
        if not (making / name).is_file():
            raise HostError(f"the template was made without its file {name!r}")
        # Kernel and initrd are opened again by qemu's own user, hence readable by all.
        (making / name).chmod(0o444)
        durable(making / name)
    digest = sha256_of(making / declaration.image.file)
    (making / DIGEST).write_text(f"sha256:{digest}\n")
    durable(making / DIGEST)


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def _check_file_name(name: str) -> None:
    too_long = len(name) > _MAX_NAME_LENGTH
    if not name or too_long or "/" in name or name.startswith(".") or not name.isprintable():
        raise missing("template", name)
