"""Starting, stopping, pausing and deleting a vm: one thing at a time for each."""

import asyncio
from contextlib import suppress
from typing import NoReturn

import msgspec

from oscloudd.cloud.states import DOWN_STATES, LIVE_STATES, VmState, WantedState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import CloudError, ExhaustedError, InvalidStateError, NotFoundError
from oscloudd.host.processes import find_processes_in, open_process
from oscloudd.host.resources import memory_available_bytes
from oscloudd.host.sessions import end_session
from oscloudd.machine.run_directory import RunDirectory
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Vm


class VmDeleted(msgspec.Struct, frozen=True):
    """The answer of `vm_delete`."""

    deleted: int
    name: str


class VmPower:
    """What is done to a vm as a whole."""

    def __init__(
        self, config: Config, database: Database, states: VmStates, supervisor: Supervisor
    ) -> None:
        self._config = config
        self._database = database
        self._states = states
        self._supervisor = supervisor
        self._locks: dict[int, asyncio.Lock] = {}

    def lock(self, vm_id: int) -> asyncio.Lock:
        """Give the lock that whoever does something to this vm holds."""
        return self._locks.setdefault(vm_id, asyncio.Lock())

    async def get(self, key: int | str) -> VmRecord:
        """Read a vm by id or name; raises NotFoundError."""
        return await self._database.run(lambda: read_vm(key))

    async def start(self, key: int | str) -> VmInfo:
        """Start a vm that is down, and answer when it runs."""
        vm = await self.get(key)
        async with self.lock(vm.id):
            await self._start(await self.get(vm.id))
        return describe(await self.get(vm.id))

    async def stop(self, key: int | str, *, force: bool, timeout_seconds: float) -> VmInfo:
        """Power a vm off: by its button, or at once with `force`; its disk stays.

        A vm that is down already is left as it is.
        """
        vm = await self.get(key)
        if force:
            self._hurry(vm)
        async with self.lock(vm.id):
            await self._stop(await self.get(vm.id), force, timeout_seconds)
        return describe(await self.get(vm.id))

    async def restart(self, key: int | str, *, force: bool, timeout_seconds: float) -> VmInfo:
        """Stop and start a vm."""
        vm = await self.get(key)
        async with self.lock(vm.id):
            vm = await self.get(vm.id)
            if vm.state not in LIVE_STATES:
                self._refuse(vm, "restarted", f"start it: oscloudctl vm-start {vm.name}")
            await self._stop(vm, force, timeout_seconds)
            await self._start(await self.get(vm.id))
        return describe(await self.get(vm.id))

    async def pause(self, key: int | str) -> VmInfo:
        """Stop the processors of a running vm."""
        return await self._switch(key, VmState.RUNNING, VmState.PAUSED)

    async def resume(self, key: int | str) -> VmInfo:
        """Let a paused vm go on."""
        return await self._switch(key, VmState.PAUSED, VmState.RUNNING)

    async def delete(self, key: int | str, *, force: bool, timeout_seconds: float) -> VmDeleted:
        """Stop a vm and remove it with its disk: there is no way back."""
        vm = await self.get(key)
        if force:
            self._hurry(vm)
        async with self.lock(vm.id):
            vm = await self.get(vm.id)
            await self._states.want(vm.id, WantedState.DELETED)
            if self._supervisor.find(vm.id) is not None and not force:
                await self._stop(vm, force=False, timeout_seconds=timeout_seconds)
            await self.demolish(vm)
        self._locks.pop(vm.id, None)
        return VmDeleted(vm.id, vm.name)

    async def demolish(self, vm: VmRecord) -> None:
        """Remove everything there is of a vm, its rows last; may be called again at any point."""
        await self._states.see(vm.id, VmState.DELETING)
        qemu = self._supervisor.find(vm.id)
        if qemu is not None:
            await qemu.stop(force=True)
            await self._supervisor.released(vm.id)
        else:
            await self.end_stray(vm)
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        await asyncio.to_thread(paths.remove)
        self._supervisor.forget_neighbour(vm)

        def forget() -> None:
            Vm.delete().where(Vm.id == vm.id).execute()
            Disk.delete().where(Disk.id == vm.disk_id).execute()

        await self._database.run(forget)
        self._states.changes.announce()

    async def end_stray(self, vm: VmRecord) -> None:
        """Kill a qemu an earlier daemon started and did not write down; clear its directory.

        Its working directory, the vm's own run directory, is the proof that it is ours.
        """
        directory = vm_paths(self._config, vm.id, vm.disk_id).run_directory
        for identity in await asyncio.to_thread(find_processes_in, directory):
            with suppress(NotFoundError):
                await end_session(open_process(identity))
        await asyncio.to_thread(RunDirectory(directory).remove)

    async def _start(self, vm: VmRecord) -> None:
        if vm.state not in DOWN_STATES:
            self._refuse(vm, "started", f"see: oscloudctl vm-info {vm.name}")
        check_memory(vm.mem_size)
        await self._states.want(vm.id, WantedState.RUNNING)
        await self._states.see(vm.id, VmState.STARTING)
        try:
            await self._supervisor.launch(vm)
        except CloudError as error:
            await self._states.see(vm.id, VmState.ERROR, error.message)
            raise

    async def _stop(self, vm: VmRecord, force: bool, timeout_seconds: float) -> None:  # noqa: FBT001 - passed on
        await self._states.want(vm.id, WantedState.STOPPED)
        qemu = self._supervisor.find(vm.id)
        if qemu is None:
            if vm.state in LIVE_STATES:
                self._refuse(vm, "stopped", "its qemu is not in our hands; restart oscloudd")
            return
        before = vm.state
        await self._states.see(vm.id, VmState.STOPPING)
        try:
            await qemu.stop(timeout_seconds=timeout_seconds, force=force)
        except CloudError:
            await self._states.see(vm.id, VmState(before), "it could not be stopped")
            raise
        await self._supervisor.released(vm.id)
        await self._states.see(vm.id, VmState.STOPPED, "stopped by the user")

    async def _switch(self, key: int | str, before: VmState, after: VmState) -> VmInfo:
        vm = await self.get(key)
        async with self.lock(vm.id):
            vm = await self.get(vm.id)
            if vm.state == after:
                return describe(vm)
            if vm.state != before:
                verb = "paused" if after == VmState.PAUSED else "resumed"
                self._refuse(vm, verb, f"see: oscloudctl vm-info {vm.name}")
            qemu = self._supervisor.get(vm)
            await (qemu.pause() if after == VmState.PAUSED else qemu.resume())
            reason = "paused by the user" if after == VmState.PAUSED else ""
            await self._states.see(vm.id, after, reason)
        return describe(await self.get(vm.id))

    def _hurry(self, vm: VmRecord) -> None:
        """Let a forced stop cut short a gentle one that holds the lock."""
        qemu = self._supervisor.find(vm.id)
        if qemu is not None and self.lock(vm.id).locked():
            task = asyncio.ensure_future(qemu.stop(force=True))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _refuse(self, vm: VmRecord, verb: str, hint: str) -> NoReturn:
        raise InvalidStateError(
            f"vm {vm.name!r} can't be {verb}: it is {vm.state}", hint=hint, state=vm.state
        )


def check_memory(mem_size: int) -> None:
    """Raise ExhaustedError when the host has not this much memory to give now."""
    available = memory_available_bytes()
    if mem_size > available:
        raise ExhaustedError(
            f"mem_size {mem_size} does not fit: the host has {available} bytes of memory available",
            hint="ask for less, or stop a vm",
            resource="memory",
            wanted=mem_size,
            available=available,
        )
