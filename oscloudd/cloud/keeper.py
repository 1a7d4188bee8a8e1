"""Keeping vms as their users want them: one that ended by itself is started again if it should be.

Whether and when is in `restart_policy`; this waits, looks once more, and begins the start.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from oscloudd.cloud.events import Events
from oscloudd.cloud.job_rows import running_jobs
from oscloudd.cloud.jobs import Order
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.restart_policy import Restarts, should_restart
from oscloudd.cloud.states import DOWN_STATES, VmState, WantedState
from oscloudd.cloud.vm_power import VmPower
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates
from oscloudd.errors import CloudError, OperationTimeoutError

_log = logging.getLogger(__name__)
_BUSY_SECONDS = 3600.0


class Keeper:
    """Revives vms; `close` ends what waits for its time, and the next start looks anew."""

    def __init__(
        self, states: VmStates, operations: Operations, power: VmPower, events: Events
    ) -> None:
        self._states = states
        self._operations = operations
        self._power = power
        self._events = events
        self._restarts: dict[int, Restarts] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._asked: set[int] = set()
        self._is_closed = False

    def consider(self, vm_id: int) -> None:
        """Look whether a vm that is down should run, and see to it; returns at once."""
        if self._is_closed:
            return
        self._asked.add(vm_id)
        if vm_id not in self._tasks:
            self._tasks[vm_id] = asyncio.create_task(
                self._attend(vm_id), name=f"vm {vm_id} restart"
            )

    async def close(self) -> None:
        """Start nothing any more, and nothing that is still asked for."""
        self._is_closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attend(self, vm_id: int) -> None:
        try:
            # A vm may end again while we are busy with its last end.
            while vm_id in self._asked:
                self._asked.discard(vm_id)
                await self._revive(vm_id)
        finally:
            del self._tasks[vm_id]

    async def _revive(self, vm_id: int) -> None:
        vm = await self._states.find(vm_id)
        if vm is None:
            self._restarts.pop(vm_id, None)
        while vm is not None and _should_run(vm):
            restarts = self._restarts.setdefault(vm_id, Restarts())
            restarts.ended(time.monotonic())
            delay = restarts.delay_seconds(time.monotonic())
            _log.info("vm %d (%s) is %s: started again in %.1f s", vm_id, vm.name, vm.state, delay)
            await asyncio.sleep(delay)
            await self._until_free(vm)
            restarts.started(time.monotonic())
            if await self._start(vm):
                return
            vm = await self._states.find(vm_id)

    async def _start(self, vm: VmRecord) -> bool:
        """Start it unless that is no longer wanted; False when it failed."""
        try:
            await self._power.make_room(vm)
            begun = await self._operations.begin("vm_start", vm.id, Order(0), self._decide)
            if begun is not None:
                await asyncio.shield(begun[1])
        except Exception as error:
            # Whatever it is, the vm is still wanted: it is tried again, later and later.
            _log.warning("vm %d (%s) could not be started again: %s", vm.id, vm.name, error)
            with suppress(CloudError):
                message = f"it could not be started again: {error}"
                await self._events.warn(vm.name, message, vm_id=vm.id)
            return False
        return True

    async def _until_free(self, vm: VmRecord) -> None:
        """Wait until no job is at the vm: one whose making failed is about to be removed."""

        async def look() -> bool | None:
            jobs = await self._states.look(running_jobs)
            busy = any(job.vm_id == vm.id and self._operations.minds_vm(job) for job in jobs)
            return None if busy else True

        what = f"the end of what is being done to vm {vm.name}"
        with suppress(OperationTimeoutError):
            await self._states.changes.wait_until(look, timeout_seconds=_BUSY_SECONDS, what=what)

    def _decide(self, vm: VmRecord) -> dict[str, Any] | None:
        if not _should_run(vm):
            return None
        return self._power.decide_start(vm) | {"revive": True}


def _should_run(vm: VmRecord) -> bool:
    return vm.state in DOWN_STATES and should_restart(
        vm.restart,
        wanted_running=vm.wanted_state == WantedState.RUNNING,
        failed=vm.state in (VmState.CRASHED, VmState.ERROR),
    )
