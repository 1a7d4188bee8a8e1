"""The guests' bandwidth: what their rows allow, kept so in the kernel."""

import asyncio
import logging
from collections.abc import Sequence

from oscloudd.cloud.keeping import keep_as_it_was
from oscloudd.errors import HostError
from oscloudd.host.network.links import numbers_in_use
from oscloudd.host.network.nft_events import TableEvents
from oscloudd.host.network.rates import TABLE, apply_rates
from oscloudd.store.database import Database
from oscloudd.store.models import Nic, Vm

_log = logging.getLogger(__name__)


class Rates:
    """The limits of all taps."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._applying = asyncio.Lock()
        self._applied: dict[str, int] = {}
        self._changes = TableEvents(TABLE.split()[1])

    def close(self) -> None:
        """Let go of the limits; they stay as they are."""
        self._changes.close()

    async def sync(self) -> None:
        """Make the limits of the taps there are like the rows; may be called at any time."""
        async with self._applying:
            rates = await self._database.run_when_available(_read_rates)
            while True:
                self._applied = _limit_taps(rates)
                try:
                    with self._changes.own_change():
                        await apply_rates(self._applied)
                    return
                except HostError:
                    # nft refuses all of it for one tap that has gone since it was looked for.
                    if _limit_taps(rates) == self._applied:
                        raise

    async def keep(self) -> None:
        """Put the limits back whenever somebody else has changed them, until cancelled."""
        await keep_as_it_was("the table of bandwidths", self._changes, self._put_back)

    async def _put_back(self) -> None:
        if self._applied:
            _log.warning("the limits of guests' bandwidth were taken away: put back")
            await self.sync()


def _limit_taps(rates: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Give the limits of those taps that are there."""
    there = numbers_in_use("osctap")
    return {f"osctap{tap}": rate for tap, rate in rates if tap in there}


def _read_rates() -> list[tuple[int, int]]:
    rates: list[tuple[int, int]] = []
    for query in (
        Vm.select(Vm.tap_interface_idx, Vm.bandwidth),
        Nic.select(Nic.tap_interface_idx, Vm.bandwidth).join(Vm),
    ):
        rates += list(query.where(Vm.bandwidth > 0).tuples())
    return rates
