"""What vms have of what only one can have, and what a new vm or card is given of the rest.

An address, a MAC or a tap may be in a vm's row or in one of a further card's, and no constraint
of the database spans both tables: so everybody who gives one away asks here, inside the
transaction that writes it down. What rows don't know of, but the host has, is taken, too.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oscloudd.cloud.allocation import (
    allocate_address,
    first_free_index,
    first_free_serial_port,
    mac_of,
)
from oscloudd.cloud.networks import NetworkRecord, read_network
from oscloudd.cloud.nic_records import FIRST_SLOT
from oscloudd.errors import ExhaustedError, InvalidArgumentError
from oscloudd.host.network.links import numbers_in_use, permanent_addresses
from oscloudd.machine.arguments import PORTS
from oscloudd.store.models import Disk, Nic, Vm

# The first one, and one in each port.
MOST_NICS = 1 + PORTS


@dataclass(frozen=True)
class NicRequest:
    """A card that is asked for; without `ip` it gets the next free address."""

    network: int | str
    ip: str | None = None


@dataclass(frozen=True)
class GivenNic:
    """What is allocated to a card."""

    slot: int
    network: NetworkRecord
    ip: str
    mac: str
    tap_index: int


@dataclass(frozen=True)
class Given:
    """What is allocated to a new vm, and to its cards beside the first."""

    ip: str
    tap_index: int
    serial_port: int
    others: tuple[GivenNic, ...] = ()


def taken_taps() -> set[int]:
    """Give the numbers of taps that cards have, and of those that are there."""
    found = numbers_in_use("osctap")
    for table in (Vm, Nic):
        found |= {index for (index,) in table.select(table.tap_interface_idx).tuples()}
    return found


def taken_addresses(network: NetworkRecord) -> set[str]:
    """Give the addresses that cards have in a network, and those the host knows of."""
    # A vm that no row knows of may run here, as after an older copy of the database was put back.
    found = permanent_addresses(network.bridge)
    for table in (Vm, Nic):
        rows = table.select(table.ip).where(table.network == network.id)
        found |= {ip for (ip,) in rows.tuples()}
    return found


def is_mac_taken(mac: str) -> bool:
    """Tell whether a card has this MAC."""
    return any(table.select().where(table.mac == mac).exists() for table in (Vm, Nic))


def draw_uuid() -> uuid.UUID:
    """Draw a uuid whose MAC no card has."""
    while is_mac_taken(mac_of((drawn := uuid.uuid4()).hex)):
        pass
    return drawn


def get_free_slot(vm_id: int, vm_name: str) -> int:
    """Give the first port of a vm that neither a disk nor a card is in; raises ExhaustedError."""
    taken = {slot for (slot,) in Disk.select(Disk.slot).where(Disk.vm_id == vm_id).tuples()}
    taken |= {slot for (slot,) in Nic.select(Nic.slot).where(Nic.vm == vm_id).tuples()}
    for slot in range(1, PORTS + 1):
        if slot not in taken:
            return slot
    raise ExhaustedError(
        f"vm {vm_name!r} has {PORTS} data disks and further network cards already, which is all it "
        "can have",
        hint=f"take one away: oscloudctl disk-detach {vm_name} DISK, or nic-delete",
        resource="slot",
    )


def read_other_networks(
    first: NetworkRecord, requests: Iterable[NicRequest]
) -> list[NetworkRecord]:
    """Read the networks of the cards of a vm that has its first one in `first`.

    Raises NotFoundError, and InvalidArgumentError for one that is given twice.
    """
    found = [first]
    for request in requests:
        network = read_network(request.network)
        if network.id in {other.id for other in found}:
            raise InvalidArgumentError(
                f"network {network.name!r} is given twice: a vm has one card in a network",
                parameter="network",
            )
        found.append(network)
    return found[1:]


def allocate(
    network: NetworkRecord,
    wanted_ip: str | None,
    host_ports: set[int],
    *,
    others: Sequence[NicRequest] = (),
    slots: Sequence[int] = range(FIRST_SLOT + 1, MOST_NICS),
    tap_index: int | None = None,
) -> Given:
    """Choose in a transaction what nobody has, `tap_index` where that is given.

    The `others` come into the first of `slots`, of which there are enough. Raises what
    `allocate_address` does, NotFoundError and InvalidArgumentError.
    """
    other_networks = read_other_networks(network, others)
    taps = taken_taps()
    serial_ports = {port for (port,) in Vm.select(Vm.qemu_serial_port).tuples()}
    first_tap = first_free_index(taps) if tap_index is None else tap_index
    ip = _allocate_address(network, wanted_ip)
    serial_port = first_free_serial_port(host_ports | serial_ports)
    given: list[GivenNic] = []
    taps.add(first_tap)
    for slot, found, request in zip(slots, other_networks, others, strict=False):
        given.append(_allocate_nic(slot, found, request.ip, taps))
        taps.add(given[-1].tap_index)
    return Given(ip, first_tap, serial_port, tuple(given))


def allocate_nic(slot: int, network: NetworkRecord, wanted_ip: str | None) -> GivenNic:
    """Choose in a transaction what a card of a vm gets; raises what `allocate_address` does."""
    return _allocate_nic(slot, network, wanted_ip, taken_taps())


def insert_nic(vm_id: int, given: GivenNic) -> int:
    """Write down, in the same transaction, that a vm has a card; give its id."""
    row = Nic.create(
        vm=vm_id,
        network=given.network.id,
        ip=given.ip,
        mac=given.mac,
        tap_interface_idx=given.tap_index,
        slot=given.slot,
        created_at=time.time(),
    )
    return int(row.id)


def _allocate_nic(
    slot: int, network: NetworkRecord, wanted_ip: str | None, taps: set[int]
) -> GivenNic:
    ip = _allocate_address(network, wanted_ip)
    return GivenNic(slot, network, ip, mac_of(draw_uuid().hex), first_free_index(taps))


def _allocate_address(network: NetworkRecord, wanted_ip: str | None) -> str:
    taken = taken_addresses(network)
    return allocate_address(network.subnet, taken, wanted_ip, network=network.name)
