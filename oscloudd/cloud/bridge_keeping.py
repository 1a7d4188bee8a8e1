"""Putting a bridge back that somebody has removed under guests that run.

Their taps are left without one, and the addresses of the host are gone with it. A network without
running vms gets its bridge with the next that is started.
"""

import logging

from oscloudd.cloud.events import Events
from oscloudd.cloud.keeping import keep_as_it_was
from oscloudd.cloud.nics import Nics
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.errors import CloudError
from oscloudd.host.network.link_events import BridgeEvents
from oscloudd.host.network.links import numbers_in_use
from oscloudd.store.database import Database

_log = logging.getLogger(__name__)
_PREFIX = "oscbr"


class BridgeKeeper:
    """Sees to the bridges for as long as `keep` runs."""

    def __init__(
        self,
        database: Database,
        supervisor: Supervisor,
        nics: Nics,
        ports: Ports,
        events: Events,
    ) -> None:
        self._database = database
        self._supervisor = supervisor
        self._nics = nics
        self._ports = ports
        self._events = events
        self._removals = BridgeEvents(_PREFIX)

    def close(self) -> None:
        """Let go of the bridges; they stay as they are."""
        self._removals.close()

    async def keep(self) -> None:
        """Put bridges back whenever somebody has removed one, until cancelled."""
        await keep_as_it_was("a bridge of guests", self._removals, self._put_back)

    async def _put_back(self) -> None:
        vms = await self._database.run_when_available(read_vms)
        there = numbers_in_use(_PREFIX)
        # A network that is being deleted has none of these.
        cut_off = [
            vm
            for vm in vms
            if self._supervisor.find(vm.id) is not None and not _bridges_of(vm) <= there
        ]
        for vm in cut_off:
            await self._connect(vm)
        if not cut_off:
            return
        # Loopback does not lead to a new bridge by itself.
        await self._ports.sync()
        gone = {index for vm in cut_off for index in _bridges_of(vm)} - there
        for bridge in (f"{_PREFIX}{index}" for index in sorted(gone)):
            message = f"somebody has removed {bridge} under running vms, and it is put back"
            _log.warning("%s", message)
            await self._events.warn(bridge, message)

    async def _connect(self, vm: VmRecord) -> None:
        try:
            await self._nics.take_up(vm)
        except CloudError:
            # One that ends meanwhile has no tap any more.
            if self._supervisor.find(vm.id) is not None:
                raise


def _bridges_of(vm: VmRecord) -> set[int]:
    return {nic.bridge_index for nic in vm.nics}
