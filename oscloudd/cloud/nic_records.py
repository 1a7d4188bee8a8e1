"""The network cards of vms as the database has them.

A vm's first card, in slot 0, is in the vm's own row; the others have rows of theirs, and are in
the ports that data disks are plugged into, too. All that reads rows is for inside a transaction.
"""

from functools import cache
from typing import Literal, NamedTuple

import msgspec

from oscloudd.store.models import Network, Nic, Vm, database_proxy

FIRST_SLOT = 0


class NicRecord(msgspec.Struct, frozen=True):
    """One network card of a vm, with what belongs to its network; `id` is None for the first."""

    id: int | None
    slot: int
    network_id: int
    network: str
    network_ip: str
    network_mask: int
    bridge_index: int
    ip: str
    mac: str
    tap_index: int

    @property
    def tap(self) -> str:
        """The name of its network interface on the host."""
        return f"osctap{self.tap_index}"

    @property
    def bridge(self) -> str:
        """The bridge the tap is a port of."""
        return f"oscbr{self.bridge_index}"


@cache
def _statement(key: Literal["vm"] | None) -> str:
    # As for vms: peewee takes far longer to write it than the database to answer.
    query = (
        Nic.select(
            Nic.vm,
            Nic.id,
            Nic.slot,
            Network.id,
            Network.name,
            Network.ip,
            Network.mask,
            Network.bridge_interface_idx,
            Nic.ip,
            Nic.mac,
            Nic.tap_interface_idx,
        )
        .join(Network)
        .order_by(Nic.vm, Nic.slot)
    )
    if key is not None:
        query = query.where(Nic.vm == 0)
    return str(query.sql()[0])


def read_other_nics(vm_id: int) -> tuple[NicRecord, ...]:
    """Read the cards a vm has beside its first one, by slot."""
    rows = database_proxy.execute_sql(_statement("vm"), (vm_id,))
    return tuple(NicRecord(*row[1:]) for row in rows)


def read_all_other_nics() -> dict[int, list[NicRecord]]:
    """Read the cards that vms have beside their first ones, by vm."""
    found: dict[int, list[NicRecord]] = {}
    for vm_id, *row in database_proxy.execute_sql(_statement(None)):
        found.setdefault(vm_id, []).append(NicRecord(*row))
    return found


class OwnedNic(NamedTuple):
    """One card, and what its vm is."""

    vm_id: int
    vm: str
    vm_state: str
    bandwidth: int  # bits a second, 0 for any
    network_id: int
    bridge_index: int
    ip: str
    mac: str
    tap_index: int

    @property
    def bridge(self) -> str:
        """The bridge its tap is a port of."""
        return f"oscbr{self.bridge_index}"

    @property
    def tap(self) -> str:
        """The name of its network interface on the host."""
        return f"osctap{self.tap_index}"


def read_owned_nics(network_id: int | None = None) -> list[OwnedNic]:
    """Read every card of every vm, by vm; or those in one network."""
    found: list[OwnedNic] = []
    for table in (Vm, Nic):
        query = table.select(
            Vm.id,
            Vm.name,
            Vm.state,
            Vm.bandwidth,
            Network.id,
            Network.bridge_interface_idx,
            table.ip,
            table.mac,
            table.tap_interface_idx,
        ).join(Network, on=(Network.id == table.network))
        if table is Nic:
            query = query.switch(Nic).join(Vm)
        if network_id is not None:
            query = query.where(table.network == network_id)
        found += [OwnedNic(*row) for row in query.tuples()]
    return sorted(found)


def forget_nics(vm_id: int) -> None:
    """Remove the rows of a vm's cards beside its first."""
    Nic.delete().where(Nic.vm == vm_id).execute()


def forget_nic(nic_id: int) -> None:
    """Remove the row of one card; may be called again."""
    Nic.delete().where(Nic.id == nic_id).execute()
