"""The network cards of machines that run or are about to: taps, ports of bridges, who may send.

The first card's tap goes to a qemu at its launch; the others are plugged in before it takes its
first step, or while it runs.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from oscloudd.cloud.networks import Networks, read_network
from oscloudd.cloud.nic_records import NicRecord
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.host.network.bridge_ports import guard_port
from oscloudd.host.network.links import numbers_in_use
from oscloudd.host.network.taps import join_tap, open_tap
from oscloudd.machine.nics import plug_nic
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.warm import ended_on_failure
from oscloudd.store.database import Database


class Nics:
    """The host's side of every network card."""

    def __init__(self, database: Database, networks: Networks) -> None:
        self._database = database
        self._networks = networks

    async def bring_up_networks(self, vm: VmRecord, *, checked_within_seconds: float = 0.0) -> None:
        """Have the bridges of a vm's cards and the firewall in place, and the cards known to both.

        Bridges that were looked at within so many seconds are not looked at again.
        """
        networks = [nic.network_id for nic in vm.nics]
        await self.bring_up(networks, checked_within_seconds=checked_within_seconds)
        await self.admit(vm)

    async def bring_up(
        self, network_ids: Iterable[int], *, checked_within_seconds: float = 0.0
    ) -> None:
        """Have the bridges of networks and the firewall in place."""
        for network_id in network_ids:
            find = partial(read_network, network_id)
            network = await self._database.run_when_available(find)
            await self._networks.ensure_up(network, checked_within_seconds=checked_within_seconds)

    async def admit(self, vm: VmRecord) -> None:
        """Let a vm send by its cards, whose bridges are up; may be called again."""
        await self._networks.admit(vm.nics)

    async def expel(self, vm: VmRecord) -> None:
        """Forget the addresses of a vm that is being deleted."""
        await self._networks.expel(vm.nics)

    async def dismiss(self, nics: Sequence[NicRecord], forget: Callable[[], None]) -> None:
        """Forget cards that a vm is to lose, and by `forget` their rows; may be called again."""
        await self._networks.expel(nics, forget)

    async def equip(self, vm: VmRecord, qemu: Qemu) -> None:
        """Give a qemu that has just been launched the cards of its vm beside the first.

        Raises HostError; qemu has been ended and let go of then.
        """
        if vm.other_nics:
            async with ended_on_failure(qemu, "its network cards can't be plugged in"):
                await self.plug(vm, qemu)

    async def plug(self, vm: VmRecord, qemu: Qemu) -> None:
        """Plug in what is not yet; raises CloudError."""
        for nic in vm.other_nics:
            await plug_nic(qemu, nic.slot, nic.mac, partial(opened_tap, nic))

    async def take_up(self, vm: VmRecord, *, checked_within_seconds: float = 0.0) -> None:
        """Have the taps of a vm that has been running where they belong, on a bridge made anew too.

        Raises CloudError.
        """
        # The bridge and its rules first: the guest has been using them all the while.
        await self.bring_up_networks(vm, checked_within_seconds=checked_within_seconds)
        rejoin(vm.nics[0])
        there = numbers_in_use("osctap") if vm.other_nics else set()
        for nic in vm.other_nics:
            # One that is still to be plugged in has none.
            if nic.tap_index in there:
                rejoin(nic)


@contextmanager
def opened_tap(nic: NicRecord) -> Iterator[int]:
    """Make a card's tap, a guarded port of its bridge, and give its descriptor while in use here.

    Raises what `open_tap` raises.
    """
    tap_fd = open_tap(nic.tap, nic.bridge)
    try:
        guard_port(nic.tap, nic.mac)
        yield tap_fd
    finally:
        os.close(tap_fd)


def rejoin(nic: NicRecord) -> None:
    """Have a tap that is there be a guarded port of its bridge; may be called again."""
    join_tap(nic.tap, nic.bridge)
    guard_port(nic.tap, nic.mac)
