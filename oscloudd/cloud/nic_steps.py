"""The steps that a network card's coming and going is made of, beside those of `vm_steps`.

A card has its row first and loses it last. To whom it belongs, and when one may come or go, is in
`nic_changes`.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from oscloudd.cloud.jobs import Job
from oscloudd.cloud.nic_records import NicRecord, forget_nic
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_steps import VmSteps
from oscloudd.errors import CloudError
from oscloudd.machine.nics import unplug_nic

_log = logging.getLogger(__name__)


class NicSteps(VmSteps):
    """What can be done to a vm, and to its network cards beside the first."""

    async def plugging_nic(self, job: Job) -> None:
        """Plug a card into the machine, if there is one, with its network in place."""
        vm = await self._get(job)
        qemu = self._supervisor.find(vm.id)
        if qemu is None:
            self._names.publish(vm)
            return
        await self.network(job)
        await self._nics.plug(vm, qemu)
        if vm.bandwidth:
            await self._rates.sync()

    async def unplugging_nic(self, job: Job) -> None:
        """Have the guest let go of a card, if there is a guest."""
        qemu = self._supervisor.find(job.vm_id)
        if qemu is not None:
            await unplug_nic(qemu, job.params["slot"])

    async def dismissing(self, job: Job) -> None:
        """Have nobody know of the card any more, the database last."""
        vm = await self._states.find(job.vm_id)
        if vm is None:
            return
        nic_id = job.params["nic"]
        going = [nic for nic in vm.other_nics if nic.id == nic_id]
        await self.take_away(vm, going, partial(forget_nic, nic_id))

    async def take_away(
        self, vm: VmRecord, nics: Sequence[NicRecord], forget: Callable[[], None]
    ) -> None:
        """Have nobody know of cards any more, and by `forget`, in a transaction, the database."""
        self._names.forget(vm, nics)
        await self._ports.end_connections(nics)
        await self._nics.dismiss(nics, forget)
        self._states.changes.announce()
        if vm.bandwidth:  # the kernel would keep the limit for the next tap of that name
            await self._rates.sync()

    async def undo_add_nic(self, job: Job, _error: BaseException) -> None:
        """Take the card from the vm again; one that its guest does not give back stays its."""
        try:
            await self.unplugging_nic(job)
        except CloudError as error:
            _log.warning("vm %d (%s) keeps a card: %s", job.vm_id, job.target, error.message)
            return
        await self.dismissing(job)

    async def undo_delete_nic(self, job: Job, error: BaseException) -> None:
        """Leave the card with the vm, also where its guest has let go of it meanwhile."""
        try:
            await self.plugging_nic(job)
        except CloudError as other:  # the next start plugs it in
            _log.warning("vm %d (%s): %s, after %s", job.vm_id, job.target, other.message, error)
