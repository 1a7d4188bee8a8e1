"""Suspending vms to disk: their memory saved, found again, judged, and dropped.

What the files are is in `suspended_files`, what qemu does in `machine.suspend`, and what comes
before and after in `vm_steps` and `vm_power`.

A saved state goes with the disk as it was at that moment, and with no other: `drop` comes before
the guest runs again, be it from there or because it was not suspended after all.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import NoReturn

from oscloudd.cloud.states import VmState
from oscloudd.cloud.supervisor import machine_spec
from oscloudd.cloud.suspended_files import Manifest, SavedState, SuspendedFiles
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.warm_images import contents_of
from oscloudd.config import Config
from oscloudd.errors import ExhaustedError, HostError, InvalidStateError
from oscloudd.host.processes import resource_usage
from oscloudd.host.resources import disk_free_bytes
from oscloudd.machine.accelerator import Accelerator
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.qemu_version import inspect_qemu
from oscloudd.machine.suspend import (
    Saving,
    ask_saving,
    has_memory_object,
    plain_version,
    running_version,
    save_whole,
    transfer_seconds,
    wait_saved,
)
from oscloudd.machine.warm import identify_binary, recipe_key
from oscloudd.units import format_size


class Suspension:
    """The saved memory of every vm that has any."""

    def __init__(
        self, config: Config, templates: Templates, accelerator: "asyncio.Task[Accelerator]"
    ) -> None:
        self._config = config
        self._templates = templates
        self._accelerator = accelerator
        self._inspected: tuple[object, str] = (None, "")

    def is_saved(self, vm: VmRecord) -> bool:
        """Tell whether there is saved memory of a vm, whole or damaged."""
        return self._files(vm).exists()

    # Suspending

    def check_room(self, vm: VmRecord) -> None:
        """Raise ExhaustedError unless the disk has room for what a running vm has in memory."""
        most = vm.mem_size
        usage = None if vm.pid is None else resource_usage(vm.pid)
        # What a clone has not touched is not in its qemu's account, and is saved all the same.
        if usage is not None and vm.started == "cold":
            most = min(most, usage.resident_bytes)
        free = disk_free_bytes(self._config.state_path)
        wanted = most + self._config.limits.min_free_disk_bytes()
        if free < wanted:
            raise ExhaustedError(
                f"{self._config.state_path} has {format_size(free)} free: to suspend vm "
                f"{vm.name!r} may take {format_size(most)}, and "
                f"{self._config.limits.min_free_disk} must stay free",
                hint="free some space, or stop it: oscloudctl vm-stop " + vm.name,
                resource="disk",
                free=free,
                wanted=wanted,
            )

    async def save(
        self,
        vm: VmRecord,
        qemu: Qemu,
        *,
        is_resumed: bool,
        files: SuspendedFiles | None = None,
    ) -> None:
        """Stop a vm's guest and save its memory, whole or not at all; raises HostError.

        With `is_resumed` an earlier daemon may have come as far as it likes. `files` is where to,
        if not beside its disk.
        """
        files = files or self._files(vm)
        limit = transfer_seconds(vm.mem_size)
        match await ask_saving(qemu) if is_resumed else Saving.NONE:
            case Saving.NONE:
                await asyncio.to_thread(files.drop)
                descriptor = files.begin()
                try:
                    await save_whole(qemu, descriptor, timeout_seconds=limit)
                finally:
                    os.close(descriptor)
            case Saving.UNDER_WAY:
                await wait_saved(qemu, timeout_seconds=limit)
        manifest = await self._describe(vm, qemu, files)
        await _to_its_end(asyncio.to_thread(files.publish, manifest))

    # Resuming

    async def check(self, vm: VmRecord, files: SuspendedFiles | None = None) -> Manifest | None:
        """Raise InvalidStateError or HostError if a vm can't go on from its saved memory.

        The memory itself is looked at only by `opened`. A vm that was not suspended passes: None.
        `files` are others than those beside its disk.
        """
        files = files or self._files(vm)
        if not files.exists():
            if vm.state == VmState.SUSPENDED:
                raise _with_hint(vm, HostError(f"{files.directory} is missing"))
            return None
        try:
            manifest = await asyncio.to_thread(files.read_manifest)
        except HostError as error:
            raise _with_hint(vm, error) from error
        await self._check_machine(vm, manifest)
        return manifest

    @asynccontextmanager
    async def opened(self, vm: VmRecord) -> AsyncIterator[SavedState | None]:
        """Give a vm's saved memory for as long as it is read, checked; None where there is none.

        Raises HostError when it is damaged, and what `check` raises.
        """
        manifest = await self.check(vm) if self.is_saved(vm) else None
        if manifest is None:
            yield None
            return
        try:
            descriptor = await asyncio.to_thread(self._files(vm).open_state, manifest)
        except HostError as error:
            raise _with_hint(vm, error) from error
        try:
            yield SavedState(descriptor, manifest.has_memory_object)
        finally:
            os.close(descriptor)

    async def drop(self, vm: VmRecord) -> None:
        """Remove a vm's saved memory for good, whole or not; raises HostError."""
        await asyncio.to_thread(self._files(vm).drop)

    async def drop_unfinished(self, vm: VmRecord) -> None:
        """Remove what was begun to be saved and is no job's any more."""
        await asyncio.to_thread(self._files(vm).drop_part)

    async def _describe(self, vm: VmRecord, qemu: Qemu, files: SuspendedFiles) -> Manifest:
        has_object, version = await has_memory_object(qemu), await running_version(qemu)
        size, digest = await asyncio.to_thread(files.measure)
        return Manifest(
            key=self._key(vm, vm.accelerator, has_object=has_object),
            qemu_version=version,
            accelerator=vm.accelerator,
            has_memory_object=has_object,
            made_at=time.time(),
            state_bytes=size,
            state_sha256=digest,
        )

    async def _check_machine(self, vm: VmRecord, manifest: Manifest) -> None:
        version = await self._installed_version()
        accelerator = (await asyncio.shield(self._accelerator)).name
        if version != manifest.qemu_version:
            _refuse(vm, "qemu", f"qemu {manifest.qemu_version}", f"qemu {version}")
        if accelerator != manifest.accelerator:
            _refuse(vm, "accelerator", manifest.accelerator, accelerator)
        if self._key(vm, accelerator, has_object=manifest.has_memory_object) != manifest.key:
            then = "another version of OS Cloud or of its template, or other network cards"
            now = "what is there now"
            _refuse(vm, "virtual hardware", then, now)

    def _key(self, vm: VmRecord, accelerator: str, *, has_object: bool) -> str:
        template = self._templates.get_ready(vm.template)
        spec = machine_spec(vm, template, accelerator, self._config.qemu.binary)
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        traits: dict[str, object] = {"memory object": has_object, "seed": paths.seed.exists()}
        if vm.layer_id is not None:  # which never changes, nor does what is read of it
            traits["layer"] = vm.layer_id
        if vm.other_nics:
            traits["nics"] = [(nic.slot, nic.mac) for nic in vm.other_nics]
        contents = contents_of(template) | {name: str(trait) for name, trait in traits.items()}
        # The very qemu that runs may be older than what is installed: its version is compared.
        return recipe_key(spec, with_tap=True, binary={}, contents=contents)

    async def _installed_version(self) -> str:
        """Give the version of the qemu that is installed by now; it may change while we run."""
        binary = self._config.qemu.binary
        identity = identify_binary(binary, "")
        if self._inspected[0] != identity:
            self._inspected = (identity, plain_version((await inspect_qemu(binary)).version))
        return self._inspected[1]

    def _files(self, vm: VmRecord) -> SuspendedFiles:
        return SuspendedFiles(vm_paths(self._config, vm.id, vm.disk_id).suspended)


def drop_hint(vm: VmRecord) -> str:
    """Say how a vm comes to a cold start instead."""
    return f"drop its memory: oscloudctl vm-stop --force {vm.name}"


def _refuse(vm: VmRecord, what: str, then: str, now: str) -> NoReturn:
    raise InvalidStateError(
        f"vm {vm.name!r} can't be resumed: its memory was saved with another {what}, {then}, and "
        f"it would go on with {now}",
        hint=f"go back to that {what}, or {drop_hint(vm)}",
        state=vm.state,
    )


def _with_hint(vm: VmRecord, error: HostError) -> HostError:
    return HostError(
        f"vm {vm.name!r} can't be resumed: {error.message}",
        hint=f"put it back, or {drop_hint(vm)}",
        **error.details,
    )


async def _to_its_end(work: Awaitable[None]) -> None:
    """Wait for work in a thread, which goes on when its waiter is cancelled: to its end always."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait([task])
