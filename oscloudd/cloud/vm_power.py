"""Starting, stopping, pausing, suspending, deleting a vm: when it may be, what it begins with.

What is then done, step by step, is in `operations`.
"""

import asyncio
from typing import Any, NoReturn

import msgspec

from oscloudd.cloud.heartbeat import PAUSED_BY_USER
from oscloudd.cloud.jobs import JobInfo, Jobs, Order
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.states import (
    DOWN_STATES,
    LIVE_STATES,
    OFF_STATES,
    SEEN_STATES,
    VmState,
    WantedState,
)
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.suspension import Suspension, drop_hint
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.cloud.vm_states import VmStates, write_state
from oscloudd.cloud.warm_pool import WarmPool
from oscloudd.config import Config
from oscloudd.errors import InvalidStateError
from oscloudd.store.database import Database


class VmDeleted(msgspec.Struct, frozen=True):
    """The answer of `vm_delete`."""

    deleted: int
    name: str


class VmPower:
    """What is done to a vm as a whole."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        supervisor: Supervisor,
        suspension: Suspension,
        jobs: Jobs,
        operations: Operations,
        pool: WarmPool,
    ) -> None:
        self._overcommit = config.limits.overcommit
        self._database = database
        self._states = states
        self._supervisor = supervisor
        self._suspension = suspension
        self._jobs = jobs
        self._operations = operations
        self._pool = pool

    async def start(self, key: int | str, order: Order) -> VmInfo | JobInfo:
        """Start a vm that is down, and answer when it runs; one that is suspended goes on."""
        vm = await self._get(key)
        if vm.state in DOWN_STATES:
            await self._suspension.check(vm)
        await self.make_room(vm)
        return await self._order("vm_start", vm, order, self.decide_start)

    async def make_room(self, vm: VmRecord) -> None:
        """End spare clones where a vm that is about to start needs their memory."""
        await self._pool.make_room(vm.mem_size)

    async def stop(
        self, key: int | str, order: Order, *, force: bool, timeout_seconds: float
    ) -> VmInfo | JobInfo:
        """Power a vm off: by its button, or at once with `force`; its disk stays.

        A vm that is down already is left as it is, and no policy will revive it; one that is
        suspended loses its memory with `force`.
        """
        vm = await self._get(key)
        if force:
            self._hurry(vm)

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            if vm.state in DOWN_STATES and not self._drops_memory(vm, force=force):
                write_state(vm.id, VmState(vm.state), vm.reason, wanted=WantedState.STOPPED)
                return None
            self._check_can_end(vm, "stopped", force=force)
            return begin_end(
                vm,
                VmState.STOPPING,
                WantedState.STOPPED,
                force=force,
                timeout_seconds=timeout_seconds,
            )

        return await self._order("vm_stop", vm, order, decide)

    async def restart(
        self, key: int | str, order: Order, *, force: bool, timeout_seconds: float
    ) -> VmInfo | JobInfo:
        """Stop and start a vm."""

        def decide(vm: VmRecord) -> dict[str, Any]:
            if vm.state not in LIVE_STATES:
                is_saved = vm.state == VmState.SUSPENDED
                verb, command = ("resume", "vm-resume") if is_saved else ("start", "vm-start")
                refuse(vm, "restarted", f"{verb} it: oscloudctl {command} {vm.name}")
            self._check_can_end(vm, "restarted", force=force)
            return begin_end(
                vm,
                VmState.STOPPING,
                WantedState.RUNNING,
                force=force,
                timeout_seconds=timeout_seconds,
            )

        return await self._order("vm_restart", await self._get(key), order, decide)

    async def delete(
        self, key: int | str, order: Order, *, force: bool, timeout_seconds: float
    ) -> VmDeleted | JobInfo:
        """Stop a vm and remove it with its disk: there is no way back."""
        vm = await self._get(key)
        _check_not_protected(vm)
        if force:
            self._hurry(vm)

        def decide(vm: VmRecord) -> dict[str, Any]:
            _check_not_protected(vm)
            if vm.state not in (*DOWN_STATES, VmState.CREATING, VmState.DELETING):
                self._check_can_end(vm, "deleted", force=force)
            return begin_end(
                vm,
                VmState.DELETING,
                WantedState.DELETED,
                force=force,
                timeout_seconds=timeout_seconds,
            )

        answer = await self._order("vm_delete", vm, order, decide)
        return answer if isinstance(answer, JobInfo) else VmDeleted(vm.id, vm.name)

    async def pause(self, key: int | str) -> VmInfo:
        """Stop the processors of a running vm."""
        return await self._switch(key, VmState.RUNNING, VmState.PAUSED)

    async def resume(self, key: int | str, order: Order) -> VmInfo | JobInfo:
        """Let a vm go on that is paused or suspended."""
        vm = await self._get(key)
        if vm.state == VmState.SUSPENDED:
            return await self.start(vm.id, order)
        return await self._switch(vm.id, VmState.PAUSED, VmState.RUNNING)

    async def suspend(self, key: int | str, order: Order) -> VmInfo | JobInfo:
        """Save a vm with its memory to disk and end its qemu; one that is suspended stays so."""
        vm = await self._get(key)
        if vm.state in (VmState.RUNNING, VmState.PAUSED):
            await asyncio.to_thread(self._suspension.check_room, vm)

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            if vm.state == VmState.SUSPENDED:
                return None
            self._check_can_suspend(vm)
            write_state(vm.id, VmState.STOPPING, "being suspended", wanted=WantedState.STOPPED)
            is_paused = vm.state == VmState.PAUSED
            return {"force": False, "wanted": vm.wanted_state, "paused": is_paused}

        return await self._order("vm_suspend", vm, order, decide)

    def decide_start(self, vm: VmRecord) -> dict[str, Any]:
        """Allow a start and write down that it has begun, inside its transaction."""
        if vm.state not in DOWN_STATES:
            refuse(vm, "started", f"see: oscloudctl vm-info {vm.name}")
        check_memory(vm.mem_size, self._overcommit)
        write_state(vm.id, VmState.STARTING, wanted=WantedState.RUNNING)
        return {"resumes": True} if vm.state == VmState.SUSPENDED else {}

    async def _order(
        self, kind: str, vm: VmRecord, order: Order, decide: Decide
    ) -> VmInfo | JobInfo | Any:
        begun = await self._operations.begin(kind, vm.id, order, decide)
        if begun is not None:
            job, task = begun
            if not order.wait:
                return await self._jobs.info(job.id)
            await asyncio.shield(task)
        self._states.changes.announce()
        return None if kind == "vm_delete" else describe(await self._get(vm.id))

    async def _switch(self, key: int | str, before: VmState, after: VmState) -> VmInfo:
        vm = await self._get(key)
        async with self._operations.lock(vm.id):
            vm = await self._get(vm.id)
            if vm.state == after == VmState.PAUSED:
                # What a full disk has paused its user wants paused from now on.
                self._supervisor.pause_stands(vm.id)
                await self._states.see_if(vm.id, SEEN_STATES, after, PAUSED_BY_USER)
                return describe(await self._get(vm.id))
            if vm.state == after:
                return describe(vm)
            if vm.state != before:
                verb = "paused" if after == VmState.PAUSED else "resumed"
                refuse(vm, verb, f"see: oscloudctl vm-info {vm.name}")
            qemu = self._supervisor.get(vm)
            if after == VmState.RUNNING:
                await self._suspension.drop(vm)  # it was to be suspended, and that went wrong
            await (qemu.pause() if after == VmState.PAUSED else qemu.resume())
            reason = PAUSED_BY_USER if after == VmState.PAUSED else ""
            await self._states.see_if(vm.id, SEEN_STATES, after, reason)
        return describe(await self._get(vm.id))

    def _check_can_end(self, vm: VmRecord, verb: str, *, force: bool) -> None:
        """Refuse what would not come to its end, before anything is written."""
        if vm.state == VmState.CREATING:
            refuse(vm, verb, "wait for it, or cancel the job that makes it: oscloudctl job-list")
        if vm.state == VmState.UNRESPONSIVE and not force:
            refuse(vm, verb, "its qemu does not answer; add --force to end it all the same")
        if vm.is_process_alive() and self._supervisor.find(vm.id) is None and not force:
            refuse(vm, verb, f"its qemu (process {vm.pid}) is not in our hands: add --force")

    def _drops_memory(self, vm: VmRecord, *, force: bool) -> bool:
        """Tell whether to stop a vm that is down drops its memory; refuse that without `force`."""
        if vm.state == VmState.SUSPENDED and not force:
            hint = f"resume it: oscloudctl vm-resume {vm.name}, or {drop_hint(vm)}"
            refuse(vm, "stopped", hint)
        return vm.state == VmState.SUSPENDED or (force and self._suspension.is_saved(vm))

    def _check_can_suspend(self, vm: VmRecord) -> None:
        if vm.state not in (VmState.RUNNING, VmState.PAUSED):
            refuse(vm, "suspended", f"see: oscloudctl vm-info {vm.name}")
        if vm.state == VmState.PAUSED and vm.reason != PAUSED_BY_USER:
            refuse(vm, "suspended", f"it stands still for another reason: {vm.reason}")
        if not vm.identified:
            hint = f"wait until it is ready: oscloudctl vm-wait {vm.name}"
            raise InvalidStateError(
                f"vm {vm.name!r} can't be suspended: its guest does not know yet who it is",
                hint=hint,
                state=vm.state,
            )
        self._supervisor.get(vm)

    def _hurry(self, vm: VmRecord) -> None:
        """Let a forced stop cut short a gentle one that holds the vm."""
        qemu = self._supervisor.find(vm.id)
        is_busy = vm.state != VmState.CREATING and self._operations.lock(vm.id).locked()
        if qemu is not None and is_busy:
            task = asyncio.ensure_future(qemu.stop(force=True))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _get(self, key: int | str) -> VmRecord:
        return await self._database.run(lambda: read_vm(key))


def begin_end(
    vm: VmRecord, state: VmState, wanted: WantedState, *, force: bool, timeout_seconds: float
) -> dict[str, Any]:
    """Write down that a vm is being ended; give what the steps need."""
    write_state(vm.id, state, wanted=wanted)
    return {
        "force": force,
        "timeout": timeout_seconds,
        "pid": vm.pid,
        "wanted": vm.wanted_state,
        "paused": vm.state == VmState.PAUSED,
    }


def _check_not_protected(vm: VmRecord) -> None:
    if vm.protect:
        raise InvalidStateError(
            f"vm {vm.name!r} can't be deleted: it is protected",
            hint=f"lift that first: oscloudctl vm-set --protect no {vm.name}",
            state=vm.state,
        )


def check_can_plug(
    supervisor: Supervisor, vm: VmRecord, verb: str, what: str, *, may_be_paused: bool
) -> None:
    """Refuse a change of a vm's disks or cards that would not come to its end.

    Called before anything is written.
    """
    if vm.state in OFF_STATES:
        return
    if vm.state == VmState.SUSPENDED:
        refuse(vm, verb, f"its memory goes with its {what}: oscloudctl vm-resume {vm.name}")
    if vm.state == VmState.PAUSED and not may_be_paused:
        refuse(vm, verb, f"let it go on first: oscloudctl vm-resume {vm.name}")
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        refuse(vm, verb, f"see: oscloudctl vm-info {vm.name}")
    supervisor.get(vm)


def refuse(vm: VmRecord, verb: str, hint: str) -> NoReturn:
    """Raise the InvalidStateError of something that can't be done to a vm as it is."""
    raise InvalidStateError(
        f"vm {vm.name!r} can't be {verb}: it is {vm.state}", hint=hint, state=vm.state
    )
