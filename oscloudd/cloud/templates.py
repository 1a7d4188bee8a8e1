"""Templates: what vms are made from. Declared in files, made once, read-only from then on.

Owns `state_dir/templates`. A template is made in a directory of its own and gets its name in one
rename, and loses it in one, so it is there whole or not at all. How its files are made is in
`template_making`.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from peewee import fn

from oscloudd.cloud.job_rows import JobState
from oscloudd.cloud.jobs import Job, JobInfo, Jobs, Order
from oscloudd.cloud.missing import missing
from oscloudd.cloud.template_files import (
    DIGEST,
    Declaration,
    ReadyTemplate,
    find_declarations,
    read_declaration,
    read_ready,
)
from oscloudd.cloud.template_making import DOWNLOAD, ImportRequest, TemplateMaker, seal
from oscloudd.config import Config
from oscloudd.errors import (
    AlreadyExistsError,
    CloudError,
    InUseError,
    InvalidArgumentError,
    InvalidStateError,
)
from oscloudd.host.images import durable, virtual_size_bytes
from oscloudd.store.database import Database
from oscloudd.store.models import Disk
from oscloudd.store.models import Job as JobRow

# What the column `template_name` holds; a file's own limit is 255 bytes.
_MAX_NAME_LENGTH = 63
MAKING, _REMOVING = ".making-", ".removing-"
# A download that nobody has gone on with for so long is given up.
_KEPT_DOWNLOAD_SECONDS = 7 * 86400
_STATES = {
    "build": "BUILDING",
    "download": "DOWNLOADING",
    "import": "IMPORTING",
    "publish": "PUBLISHING",
}

Fill = Callable[[Path, Job], Awaitable[None]]


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


class TemplateDeleted(msgspec.Struct, frozen=True):
    """The answer of `template_delete`."""

    name: str


@dataclass(frozen=True)
class _Making:
    """A template being made: of what kind, exactly what was asked for, and the job that does it.

    Who asks for the same while it lasts waits for the same job; `wanted` None is never the same.
    """

    kind: str
    wanted: object
    begun: "asyncio.Task[tuple[Job, asyncio.Task[None]]]"


class Templates:
    """All templates, declared and made."""

    def __init__(self, config: Config, database: Database, jobs: Jobs) -> None:
        self._declared_in = config.template_dirs
        self._directory = config.state_path / "templates"
        self._maker = TemplateMaker(config, self._directory)
        self._database = database
        self._jobs = jobs
        self._making: dict[str, _Making] = {}

    def remove_leftovers(self) -> None:
        """Remove what an earlier daemon had not finished making or removing.

        Downloads keep their beginning for a while.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in (*self._directory.glob(f"{MAKING}*"), *self._directory.glob(f"{_REMOVING}*")):
            shutil.rmtree(path)
        oldest = time.time() - _KEPT_DOWNLOAD_SECONDS
        for path in self._directory.glob(f"{DOWNLOAD}*"):
            if max(file.stat().st_mtime for file in (path, *path.iterdir())) < oldest:
                shutil.rmtree(path)

    def find_ready(self, name: str) -> ReadyTemplate | None:
        """Give a template that vms can be made from, or None."""
        return read_ready(self._directory / name) if _is_file_name(name) else None

    def get_ready(self, name: str) -> ReadyTemplate:
        """Give a template that vms can be made from; raises NotFoundError or InvalidStateError."""
        _check_file_name(name)
        ready = read_ready(self._directory / name)
        if ready is not None:
            return ready
        declaration = self.get_declaration(name)
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
        return [info for name in names if (info := await self._find_info(name)) is not None]

    async def info(self, name: str) -> TemplateInfo:
        """Describe one template; raises NotFoundError."""
        _check_file_name(name)
        ready = await asyncio.to_thread(read_ready, self._directory / name)
        declaration = ready.declaration if ready else self.get_declaration(name)
        used_by = await self._database.run(
            lambda: Disk.select(fn.COUNT(Disk.id)).where(Disk.template_name == name).scalar()
        )
        size = virtual_size_bytes(ready.image, declaration.image.format) if ready else None
        return TemplateInfo(
            name=name,
            description=declaration.description,
            os=declaration.os,
            source=declaration.source.kind,
            state="READY" if ready else self._state_of(name),
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
        declared = self._get_declared(name, "build")
        return await self._make(name, "build", "", order, partial(self._maker.build, declared))

    async def download(self, name: str, order: Order) -> TemplateInfo | JobInfo:
        """Fetch a template's image from its vendor and check it against the vendor's checksum."""
        declared = self._get_declared(name, "download")
        fill = partial(self._maker.download, declared)
        return await self._make(name, "download", "", order, fill)

    async def ensure(self, name: str, order: Order) -> ReadyTemplate:
        """Give a template that vms can be made from, made first where it is declared only.

        The order's listener hears how that goes. Raises what `get_ready` and the making raise.
        """
        kind = "" if self.find_ready(name) else self.get_declaration(name).source.kind
        waiting = Order(order.owner_uid, order.listener)
        with suppress(AlreadyExistsError):  # somebody else has made it at this moment
            if kind == "build":
                await self.build(name, waiting)
            elif kind == "download":
                await self.download(name, waiting)
        return self.get_ready(name)

    async def take(
        self, request: ImportRequest, body: AsyncIterator[bytes] | None, order: Order
    ) -> TemplateInfo | JobInfo:
        """Make a template of an image that a user brings, by its address or as `body`."""
        self._check_not_declared(request.name)
        wanted = request if body is None else None
        fill = partial(self._maker.take, request, body)
        return await self._make(request.name, "import", wanted, order, fill)

    async def publish(self, name: str, fill: Fill, order: Order) -> TemplateInfo | JobInfo:
        """Make a template of a vm; `fill` knows of which."""
        self._check_not_declared(name)
        return await self._make(name, "publish", None, order, fill)

    async def delete(self, name: str) -> TemplateDeleted:
        """Remove a template that no disk stands on: what was made here, not its declaration."""
        _check_file_name(name)
        self._check_not_being_made(name)
        path, kept = self._directory / name, self._directory / f"{DOWNLOAD}{name}"
        if not path.exists() and not kept.exists():
            self.get_ready(name)  # says why it is not there
        removing = self._directory / f"{_REMOVING}{name}"
        # In the thread that writes the rows of new vms: `vm_create` sees to it there that the
        # template is still in its place.
        await self._database.run(partial(_take_away, name, path, removing))
        await asyncio.to_thread(_remove, [removing, kept], self._directory)
        return TemplateDeleted(name)

    async def _make(
        self, name: str, kind: str, wanted: object, order: Order, fill: Fill
    ) -> TemplateInfo | JobInfo:
        making = self._making.get(name)
        if making is None:
            self._check_is_new(name)
            begun = asyncio.create_task(self._begin(name, kind, order, fill))
            making = self._making[name] = _Making(kind, wanted, begun)
        elif wanted is None or (making.kind, making.wanted) != (kind, wanted):
            self._check_not_being_made(name)
        job, task = await asyncio.shield(making.begun)
        if not order.wait:
            return await self._jobs.info(job.id)
        with job.listening(order.listener):
            await asyncio.shield(task)
        return await self.info(name)

    async def _begin(
        self, name: str, kind: str, order: Order, fill: Fill
    ) -> "tuple[Job, asyncio.Task[None]]":
        try:
            job = await self._jobs.begin(f"template_{kind}", name, Order(order.owner_uid))
        except BaseException:
            del self._making[name]
            raise
        job.cancellable = True
        task = self._jobs.run(job, job.interruptible(self._fill(name, fill, job)))
        task.add_done_callback(lambda _done: self._making.pop(name, None))
        return job, task

    async def _fill(self, name: str, fill: Fill, job: Job) -> None:
        making = self._directory / f"{MAKING}{name}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            await fill(making, job)
            job.report("checking", "computing the image's digest")
            await asyncio.to_thread(seal, making)
            making.rename(self._directory / name)
            await asyncio.to_thread(durable, self._directory / name)
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _check_not_declared(self, name: str) -> None:
        if name in find_declarations(self._declared_in):
            raise AlreadyExistsError(
                f"template {name!r} is declared here",
                hint="choose another name",
                object="template",
                name=name,
            )

    def _check_is_new(self, name: str) -> None:
        if read_ready(self._directory / name) is not None:
            raise AlreadyExistsError(
                f"template {name!r} is made already",
                hint=f"see it with: oscloudctl template-info {name}",
                object="template",
                name=name,
            )

    def _check_not_being_made(self, name: str) -> None:
        if name in self._making:
            raise InUseError(f"template {name!r} is being made already", hint="wait for it")

    async def _find_info(self, name: str) -> TemplateInfo | None:
        """Describe a template; None where it has just been deleted."""
        try:
            return await self.info(name)
        except (CloudError, OSError):
            if (self._directory / name).exists():
                raise
            return None

    def _state_of(self, name: str) -> str:
        making = self._making.get(name)
        return "MISSING" if making is None else _STATES[making.kind]

    def _get_declared(self, name: str, kind: str) -> Path:
        """Give the directory of a template's declaration, if it is made by `kind`."""
        _check_file_name(name)
        made = self.find_ready(name)
        verb = (made.declaration if made else self.get_declaration(name)).source.kind
        if verb != kind:
            raise InvalidArgumentError(
                f"template {name!r} can't be made by {kind}",
                hint=f"use: oscloudctl template-{verb} {name}",
                parameter="template",
            )
        return find_declarations(self._declared_in)[name]

    def get_declaration(self, name: str) -> Declaration:
        """Give what a template is declared to be; raises NotFoundError."""
        _check_file_name(name)
        directory = find_declarations(self._declared_in).get(name)
        if directory is None:
            raise missing("template", name)
        return read_declaration(directory)


def _take_away(name: str, path: Path, removing: Path) -> None:
    """Take a template out of its place, in a transaction; raises InUseError where it is needed."""
    disks = [disk.name for disk in Disk.select().where(Disk.template_name == name).limit(10)]
    if disks:
        raise InUseError(
            f"disks stand on template {name!r}: {', '.join(disks)}",
            hint="delete them, or the vms they go with: see oscloudctl disk-list",
            disks=disks,
        )
    running = JobRow.select().where(JobRow.state == JobState.RUNNING, JobRow.target == name)
    for job in running.where(JobRow.kind.startswith("template_")):
        raise InUseError(
            f"job {job.id} ({job.kind} {name}) is at work on template {name!r}",
            hint=f"wait for it: oscloudctl job-wait {job.id}",
            job=job.id,
        )
    if path.exists():  # a transaction may be run again
        path.rename(removing)


def _remove(paths: list[Path], directory: Path) -> None:
    """Remove what was taken away, once that is sure to survive a power cut."""
    durable(directory)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def _check_file_name(name: str) -> None:
    if not _is_file_name(name):
        raise missing("template", name)


def _is_file_name(name: str) -> bool:
    can_be_kept = 0 < len(name) <= _MAX_NAME_LENGTH and name.isprintable()
    return can_be_kept and "/" not in name and not name.startswith(".")
