"""One spare: a clone of a warm image, restored and standing still, that is no vm's yet.

It has a uuid, a MAC and a tap, which the vm that takes it takes over, and no row anywhere: what a
dead daemon has left of it is removed by the next one, and never adopted.
"""

import asyncio
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from functools import partial

from oscloudd.cloud.allocation import first_free_index, mac_of
from oscloudd.cloud.dialogues import converse
from oscloudd.cloud.taken import taken_taps
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import (
    VmPaths,
    spare_logs,
    spare_paths,
    spares_disk_directory,
    spares_run_directory,
)
from oscloudd.cloud.warm_files import WarmImage, make_clone_disk
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.cloud.warm_making import shape_of
from oscloudd.config import Config
from oscloudd.errors import HostError
from oscloudd.guest.dialogue import rehearse_clone
from oscloudd.host.images import publish
from oscloudd.host.network.taps import open_tap
from oscloudd.host.sessions import end_sessions_below
from oscloudd.host.users import QemuUser
from oscloudd.machine.accelerator import Accelerator
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.monitor import OnEvent
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.warm import ended_on_failure, restore_or_end
from oscloudd.store.database import Database

# It takes 0.4 s on an idle machine.
_REHEARSAL_SECONDS = 60.0


@dataclass(frozen=True)
class Spare:
    """A spare and the hold on its qemu; whoever has it hands it over or ends it."""

    uuid: str
    image: str  # the name of the warm image its disk stands on
    tap_index: int
    accelerator: str
    paths: VmPaths
    qemu: Qemu

    @property
    def is_well(self) -> bool:
        """Whether a vm can have it."""
        return self.qemu.is_connected and not self.qemu.exited.done()

    async def hand_over(self, paths: VmPaths, on_event: OnEvent) -> None:
        """Move everything of it to where a vm has it, durably.

        The vm's run directory must not be there. Raises HostError; the spare is only good for being
        ended then, and of its files some are the vm's.
        """
        if not self.is_well:
            raise HostError(f"process {self.qemu.identity.pid}, a spare clone, has ended")
        try:
            await asyncio.to_thread(_move, self.paths, paths)
        except OSError as error:
            raise HostError(f"a spare clone's files can't be moved: {error}") from error
        self.qemu.hand_over(paths.run_directory, log=paths.qemu_log, on_event=on_event)

    async def end(self) -> None:
        """End its qemu and remove what has not been handed over.

        Raises OperationTimeoutError when qemu does not end; the files are gone all the same.
        """
        try:
            await self.qemu.stop(force=True)
        finally:
            await self.qemu.close()
            await asyncio.to_thread(self.paths.remove)


class SpareMaker:
    """Makes spares; their qemus work in directories below RUNTIME/spares."""

    def __init__(
        self,
        config: Config,
        database: Database,
        templates: Templates,
        warm_images: WarmImages,
        user: QemuUser,
        accelerator: "asyncio.Task[Accelerator]",
    ) -> None:
        self._config = config
        self._database = database
        self._templates = templates
        self._warm_images = warm_images
        self._user = user
        self._accelerator = accelerator

    async def remove_leftovers(self) -> None:
        """End and remove the spares of an earlier daemon."""
        await end_sessions_below(spares_run_directory(self._config))
        await asyncio.to_thread(_remove_all, self._config)

    async def make(self, image: WarmImage) -> Spare:
        """Make a spare of a warm image.

        Raises CloudError; nothing is left of it then.
        """
        paths = spare_paths(self._config, unique := str(uuid.uuid4()))
        template = self._templates.get_ready(image.manifest.template)
        start = await self._warm_images.open(image)
        accelerator = await asyncio.shield(self._accelerator)
        shape = shape_of(template, image.manifest)
        spec = replace(
            shape.spec(accelerator.name, self._config.qemu.binary),
            # It stays what a process list shows of the vm: qemu can't be given another.
            name="spare",
            uuid=unique,
            mac=mac_of(unique),
            memory_shared=False,
            incoming=True,
        )
        files = MachineFiles(
            run_directory=paths.run_directory,
            qemu_log=paths.qemu_log,
            console_log=paths.console_log,
            disk=paths.disk,
            base=template.image,
            frozen=image.disk,
            memory=start.memory,
            kernel=template.kernel,
            initrd=template.initrd,
        )
        taps: list[tuple[int, int]] = []
        try:
            paths.disk_directory.mkdir(parents=True)
            await make_clone_disk(paths.disk, image)
            # By the thread, and after the look at the rows, by which vms are given theirs.
            await self._database.run(lambda: _open_free_tap(taps))
            [(tap_index, tap_fd)] = taps
            qemu = await launch(spec, files, self._user, _ignore, tap_fd=tap_fd)
            await restore_or_end(qemu, start.state)
            await _rehearse(qemu)
        except BaseException:
            await asyncio.to_thread(paths.remove)
            raise
        finally:
            for _, tap_fd in taps:
                os.close(tap_fd)
        return Spare(unique, image.name, tap_index, accelerator.name, paths, qemu)


def _remove_all(config: Config) -> None:
    for directory in (spares_run_directory(config), spares_disk_directory(config)):
        shutil.rmtree(directory, ignore_errors=True)
    for log in spare_logs(config):
        log.unlink(missing_ok=True)


async def _rehearse(qemu: Qemu) -> None:
    """Have the guest greet itself once, and stand still again; ends qemu and raises HostError."""
    async with ended_on_failure(qemu, "a spare clone can't be restored"):
        with qemu.console.attach_socket() as line, qemu.open_channel() as channel:
            await qemu.resume()
            rehearse = partial(rehearse_clone, line, channel, seconds=_REHEARSAL_SECONDS)
            await converse(rehearse, line, channel)
        await qemu.pause()


def _move(source: VmPaths, target: VmPaths) -> None:
    target.disk_directory.mkdir(parents=True, exist_ok=True)
    publish(source.disk, target.disk)
    source.disk_directory.rmdir()
    source.qemu_log.rename(target.qemu_log)
    source.console_log.rename(target.console_log)
    source.run_directory.rename(target.run_directory)


def _open_free_tap(opened: list[tuple[int, int]]) -> None:
    """Add number and descriptor of a tap that no vm has and no bridge, in a transaction.

    One that the database had run again adds no other.
    """
    if not opened:
        index = first_free_index(taken_taps())
        opened.append((index, open_tap(f"osctap{index}", None)))


def _ignore(_name: str, _data: object) -> None:
    """Nobody wants to know what a guest that stands still does."""
