"""Putting guests that run back on their bridge, when somebody has removed that under them.

Their taps are left without one, and the addresses of the host are gone with it, also where somebody
has made it anew. A network without running vms gets its bridge with the next that is started.
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable

from oscloudd.cloud.events import Events
from oscloudd.cloud.keeping import keep_as_it_was
from oscloudd.cloud.nic_records import NicRecord
from oscloudd.cloud.nics import Nics
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.states import VmState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.cloud.vm_states import VmStates
from oscloudd.errors import CloudError, NotFoundError, OperationTimeoutError
from oscloudd.host.network.link_events import BridgeEvents
from oscloudd.host.network.links import list_masters
from oscloudd.host.network.ruleset import BRIDGE_PREFIX, TAP_PREFIX

_log = logging.getLogger(__name__)
# What is being done to a vm may wait for its guest for minutes; then that vm is for the next time.
_TURN_SECONDS = 2.0
# The bridges have been looked at just before the vms.
_CHECKED_SECONDS = 5.0


class BridgeKeeper:
    """Sees to the bridges for as long as `keep` runs."""

    def __init__(
        self,
        states: VmStates,
        supervisor: Supervisor,
        operations: Operations,
        nics: Nics,
        ports: Ports,
        events: Events,
    ) -> None:
        self._states = states
        self._supervisor = supervisor
        self._operations = operations
        self._nics = nics
        self._ports = ports
        self._events = events
        self._removals = BridgeEvents(BRIDGE_PREFIX)
        self._are_ports_behind = False

    def close(self) -> None:
        """Let go of the bridges; they stay as they are."""
        self._removals.close()

    async def keep(self) -> None:
        """Put bridges back whenever somebody has removed one, until cancelled."""
        await keep_as_it_was("a bridge of guests", self._removals, self._put_back)

    async def _put_back(self) -> None:
        vms = await self._states.look(read_vms)
        cut_off = self._find_cut_off(vms)
        if not cut_off and not self._are_ports_behind:
            return
        self._are_ports_behind = True
        # One that fails keeps no other from its bridge.
        networks = {nic.network_id for nics in cut_off.values() for nic in nics}
        errors = await _failures(self._bring_up(network_id) for network_id in networks)
        errors += await _failures(self._connect(vm_id) for vm_id in cut_off)
        # Loopback does not lead to a new bridge by itself.
        await self._ports.sync()
        self._are_ports_behind = False
        for bridge in sorted(_bridges_of(cut_off) - _bridges_of(self._find_cut_off(vms))):
            message = f"somebody has removed {bridge} under running vms, and it is put back"
            _log.warning("%s", message)
            await self._events.warn(bridge, message)
        if errors:
            raise errors[0]

    def _find_cut_off(self, vms: Iterable[VmRecord]) -> dict[int, list[NicRecord]]:
        """Give the cards, by vm that runs, whose taps are on no bridge, or on another one."""
        masters = list_masters(TAP_PREFIX)
        found: dict[int, list[NicRecord]] = {}
        for vm in vms:
            # A card that is still to be plugged in has no tap.
            lost = [nic for nic in vm.nics if masters.get(nic.tap, nic.bridge) != nic.bridge]
            # The tap of a spare that is to become this vm is on none yet.
            if lost and self._runs(vm.id):
                found[vm.id] = lost
        return found

    async def _bring_up(self, network_id: int) -> None:
        try:
            await self._nics.bring_up([network_id])
        except NotFoundError:
            _log.info("network %d has gone, and its vms with it", network_id)

    async def _connect(self, vm_id: int) -> None:
        """Connect a vm as it is by now: it, or a card of it, may have been deleted."""
        lock = self._operations.lock(vm_id)
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await lock.acquire()
        except TimeoutError:
            raise OperationTimeoutError(f"vm {vm_id} has something else done to it") from None
        try:
            vm = await self._states.find(vm_id)
            if vm is not None and vm.state != VmState.DELETING and self._runs(vm_id):
                await self._nics.take_up(vm, checked_within_seconds=_CHECKED_SECONDS)
        except CloudError:
            # One that ends meanwhile has no tap any more.
            if self._runs(vm_id):
                raise
        finally:
            lock.release()

    def _runs(self, vm_id: int) -> bool:
        return self._supervisor.find(vm_id) is not None


async def _failures(works: Iterable[Awaitable[None]]) -> list[BaseException]:
    """Do all of these side by side, and give what they raise."""
    done = await asyncio.gather(*works, return_exceptions=True)
    return [error for error in done if error is not None]


def _bridges_of(cut_off: dict[int, list[NicRecord]]) -> set[str]:
    return {nic.bridge for nics in cut_off.values() for nic in nics}
