"""Making a warm image: a template booted as nobody, and saved where it waits for its identity."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oscloudd.cloud.dialogues import converse
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.warm_files import DISK, MEMORY, STATE, Manifest
from oscloudd.config import Config
from oscloudd.guest.dialogue import postpone_identity, wait_warm
from oscloudd.guest.seed import write_seed
from oscloudd.guest.warm_seed import build_warm_seed_files
from oscloudd.host.images import create_overlay
from oscloudd.host.keys import make_host_key
from oscloudd.host.network.taps import open_tap
from oscloudd.host.sessions import end_sessions_below
from oscloudd.host.users import QemuUser
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.sealed_memory import make_memory, memory_path, seal_memory, write_memory
from oscloudd.machine.warm import save

_BOOT_SECONDS = 600.0
# Of an image of others, which may do at its first boot what it likes.
_CLOUD_INIT_SECONDS = 1800.0
# One warm image is made at a time.
_TAP = "oscwarm0"
# Locally administered; no vm has it, and a clone gets its own.
_MAC = "52:54:00:00:00:01"

# vm_create's own. An image for it is good for larger disks, too.
DEFAULT_DISK_SIZE = 10 << 30


@dataclass(frozen=True)
class Shape:
    """What a warm image is made for."""

    template: ReadyTemplate
    mem_size: int
    cpus: int
    disk_size: int  # the least one; a clone's file system grows to a larger one

    @property
    def has_cloud_init(self) -> bool:
        """Whether its guest is told who it is by a seed, and by our agent in it once it is saved.

        Its clones have seeds of their own, so no spare stands ready.
        """
        return self.template.declaration.guest.identity == "cloud-init"

    @property
    def can_be_warm(self) -> bool:
        """Whether its guest can wait for its identity: it has none yet, and nothing else to do."""
        template = self.template
        is_told = template.declaration.guest.identity in ("serial", "cloud-init")
        return is_told and not (template.has_identity or template.is_uefi or template.has_hooks)

    def spec(self, accelerator: str, binary: str) -> MachineSpec:
        """Give the machine that is booted and saved."""
        declaration = self.template.declaration
        return MachineSpec(
            name="warm",
            uuid="00000000-0000-4000-8000-000000000000",
            memory_bytes=self.mem_size,
            cpus=self.cpus,
            accelerator=accelerator,
            mac=_MAC,
            binary=binary,
            base_format=declaration.image.format,
            cmdline=declaration.boot.cmdline,
            memory_shared=True,
        )


def shape_of(template: ReadyTemplate, made: Manifest) -> Shape:
    """Give what a warm image of this template was made for."""
    return Shape(template, made.mem_size, made.cpus, made.disk_size)


@dataclass(frozen=True)
class Made:
    """The memory of a guest that was saved, sealed and open, and its SHA-256."""

    memory: int
    memory_sha256: str


class WarmMaker:
    """Boots and saves; its qemus are found by their working directory, below RUNTIME/warm."""

    def __init__(self, config: Config, user: QemuUser) -> None:
        self._run_directory = config.runtime_path / "warm"
        self._user = user

    async def remove_leftovers(self) -> None:
        """End what an earlier daemon was making."""
        await end_sessions_below(self._run_directory)
        await asyncio.to_thread(shutil.rmtree, self._run_directory, ignore_errors=True)

    async def make(self, shape: Shape, spec: MachineSpec, making: Path, job: Job) -> Made:
        """Fill the directory `making`; raises CloudError, and nothing runs on then."""
        template = shape.template
        job.report("disk", f"making a disk on {template.name}")
        image_format = template.declaration.image.format
        await create_overlay(making / DISK, template.image, image_format, shape.disk_size)
        memory = make_memory(shape.mem_size)
        try:
            job.report("starting", "starting qemu")
            async with self._running(shape, spec, making, memory) as qemu:
                await qemu.resume()
                job.report("booting", "waiting for the template's boot")
                await self._postpone(qemu, has_cloud_init=shape.has_cloud_init)
                job.report("saving", "saving what it has come to")
                await _save_state(qemu, making / STATE)
            digest = await asyncio.to_thread(write_memory, memory, making / MEMORY)
            seal_memory(memory)
        except BaseException:
            os.close(memory)
            raise
        return Made(memory, digest)

    @asynccontextmanager
    async def _running(
        self, shape: Shape, spec: MachineSpec, making: Path, memory: int
    ) -> AsyncIterator[Qemu]:
        run_directory = self._run_directory / making.name
        run_directory.mkdir(parents=True, exist_ok=True)
        seed = await _make_seed(run_directory) if shape.has_cloud_init else None
        files = MachineFiles(
            run_directory=run_directory,
            qemu_log=run_directory / "qemu.log",
            console_log=run_directory / "console.log",
            disk=making / DISK,
            base=shape.template.image,
            seed=seed,
            kernel=shape.template.kernel,
            initrd=shape.template.initrd,
            memory=memory_path(memory),
        )
        tap_fd = open_tap(_TAP, None)
        try:
            qemu = await launch(spec, files, self._user, lambda _name, _data: None, tap_fd=tap_fd)
        finally:
            os.close(tap_fd)
        try:
            yield qemu
        finally:
            await qemu.stop(force=True)
            await qemu.close()
            await asyncio.to_thread(shutil.rmtree, run_directory, ignore_errors=True)

    async def _postpone(self, qemu: Qemu, *, has_cloud_init: bool) -> None:
        # Its guest would find the channel at its end where nobody has it open.
        with qemu.console.attach_socket(with_history=True) as line, qemu.open_channel():
            talk = partial(postpone_identity, line, boot_seconds=_BOOT_SECONDS)
            if has_cloud_init:
                talk = partial(wait_warm, line, boot_seconds=_CLOUD_INIT_SECONDS)
            await converse(talk, line)


async def _make_seed(directory: Path) -> Path:
    seed = directory / "seed.iso"
    files = build_warm_seed_files(_MAC, await make_host_key(directory))
    await asyncio.to_thread(write_seed, seed, files)
    return seed


async def _save_state(qemu: Qemu, path: Path) -> None:
    state = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        await save(qemu, state)
    finally:
        os.close(state)
