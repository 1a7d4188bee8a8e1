"""What no row knows of: removed where it is provably ours, reported and left alone otherwise.

Ours is what has an id that this database has given and has no row for any more: it was deleted
here. What has an id this database has never given is another's, or a newer state's of this one:
it is never touched, and no vm or disk is ever given that id.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from oscloudd.cloud.events import Events
from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.given_ids import GivenIds, read_given_ids, set_aside
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.networks import Networks
from oscloudd.cloud.nic_records import read_owned_nics
from oscloudd.cloud.traces import Listing, Traces, list_traces, remove_traces
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError
from oscloudd.host.network.connections import end_connections_of
from oscloudd.host.network.links import (
    Tap,
    find_tap_holders,
    list_links,
    list_permanent_neighbours,
)
from oscloudd.host.network.neighbours import delete_neighbour
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Layer, Network, Vm

_log = logging.getLogger(__name__)
_TAP = re.compile(r"osctap([0-9]+)", re.ASCII)
_BRIDGE = re.compile(r"oscbr[0-9]+", re.ASCII)
_FOREIGN = (
    "was never made with this database and is left alone: if an older copy of it was put back,"
    " put the newer one back; if it is nobody's, remove it by hand"
)
_STRANGE = "has a name that we never give and is left alone: remove it by hand if it is nobody's"
_UNCLAIMED = "is no vm's of this database and is left alone: ip link delete, if it is nobody's"
_DELETED = "is left of what was deleted from this database; the next sweep removes it"
_Neighbour = tuple[str, IPv4Address | IPv6Address]  # its bridge and its address


@dataclass(frozen=True)
class Stranger:
    """Something that this database does not know and that stays."""

    name: str  # "vm 7"
    parts: tuple[str, ...]  # the processes, files or interfaces it consists of
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.parts)}) {self.why}"


@dataclass(frozen=True)
class _Seen:
    """What was there at one look, against the rows read after it."""

    deleted: list[Traces]
    strangers: list[Stranger]
    neighbours: list[_Neighbour]
    bridges: list[str]  # of networks that were deleted here
    is_foreign_here: bool


class Leftovers:
    """Sweeps them out; remembers what it has told of."""

    def __init__(
        self,
        config: Config,
        database: Database,
        networks: Networks,
        firewall: Firewall,
        events: Events,
        chains: LayerChains,
    ) -> None:
        self._config = config
        self._database = database
        self._networks = networks
        self._firewall = firewall
        self._events = events
        self._chains = chains
        self._told: set[Stranger] = set()

    async def protect_foreign_ids(self) -> None:
        """See to it that no id which something foreign has is ever given.

        To be called before anything can be made. Raises HostError when it can't be told.
        """
        await self._set_aside(await asyncio.to_thread(list_traces, self._config))

    async def look(self) -> list[Stranger]:
        """Give what is there that this database does not know."""
        seen = await self._see()
        left = (Stranger(traces.name, tuple(traces.parts()), _DELETED) for traces in seen.deleted)
        return [*seen.strangers, *left]

    async def sweep(self) -> None:
        """Remove what is ours and forgotten, and tell once of what is not ours.

        One thing that can't be removed does not keep the others. Raises CloudError when the host
        can't be looked at.
        """
        seen = await self._see()
        for traces in seen.deleted:
            await self._go_on(traces.name, self._remove(traces))
        # A vm of another database may be reached by them.
        if not seen.is_foreign_here:
            await self._go_on("neighbours", self._forget_neighbours(seen.neighbours))
            await self._go_on("bridges", self._remove_bridges(seen.bridges))
            await self._go_on("firewall", self._forget_networks())
        self._told &= set(seen.strangers)
        for stranger in seen.strangers:
            if stranger not in self._told:
                await self._go_on(stranger.name, self._tell(stranger))

    async def _see(self) -> _Seen:
        # What is being made has its row first, and what is being deleted loses it last: so what
        # was there before the rows were read, and has none, belongs to nobody. A layer may be read
        # for some time after it has lost its row.
        listing = await asyncio.to_thread(list_traces, self._config)
        links = await list_links()
        bridges = [name for name in links.bridges if _BRIDGE.fullmatch(name)]
        neighbours = await list_permanent_neighbours(bridges)
        await self._set_aside(listing)
        rows = await self._database.run(_read_rows)
        found = [(rows.vms, traces) for traces in listing.vms.values()]
        found += [(rows.disks, traces) for traces in listing.disks.values()]
        found += [
            (rows.layers, traces)
            for number, traces in listing.layers.items()
            if not self._chains.is_leaving(number)
        ]
        foreign = [traces for ids, traces in found if ids.is_foreign(traces.number)]
        held = {identity.pid for traces in listing.vms.values() for identity in traces.processes}
        held |= {identity.pid for identity in listing.spares}
        unclaimed = [
            tap for tap in links.taps if _TAP.fullmatch(tap.name) and tap.name not in rows.taps
        ]
        taps = await asyncio.to_thread(_describe_taps, unclaimed, held)
        return _Seen(
            deleted=[traces for ids, traces in found if ids.is_deleted(traces.number)],
            strangers=[
                *(Stranger(traces.name, tuple(traces.parts()), _FOREIGN) for traces in foreign),
                *(Stranger("leftovers", (part,), _STRANGE) for part in listing.strange),
                *taps,
            ],
            neighbours=neighbours,
            bridges=[name for name in bridges if name not in rows.bridges],
            is_foreign_here=bool(taps) or any(traces.processes for traces in foreign),
        )

    async def _set_aside(self, listing: Listing) -> None:
        for table, traces in (
            (Vm, listing.vms),
            (Disk, listing.disks),
            (Layer, listing.layers),
        ):
            highest = max(traces, default=0)
            await self._database.run(partial(set_aside, table, highest))

    async def _remove(self, traces: Traces) -> None:
        removed = await remove_traces(traces)
        if removed:
            await self._warn(
                traces.name,
                f"{traces.name} was deleted from this database; what was left of it has been"
                f" removed: {', '.join(removed)}",
            )

    async def _forget_neighbours(self, neighbours: list[_Neighbour]) -> None:
        # In one transaction: no vm can be given an address between the look and the deletion.
        removed = await self._database.run(lambda: _delete_unclaimed(neighbours))
        if removed:
            await self._warn(
                "neighbours",
                "addresses that no vm has, permanent neighbours on our own bridges, have been"
                f" forgotten: {', '.join(removed)}",
            )

    async def _remove_bridges(self, bridges: list[str]) -> None:
        if bridges and (removed := await self._networks.remove_gone(bridges)):
            await self._warn(
                "bridges", f"bridges of ours that no network has are removed: {', '.join(removed)}"
            )

    async def _forget_networks(self) -> None:
        removed = await self._firewall.forget_gone()
        if removed:
            await self._warn(
                "firewall",
                f"rules in our own table for bridges of no network are gone: {', '.join(removed)}",
            )

    async def _tell(self, stranger: Stranger) -> None:
        await self._warn(stranger.name, str(stranger))
        self._told.add(stranger)

    async def _warn(self, name: str, message: str) -> None:
        _log.warning("%s", message)
        await self._events.warn(name, message)

    async def _go_on(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except (CloudError, OSError) as error:
            _log.warning("sweeping %s: %s", name, error)


@dataclass(frozen=True)
class _Rows:
    vms: GivenIds
    disks: GivenIds
    layers: GivenIds
    taps: frozenset[str]
    bridges: frozenset[str]


def _read_rows() -> _Rows:
    bridges = Network.select(Network.bridge_interface_idx).tuples()
    return _Rows(
        read_given_ids(Vm),
        read_given_ids(Disk),
        read_given_ids(Layer),
        frozenset(nic.tap for nic in read_owned_nics()),
        frozenset(f"oscbr{index}" for (index,) in bridges),
    )


def _delete_unclaimed(neighbours: list[_Neighbour]) -> list[str]:
    claimed = {(nic.bridge, address) for nic in read_owned_nics() for address in nic.addresses}
    removed = []
    for bridge, address in neighbours:
        if (bridge, address) not in claimed:
            # Not for who has the address next: a card's row may be gone, and this not done yet.
            try:
                end_connections_of(address)
            except HostError as error:  # they end by themselves
                _log.warning("%s", error.message)
            delete_neighbour(bridge, address)
            removed.append(f"{address} on {bridge}")
    return removed


def _describe_taps(taps: list[Tap], our_pids: set[int]) -> list[Stranger]:
    """Describe the taps that nothing of ours holds; blocks where there are any at all.

    A tap that is not persistent and has no holder is gone by now.
    """
    if not taps:
        return []
    holders = find_tap_holders([tap.name for tap in taps])
    strangers = []
    for tap in taps:
        pids = sorted(holders[tap.name])
        if our_pids.isdisjoint(pids) and (pids or tap.is_persistent):
            parts = tuple(f"held by process {pid}" for pid in pids) or ("held by nobody",)
            strangers.append(Stranger(tap.name, parts, _UNCLAIMED))
    return strangers
