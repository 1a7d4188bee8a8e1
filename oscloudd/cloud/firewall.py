"""The firewall of this cloud: what the database says of networks and vms, in the kernel.

Owns the only word on our tables. They are replaced whole when a network comes or goes and when
somebody else has changed them; a vm's own elements come and go with it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from oscloudd.cloud.events import Events
from oscloudd.cloud.keeping import keep_as_it_was
from oscloudd.cloud.nic_records import Card, NicRecord, read_owned_nics
from oscloudd.cloud.states import VmState
from oscloudd.errors import NotFoundError
from oscloudd.host.network.firewall import apply_ruleset, find_ruleset_bridges
from oscloudd.host.network.nft_events import TableEvents
from oscloudd.host.network.ruleset import TABLE, Element, GuestNetwork, GuestPort, build_elements
from oscloudd.host.network.set_elements import add_elements, delete_elements
from oscloudd.store.database import Database
from oscloudd.store.models import Network

_log = logging.getLogger(__name__)

_PUT_BACK = "somebody has changed or flushed oscloud's own nft tables, and they are put back"


class Firewall:
    """Our tables; `keep` puts them back for as long as it runs, `close` forgets them."""

    def __init__(self, database: Database, events: Events) -> None:
        self._database = database
        self._events = events
        self._lock = asyncio.Lock()
        self._changes = TableEvents(TABLE)
        self._is_up = False

    def close(self) -> None:
        """Let go of the tables; they stay as they are."""
        self._changes.close()

    @property
    def is_up(self) -> bool:
        """Whether this daemon has had to have the tables: with the first vm that runs."""
        return self._is_up

    async def apply(self) -> None:
        """Make the tables what the database says, whatever they are."""
        # From the look at the rows on nobody may add or take away a card's elements.
        async with self._lock:
            await self._apply()

    async def _apply(self) -> None:
        networks, ports = await self._database.run_when_available(_read_all)
        with self._changes.own_change():
            await apply_ruleset(networks, ports)
        self._is_up = True

    async def admit(self, nics: Iterable[NicRecord]) -> None:
        """Let cards send with their own addresses; may be called again. Raises HostError."""
        async with self._lock:
            try:
                with self._changes.own_change():
                    add_elements(_elements_of(nics))
            except NotFoundError:
                await self._apply()

    async def expel(
        self, nics: Iterable[NicRecord], forget: Callable[[], None] | None = None
    ) -> None:
        """Let cards send nothing any more; raises HostError.

        `forget` removes their rows, in a transaction: else whoever makes the tables anew finds them
        and lets them in again.
        """
        async with self._lock:
            with suppress(NotFoundError), self._changes.own_change():
                await asyncio.to_thread(delete_elements, _elements_of(nics))
            if forget is not None:
                await self._database.run(forget)

    async def forget_gone(self) -> list[str]:
        """Take networks that have no row out of the tables, and give their bridges."""
        # The rules first: what has them before its row is read, and has no row, is gone.
        present = await find_ruleset_bridges()
        networks, _ = await self._database.run(_read_all)
        gone = present - {network.bridge for network in networks}
        if gone:
            await self.apply()
        return sorted(gone)

    async def keep(self) -> None:
        """Put the tables back whenever somebody else has changed them, until cancelled."""
        await keep_as_it_was("the firewall", self._changes, self._put_back)

    async def _put_back(self) -> None:
        if not self._is_up:
            return
        await self.apply()
        _log.warning(_PUT_BACK)
        await self._events.warn("firewall", _PUT_BACK)


def _read_all() -> tuple[list[GuestNetwork], list[GuestPort]]:
    """Read what is to be in the tables, inside a transaction.

    A vm that is being deleted is not: its elements may have been taken out already.
    """
    networks = [
        GuestNetwork(
            f"oscbr{row.bridge_interface_idx}",
            IPv4Network(f"{row.ip}/{row.mask}"),
            isolated=row.isolated,
            nat=row.nat,
            subnet6=None if row.subnet6 is None else IPv6Network(row.subnet6),
        )
        for row in Network.select()
    ]
    owned = read_owned_nics()
    return networks, [_port_of(nic) for nic in owned if nic.vm_state != VmState.DELETING]


def _elements_of(nics: Iterable[NicRecord]) -> list[Element]:
    return [element for nic in nics for element in build_elements(_port_of(nic))]


def _port_of(nic: Card) -> GuestPort:
    return GuestPort(nic.tap, nic.mac, IPv4Address(nic.ip), nic.address6)
