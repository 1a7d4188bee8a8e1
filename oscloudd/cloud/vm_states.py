"""Writing down what is seen of a vm, and telling whoever waits for it.

The one place that changes `vm.state`; every change is logged and announced.
"""

import logging
import time
from typing import Any

from oscloudd.cloud.changes import Changes
from oscloudd.cloud.states import VmState, WantedState
from oscloudd.cloud.vm_records import VmRecord, find_vm
from oscloudd.host.processes import ProcessIdentity
from oscloudd.store.database import Database
from oscloudd.store.models import Vm

_log = logging.getLogger(__name__)

_NO_PROCESS = {
    "qemu_pid": None,
    "qemu_start_ticks": None,
    "qemu_boot_id": None,
    "started_at": None,
    "ready": False,
}


class VmStates:
    """Owns the changing columns of the table `vm`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.changes = Changes()

    async def find(self, vm_id: int) -> VmRecord | None:
        """Read one vm, None when it is gone."""
        return await self._database.run(lambda: find_vm(vm_id))

    async def see(self, vm_id: int, state: VmState, reason: str = "") -> None:
        """Write down a state; one without a process forgets the process."""
        down = state in (VmState.STOPPED, VmState.CRASHED, VmState.ERROR)
        await self._update(vm_id, state=state, reason=reason, **(_NO_PROCESS if down else {}))
        _log.info("vm %d is %s%s", vm_id, state, f": {reason}" if reason else "")

    async def want(self, vm_id: int, wanted: WantedState) -> None:
        """Write down what the user wants."""
        await self._update(vm_id, wanted_state=wanted)

    async def record_process(self, vm_id: int, process: ProcessIdentity, accelerator: str) -> None:
        """Write down which qemu it is, before that qemu may take its first step."""
        await self._update(
            vm_id,
            qemu_pid=process.pid,
            qemu_start_ticks=process.start_time_ticks,
            qemu_boot_id=process.boot_id,
            accelerator=accelerator,
            started="cold",
            started_at=time.time(),
            ready=False,
        )

    async def record_identified(self, vm_id: int) -> None:
        """The guest knows who it is: its secrets are no longer kept here."""
        await self._update(vm_id, identified=True, seed_document="")

    async def record_ready(self, vm_id: int) -> None:
        """The guest can be logged into."""
        await self._update(vm_id, ready=True)

    async def seed_document(self, vm_id: int) -> str:
        """Give what the guest is still to be told; "" when it knows."""

        def read() -> str:
            row = Vm.select(Vm.seed_document).where(Vm.id == vm_id).tuples().first()
            return str(row[0]) if row else ""

        return await self._database.run(read)

    async def _update(self, vm_id: int, **columns: Any) -> None:
        await self._database.run(lambda: Vm.update(**columns).where(Vm.id == vm_id).execute())
        self.changes.announce()
