"""Network cards and vms: one added, one taken away; when that may be, and what it begins with.

What is then done, step by step, is in `operations`. A vm that is down has a card as soon as the
rows say so, and may be given all of them at once. Its guest was told of the cards it was made with;
of others its owner tells it.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from oscloudd.cloud.jobs import Order
from oscloudd.cloud.names import Names
from oscloudd.cloud.networks import NetworkRecord, read_network
from oscloudd.cloud.nic_records import FIRST_SLOT, NicRecord, forget_nic
from oscloudd.cloud.nic_steps import NicSteps
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.taken import (
    NicRequest,
    allocate_nic,
    get_free_slot,
    insert_nic,
    read_other_networks,
)
from oscloudd.cloud.vm_power import check_can_plug
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
)
from oscloudd.store.database import Database
from oscloudd.store.models import database_proxy
from oscloudd.units import parse_key

T = TypeVar("T")


class NicChanges:
    """What is done to the network cards of a vm beside its first."""

    def __init__(
        self,
        database: Database,
        operations: Operations,
        supervisor: Supervisor,
        steps: NicSteps,
        names: Names,
    ) -> None:
        self._database = database
        self._operations = operations
        self._supervisor = supervisor
        self._steps = steps
        self._names = names

    async def add(self, vm_key: int | str, request: NicRequest, order: Order) -> VmInfo:
        """Give a vm a card in one more network, at once if it runs."""

        def decide(vm: VmRecord) -> dict[str, Any]:
            network = read_network(request.network)
            _check_is_not_in(vm, network.id)
            self._check_can(vm, "given a network card", may_be_paused=True)
            slot = get_free_slot(vm.id, vm.name)
            return {"nic": _insert(vm, slot, network, request.ip), "slot": slot}

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

    async def exchange(
        self, vm_id: int, requests: Sequence[NicRequest], work: Callable[[], T]
    ) -> T:
        """Do `work` in one transaction, and have the vm have these cards then and no others.

        The vm's lock is the caller's, and `work` sees to it that the vm is off. Cards in networks
        that it stays in are left as they are. It is rehearsed, so that what is refused has changed
        nothing. Raises what `allocate_nic` does, NotFoundError and InvalidArgumentError.
        """

        def write() -> T:
            vm = read_vm(vm_id)
            result = work()
            _exchange_rows(vm, requests)
            return result

        def rehearse() -> tuple[VmRecord, list[NicRecord]]:
            vm = read_vm(vm_id)
            with database_proxy.atomic() as rehearsal:
                write()
                kept = {nic.id for nic in read_vm(vm_id).nics}
                rehearsal.rollback(begin=False)
            return vm, [nic for nic in vm.nics if nic.id not in kept]

        vm, going = await self._database.run(rehearse)
        written: list[T] = []
        try:
            await self._steps.take_away(vm, going, lambda: written.append(write()))
        finally:
            self._names.publish(await self._database.run(lambda: read_vm(vm_id)))
        # What the database has lost on the way it does again.
        return written[-1]

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


def _insert(vm: VmRecord, slot: int, network: NetworkRecord, wanted_ip: str | None) -> int:
    return insert_nic(vm.id, allocate_nic(slot, network, wanted_ip))


def _exchange_rows(vm: VmRecord, requests: Sequence[NicRequest]) -> None:
    """Have a vm have these cards and no others, inside a transaction."""
    first, *others = requests
    network = read_network(first.network)
    if network.id != vm.network_id:
        raise InvalidArgumentError(
            f"the first card of vm {vm.name!r} is in network {vm.network!r}, which it keeps; "
            f"{network.name!r} is given as its first",
            hint=f"give {vm.network} first",
            parameter="network",
        )
    networks = [network, *read_other_networks(network, others)]
    present = {nic.network_id: nic for nic in vm.nics}
    for nic in vm.other_nics:
        if nic.id is not None and nic.network_id not in {each.id for each in networks}:
            forget_nic(nic.id)
    for network, request in zip(networks, requests, strict=True):
        if network.id in present:
            _check_keeps_address(vm, present[network.id], request.ip)
        else:
            _insert(vm, get_free_slot(vm.id, vm.name), network, request.ip)


def _check_keeps_address(vm: VmRecord, nic: NicRecord, wanted_ip: str | None) -> None:
    if wanted_ip in (None, nic.ip):
        return
    anew = f"; for another take the card away first: oscloudctl nic-delete {vm.name} {nic.network}"
    raise InvalidArgumentError(
        f"ip {wanted_ip!r:.60} can't become that of the card of vm {vm.name!r} in network "
        f"{nic.network!r}, which keeps {nic.ip}",
        hint="leave ip out" + (anew if nic.slot != FIRST_SLOT else ""),
        parameter="network",
    )


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
