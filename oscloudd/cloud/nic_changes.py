"""Network cards and vms: one added, one taken away; when that may be, and what it begins with.

What is then done, step by step, is in `operations`. A vm that is down has a card as soon as the
rows say so. Its guest was told of the cards it was made with; of others its owner tells it.
"""

import asyncio
from typing import Any

from oscloudd.cloud.jobs import Order
from oscloudd.cloud.networks import read_network
from oscloudd.cloud.nic_records import FIRST_SLOT, NicRecord
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.taken import NicRequest, allocate_nic, get_free_slot, insert_nic
from oscloudd.cloud.vm_power import check_can_plug
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.errors import AlreadyExistsError, InvalidStateError, NotFoundError
from oscloudd.store.database import Database
from oscloudd.units import parse_key


class NicChanges:
    """What is done to the network cards of a vm beside its first."""

    def __init__(self, database: Database, operations: Operations, supervisor: Supervisor) -> None:
        self._database = database
        self._operations = operations
        self._supervisor = supervisor

    async def add(self, vm_key: int | str, request: NicRequest, order: Order) -> VmInfo:
        """Give a vm a card in one more network, at once if it runs."""

        def decide(vm: VmRecord) -> dict[str, Any]:
            network = read_network(request.network)
            _check_is_not_in(vm, network.id)
            self._check_can(vm, "given a network card", may_be_paused=True)
            slot = get_free_slot(vm.id, vm.name)
            nic_id = insert_nic(vm.id, allocate_nic(slot, network, request.ip))
            return {"nic": nic_id, "slot": slot}

        return await self._carry_out("nic_add", vm_key, order, decide)

    async def delete(self, vm_key: int | str, nic_key: int | str, order: Order) -> VmInfo:
        """Take a card from a vm; the guest of one that runs has to let go of it.

        `nic_key` is the card's slot, or the name of its network.
        """

        def decide(vm: VmRecord) -> dict[str, Any]:
            nic = _get_nic(vm, nic_key)
            # A guest that stands still can't let go.
            self._check_can(vm, "deprived of a network card", may_be_paused=False)
            return {"nic": nic.id, "slot": nic.slot}

        return await self._carry_out("nic_delete", vm_key, order, decide)

    async def _carry_out(
        self, kind: str, vm_key: int | str, order: Order, decide: Decide
    ) -> VmInfo:
        vm = await self._database.run(lambda: read_vm(vm_key))
        begun = await self._operations.begin(kind, vm.id, order, decide)
        assert begun is not None
        await asyncio.shield(begun[1])
        return describe(await self._database.run(lambda: read_vm(vm.id)))

    def _check_can(self, vm: VmRecord, verb: str, *, may_be_paused: bool) -> None:
        check_can_plug(self._supervisor, vm, verb, "network cards", may_be_paused=may_be_paused)


def _check_is_not_in(vm: VmRecord, network_id: int) -> None:
    for nic in vm.nics:
        if nic.network_id == network_id:
            raise AlreadyExistsError(
                f"vm {vm.name!r} has a card in network {nic.network!r} already, with {nic.ip}",
                hint="choose another network: oscloudctl network-list",
                object="nic",
                name=nic.network,
            )


def _get_nic(vm: VmRecord, key: int | str) -> NicRecord:
    """Give the card of this slot or network that can be taken away."""
    key = parse_key(key)
    for nic in vm.nics:
        if key in (nic.slot, nic.network):
            if nic.slot == FIRST_SLOT:
                raise InvalidStateError(
                    f"the card in network {nic.network!r} is the first of vm {vm.name!r}, which it "
                    "keeps",
                    hint=f"it goes with its vm: oscloudctl vm-delete {vm.name}",
                )
            return nic
    what = f"in slot {key}" if isinstance(key, int) else f"in network {key!r:.80}"
    raise NotFoundError(
        f"vm {vm.name!r} has no network card {what}",
        hint=f"see: oscloudctl vm-info {vm.name}",
        object="nic",
    )
