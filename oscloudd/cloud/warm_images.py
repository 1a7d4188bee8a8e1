"""Warm images: templates booted once for a shape and stopped; new vms begin where they stand.

Owns `state_dir/warm`. What is in a warm image is in `warm_files`, how a machine is saved and
restored in `machine.warm`.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import msgspec
from peewee import fn

from oscloudd.cloud.jobs import Job, JobInfo, Jobs, Order
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.warm_files import (
    DISK,
    STATE,
    Manifest,
    WarmImage,
    WarmStart,
    make_blank_overlay,
    read_warm,
    seal,
    warm_directory,
)
from oscloudd.cloud.warm_making import DEFAULT_DISK_SIZE, Made, Shape, WarmMaker, shape_of
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, InvalidArgumentError
from oscloudd.guest.warm_seed import agent_digest
from oscloudd.host.images import sha256_of, virtual_size_bytes
from oscloudd.host.users import QemuUser
from oscloudd.machine.accelerator import Accelerator
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.qemu_version import QemuVersion
from oscloudd.machine.sealed_memory import memory_path
from oscloudd.machine.warm import identify_binary, recipe_key
from oscloudd.store.database import Database
from oscloudd.store.models import Disk

_log = logging.getLogger(__name__)
_MAKING, _REMOVING = ".making-", ".removing-"


class WarmInfo(msgspec.Struct, frozen=True):
    """A warm image as `template_info` shows it: sizes in bytes, times in seconds since 1970."""

    name: str
    mem_size: int
    cpus: int
    disk_size: int
    size: int
    made_at: float
    last_used: float
    used_by: int
    spares: int


class WarmImages:
    """All warm images; one is made at a time.

    `on_made` is called when one has been made; `stood_on` names those that spares stand on, and
    that stay for it.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        templates: Templates,
        jobs: Jobs,
        user: QemuUser,
        accelerator: "asyncio.Task[Accelerator]",
        version: "asyncio.Task[QemuVersion]",
    ) -> None:
        self._config = config
        self._directory = warm_directory(config)
        self._maker = WarmMaker(config, user)
        self._database = database
        self._templates = templates
        self._jobs = jobs
        self._accelerator = accelerator
        self._version = version
        self._making = asyncio.Lock()
        # Sealed copies in memory, by name: qemu has no right to the files, and clones none to
        # each other's template.
        self._memories: dict[str, int] = {}
        self._damaged: set[str] = set()
        self._loading = asyncio.Lock()
        self._begun: dict[tuple[str, int, int, int], asyncio.Task[None]] = {}
        self.on_made: Callable[[], None] = lambda: None
        self.stood_on: Callable[[], set[str]] = set

    async def remove_leftovers(self) -> None:
        """End and remove what an earlier daemon had not finished making."""
        self._directory.mkdir(parents=True, exist_ok=True)
        await self._maker.remove_leftovers()
        for path in (*self._directory.glob(f"{_MAKING}*"), *self._directory.glob(f"{_REMOVING}*")):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def get(self, name: str) -> WarmImage | None:
        """Give a warm image by its name; None when it is not whole."""
        return read_warm(self._directory / name)

    async def get_fitting(self, name: str, shape: Shape) -> WarmImage | None:
        """Give a warm image by its name; None when it is not for such a machine, or not whole."""
        image = self.get(name)
        if image is None or name in self._damaged or image.manifest.key != await self._key(shape):
            return None
        return image

    async def open(self, image: WarmImage) -> WarmStart:
        """Give what a clone begins with; raises HostError when the image is damaged."""
        state = await asyncio.to_thread(image.read_state)
        return WarmStart(await self.memory_of(image), state)

    async def memory_of(self, image: WarmImage) -> Path:
        """Give the image's memory for `MachineFiles`; raises HostError when it is damaged."""
        async with self._loading:
            if image.name not in self._memories:
                self._memories[image.name] = await asyncio.to_thread(image.load)
        return memory_path(self._memories[image.name])

    async def load(self) -> None:
        """Have the memory of every image at hand before it is asked for."""
        for image in list(self._all()):
            with suppress(CloudError):  # told when a vm is to begin with it
                await self.memory_of(image)

    async def find(self, shape: Shape) -> WarmImage | None:
        """Give a warm image that a vm of this shape can begin with; one that grows the least."""
        if not shape.can_be_warm:
            return None
        key = await self._key(shape)
        found = [
            image
            for image in self._all()
            if image.manifest.key == key and image.manifest.disk_size <= shape.disk_size
        ]
        for image in sorted(found, key=_by_disk_and_age, reverse=True):
            if await self._is_sound(image):
                return image
        return None

    async def _is_sound(self, image: WarmImage) -> bool:
        """Tell whether an image is as it was made; what is not is passed over from then on.

        Looked at once in a daemon's life: a clone's disk stands on the frozen one, and neither
        that nor a cold start may begin with what is damaged.
        """
        try:
            await self.memory_of(image)
        except HostError as error:
            _log.warning("warm image %s is not used: %s", image.name, error.message)
            self._damaged.add(image.name)
            return False
        return True

    async def find_last_used(self) -> WarmImage | None:
        """Give the image a vm was last made from, of those that one can still begin with.

        It is for spares, which can't have a seed of their own before they are a vm's.
        """
        for image in sorted(self._all(), key=lambda image: image.last_used, reverse=True):
            made = image.manifest
            with suppress(CloudError):  # its template is gone
                shape = shape_of(self._templates.get_ready(made.template), made)
                if shape.has_cloud_init:
                    continue
                if (found := await self.find(shape)) is not None and found.name == image.name:
                    return image
        return None

    async def warm(
        self, name: str, mem_size: int, cpus: int, disk_size: int, order: Order
    ) -> JobInfo:
        """Make a warm image of a template for a shape, unless there is one."""
        shape = Shape(self._templates.get_ready(name), mem_size, cpus, disk_size)
        _check_can_warm(shape)
        job = await self._jobs.begin("template_warm", name, order)
        job.cancellable = True
        task = self._jobs.run(job, job.interruptible(self._ensure(shape, job)))
        if order.wait:
            await asyncio.shield(task)
        return await self._jobs.info(job.id)

    def consider(self, template: str, mem_size: int, cpus: int, disk_size: int) -> None:
        """Make a warm image in the background after a cold start, where that is configured."""
        shape = (template, mem_size, cpus, min(disk_size, DEFAULT_DISK_SIZE))
        if self._config.warm.mode == "auto" and shape not in self._begun:
            task = asyncio.create_task(self._make_in_background(*shape), name=f"warm {template}")
            self._begun[shape] = task
            task.add_done_callback(lambda _done: self._begun.pop(shape, None))

    async def list_of(self, template: str, spares: Counter[str]) -> list[WarmInfo]:
        """Describe the warm images of a template; `spares` counts those ready, by image."""
        used = await self._database.run(_count_uses)
        return [
            self._describe(image, used.get(image.name, 0), spares[image.name])
            for image in self._all()
            if image.manifest.template == template
        ]

    async def prune(self) -> None:
        """Remove what is broken, of no template, too old or too much; nothing a disk stands on."""
        used = await self._database.run(_count_uses)
        whole = sorted(self._all(), key=lambda image: image.last_used, reverse=True)
        kept, total = {*used, *self.stood_on()}, 0
        oldest = time.time() - self._config.warm.max_age_days * 86400
        for image in whole:
            total += image.disk_usage_bytes()
            is_wanted = total <= self._config.warm.max_size_bytes() and image.last_used >= oldest
            if is_wanted and self._templates.find_ready(image.manifest.template) is not None:
                kept.add(image.name)
        for path in list(self._directory.glob("[!.]*")):
            # Looked at once more in the thread that writes the rows of new vms: `vm_create` sees to
            # it there that what it has chosen is still in its place.
            if path.name not in kept and path.name not in self.stood_on():
                removing = self._directory / f"{_REMOVING}{path.name}"
                if await self._database.run(partial(_take_away, path, removing)):
                    _log.info("warm image %s is removed", path.name)
                    await asyncio.to_thread(shutil.rmtree, removing, ignore_errors=True)
                    if (memory := self._memories.pop(path.name, None)) is not None:
                        os.close(memory)

    async def _make_in_background(
        self, template: str, mem_size: int, cpus: int, disk_size: int
    ) -> None:
        try:
            shape = Shape(self._templates.get_ready(template), mem_size, cpus, disk_size)
            # The first boot of an image of others may take long, and fetch what it likes.
            is_ours = shape.can_be_warm and not shape.has_cloud_init
            if is_ours and await self.find(shape) is None:
                await self.warm(template, mem_size, cpus, disk_size, Order(0))
        except CloudError as error:
            _log.warning("no warm image of %s: %s", template, error.message)

    async def _ensure(self, shape: Shape, job: Job) -> WarmImage:
        async with self._making:
            there = await self.find(shape)
            return there if there is not None else await self._make(shape, job)

    async def _make(self, shape: Shape, job: Job) -> WarmImage:
        key = await self._key(shape)
        name = f"{key[:16]}-{secrets.token_hex(4)}"
        making = self._directory / f"{_MAKING}{name}"
        making.mkdir(parents=True)
        try:
            await self._database.run(
                lambda: check_memory(shape.mem_size, self._config.limits.overcommit)
            )
            made = await self._maker.make(shape, await self._spec(shape), making, job)
            try:
                await self._publish(key, shape, made, making, self._directory / name)
            except BaseException:
                os.close(made.memory)
                raise
            self._memories[name] = made.memory
        finally:
            await asyncio.to_thread(shutil.rmtree, making, ignore_errors=True)
        image = self.get(name)
        assert image is not None
        await make_blank_overlay(image)
        self.on_made()
        return image

    async def _publish(self, key: str, shape: Shape, made: Made, making: Path, final: Path) -> None:
        state = (making / STATE).read_bytes()
        manifest = Manifest(
            key=key,
            template=shape.template.name,
            mem_size=shape.mem_size,
            cpus=shape.cpus,
            disk_size=shape.disk_size,
            made_at=time.time(),
            memory_sha256=made.memory_sha256,
            state_bytes=len(state),
            state_sha256=hashlib.sha256(state).hexdigest(),
            disk_sha256=await asyncio.to_thread(sha256_of, making / DISK),
        )
        await asyncio.to_thread(seal, making, manifest, final)

    async def _key(self, shape: Shape) -> str:
        version = await asyncio.shield(self._version)
        binary = identify_binary(self._config.qemu.binary, version.version)
        contents = contents_of(shape.template)
        with_seed = shape.has_cloud_init
        if with_seed:
            contents["agent"] = agent_digest()
        spec = await self._spec(shape)
        return recipe_key(
            spec, with_tap=True, with_seed=with_seed, binary=binary, contents=contents
        )

    async def _spec(self, shape: Shape) -> MachineSpec:
        accelerator = await asyncio.shield(self._accelerator)
        return shape.spec(accelerator.name, self._config.qemu.binary)

    def _all(self) -> Iterator[WarmImage]:
        for path in self._directory.glob("[!.]*"):
            image = read_warm(path)
            if image is not None and image.name not in self._damaged:
                yield image

    def _describe(self, image: WarmImage, used_by: int, spares: int) -> WarmInfo:
        return WarmInfo(
            name=image.name,
            mem_size=image.manifest.mem_size,
            cpus=image.manifest.cpus,
            disk_size=image.manifest.disk_size,
            size=image.disk_usage_bytes(),
            made_at=image.manifest.made_at,
            last_used=image.last_used,
            used_by=used_by,
            spares=spares,
        )


def contents_of(template: ReadyTemplate) -> dict[str, str]:
    """Give digests of the files of a template that a machine begins with, by name."""
    return {"image": template.digest} | {
        path.name: _digest(path, path.stat().st_mtime_ns)
        for path in (template.kernel, template.initrd)
        if path is not None
    }


def _check_can_warm(shape: Shape) -> None:
    declaration = shape.template.declaration
    if not shape.can_be_warm:
        raise InvalidArgumentError(
            f"template {shape.template.name!r} can't be kept warm: {_why_not(shape.template)}",
            hint="its vms begin cold",
            parameter="template",
        )
    if shape.mem_size < declaration.min_mem_bytes:
        raise InvalidArgumentError(
            f"mem_size {shape.mem_size} is too small for {shape.template.name}",
            hint=f"give it at least {declaration.min_mem_size}",
            parameter="mem_size",
        )
    least = virtual_size_bytes(shape.template.image, declaration.image.format)
    if shape.disk_size < least:
        raise InvalidArgumentError(
            f"disk_size {shape.disk_size} is smaller than the image {shape.template.name}",
            hint=f"give it at least {least} bytes",
            parameter="disk_size",
        )


def _why_not(template: ReadyTemplate) -> str:
    if template.has_identity:
        return "each of its disks is somebody's already"
    if template.is_uefi:
        return "it boots by UEFI, whose variables are each vm's own"
    if template.has_hooks:
        return "it has hooks, which are for the first boot of each of its guests"
    return f"its guests take their identity by {template.declaration.guest.identity}"


def _by_disk_and_age(image: WarmImage) -> tuple[int, float]:
    return image.manifest.disk_size, image.manifest.made_at


def _take_away(path: Path, removing: Path) -> bool:
    """Take a warm image out of its place, in a transaction; False where a disk stands on it."""
    if Disk.select().where(Disk.warm_image == path.name).exists():
        return False
    if path.exists():  # a transaction may be run again
        path.rename(removing)
    return True


def _count_uses() -> dict[str, int]:
    """Count the disks that stand on each warm image, inside a transaction."""
    query = Disk.select(Disk.warm_image, fn.COUNT(Disk.id)).group_by(Disk.warm_image)
    return {name: count for name, count in query.tuples() if name is not None}


@cache
def _digest(path: Path, _changed_ns: int) -> str:
    return sha256_of(path)
