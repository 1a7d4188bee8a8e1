"""The network cards of vms as the database has them.

A vm's first card, in slot 0, is in the vm's own row; the others have rows of theirs, and are in
the ports that data disks are plugged into, too. All that reads rows is for inside a transaction.
"""

from functools import cache, lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

import msgspec
from peewee import Field

from oscloudd.cloud.allocation import address6_of, gateway_of
from oscloudd.store.models import Network, Nic, Vm, database_proxy

FIRST_SLOT = 0


class Card(msgspec.Struct, frozen=True):
    """What a network card is on this host and in its network, whosever it is."""

    network_id: int
    network_ip: str
    network_mask: int
    network_subnet6: str | None
    bridge_index: int
    ip: str
    mac: str
    tap_index: int
    dual_stack: int  # 0 or 1: whether the vm's guest takes IPv6 addresses in

    @property
    def subnet(self) -> IPv4Network:
        """The subnet of its network."""
        return _parse_subnet(self.network_ip, self.network_mask)

    @property
    def gateway(self) -> str:
        """The address of its network's bridge."""
        return _build_gateway(self.network_ip, self.network_mask)

    @property
    def ip6(self) -> str | None:
        """Its IPv6 address, if it has one."""
        if not self.dual_stack or self.network_subnet6 is None:
            return None
        return _build_ip6(self.network_subnet6, self.network_ip, self.network_mask, self.ip)

    @property
    def addresses(self) -> list[IPv4Address | IPv6Address]:
        """All its addresses, of either family."""
        address, address6 = IPv4Address(self.ip), self.address6
        return [address] if address6 is None else [address, address6]

    @property
    def address6(self) -> IPv6Address | None:
        """Its IPv6 address as an address."""
        return None if self.ip6 is None else IPv6Address(self.ip6)

    @property
    def tap(self) -> str:
        """The name of its network interface on the host."""
        return f"osctap{self.tap_index}"

    @property
    def bridge(self) -> str:
        """The bridge the tap is a port of."""
        return f"oscbr{self.bridge_index}"


class NicRecord(Card, frozen=True):
    """One network card of a vm, with what belongs to its network; `id` is None for the first."""

    id: int | None
    slot: int
    network: str


class OwnedNic(Card, frozen=True):
    """One card, and what its vm is."""

    vm_id: int
    vm: str
    vm_state: str


def _columns(table: type[Vm] | type[Nic]) -> tuple[Field, ...]:
    """Give the columns of a card whose row is in `table`, in the order of `Card`."""
    return (
        Network.id,
        Network.ip,
        Network.mask,
        Network.subnet6,
        Network.bridge_interface_idx,
        table.ip,
        table.mac,
        table.tap_interface_idx,
        Vm.dual_stack,
    )


@cache
def _statement(key: Literal["vm"] | None) -> str:
    # As for vms: peewee takes far longer to write it than the database to answer.
    query = (
        Nic.select(*_columns(Nic), Nic.id, Nic.slot, Network.name, Nic.vm)
        .join(Network)
        .switch(Nic)
        .join(Vm)
        .order_by(Nic.vm, Nic.slot)
    )
    if key is not None:
        query = query.where(Nic.vm == 0)
    return str(query.sql()[0])


def read_other_nics(vm_id: int) -> tuple[NicRecord, ...]:
    """Read the cards a vm has beside its first one, by slot."""
    rows = database_proxy.execute_sql(_statement("vm"), (vm_id,))
    return tuple(NicRecord(*row[:-1]) for row in rows)


def read_all_other_nics() -> dict[int, list[NicRecord]]:
    """Read the cards that vms have beside their first ones, by vm."""
    found: dict[int, list[NicRecord]] = {}
    for *row, vm_id in database_proxy.execute_sql(_statement(None)):
        found.setdefault(vm_id, []).append(NicRecord(*row))
    return found


def read_owned_nics(network_id: int | None = None) -> list[OwnedNic]:
    """Read every card of every vm, by vm; or those in one network."""
    found: list[OwnedNic] = []
    for table in (Vm, Nic):
        query = table.select(*_columns(table), Vm.id, Vm.name, Vm.state)
        query = query.join(Network, on=(Network.id == table.network))
        if table is Nic:
            query = query.switch(Nic).join(Vm)
        if network_id is not None:
            query = query.where(table.network == network_id)
        found += [OwnedNic(*row) for row in query.tuples()]
    return sorted(found, key=lambda nic: (nic.vm_id, nic.network_id))


def forget_nics(vm_id: int) -> None:
    """Remove the rows of a vm's cards beside its first."""
    Nic.delete().where(Nic.vm == vm_id).execute()


def forget_nic(nic_id: int) -> None:
    """Remove the row of one card; may be called again."""
    Nic.delete().where(Nic.id == nic_id).execute()


@cache
def _parse_subnet(network_ip: str, prefix_length: int) -> IPv4Network:
    return IPv4Network(f"{network_ip}/{prefix_length}")


# A few of them, for all vms that vm_list shows.
@lru_cache(maxsize=1 << 12)
def _build_gateway(network_ip: str, network_mask: int) -> str:
    return str(gateway_of(_parse_subnet(network_ip, network_mask)))


# Python writes an IPv6 address down in some 5 us, and vm_list shows two of each vm.
@lru_cache(maxsize=1 << 16)
def _build_ip6(subnet6: str, network_ip: str, network_mask: int, ip: str) -> str:
    subnet = _parse_subnet(network_ip, network_mask)
    return str(address6_of(IPv6Network(subnet6), subnet, IPv4Address(ip)))
