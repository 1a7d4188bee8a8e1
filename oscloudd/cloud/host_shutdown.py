"""Stopping all vms because the host goes down: what they were wanted to be stays as it is.

So the next boot finds with `autostart` "last-state" what ran before. Who calls this, and in which
order with the daemon's own end, is for the host's service manager.
"""

import asyncio
from typing import Any

import msgspec

from oscloudd.cloud.jobs import Order
from oscloudd.cloud.keeper import Keeper
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.states import LIVE_STATES, VmState, WantedState
from oscloudd.cloud.vm_power import begin_end
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.errors import CloudError
from oscloudd.machine.qemu import KILL_SECONDS, QUIT_SECONDS
from oscloudd.store.database import Database

REASON = "stopped with the host"

# qemu's end is written down, and its directory removed.
_CLEARING_SECONDS = 5.0


class LeftRunning(msgspec.Struct, frozen=True):
    """A vm that could not be stopped, and why."""

    name: str
    reason: str


class GuestsStopped(msgspec.Struct, frozen=True):
    """The answer of `daemon_stop_guests`: the names of what was stopped, and what was not."""

    stopped: list[str]
    left: list[LeftRunning]


class HostShutdown:
    """Ends every vm side by side, each by its power button first."""

    def __init__(self, database: Database, operations: Operations, keeper: Keeper) -> None:
        self._database = database
        self._operations = operations
        self._keeper = keeper

    async def stop_all(self, order: Order, timeout_seconds: float) -> GuestsStopped:
        """Stop the vms that run; each guest gets `timeout_seconds`, then it is switched off.

        From then on no policy starts any until a daemon starts anew.
        """
        await self._keeper.close()
        vms = await self._database.run(read_vms)
        running = [vm for vm in vms if vm.state in LIVE_STATES]
        ends = await asyncio.gather(*(self._stop(vm, order, timeout_seconds) for vm in running))
        left = [LeftRunning(vm.name, why) for vm, why in zip(running, ends, strict=True) if why]
        stopped = [vm.name for vm, why in zip(running, ends, strict=True) if not why]
        return GuestsStopped(stopped, left)

    async def _stop(self, vm: VmRecord, order: Order, timeout_seconds: float) -> str:
        """Stop one vm, and give why that was not possible, "" where it was."""

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            if vm.state not in LIVE_STATES:
                return None
            # A qemu that hangs can't be asked, and ends with the host in any case.
            force = vm.state == VmState.UNRESPONSIVE
            wanted = WantedState(vm.wanted_state)
            begun = begin_end(
                vm, VmState.STOPPING, wanted, force=force, timeout_seconds=timeout_seconds
            )
            return begun | {"reason": REASON}

        limit_seconds = timeout_seconds + QUIT_SECONDS + KILL_SECONDS + _CLEARING_SECONDS
        try:
            async with asyncio.timeout(limit_seconds):
                begun = await self._operations.begin("vm_stop", vm.id, order, decide)
                if begun is not None:
                    await asyncio.shield(begun[1])
        except TimeoutError:
            return f"it was not down after {limit_seconds:g} s"
        except CloudError as error:
            return error.message
        return ""
