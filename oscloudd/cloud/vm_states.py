"""Writing down what is seen of a vm, and telling whoever waits for it.

The one place that changes `vm.state`; every change is logged, announced, and an event. The methods
wait for a database that is away: what has been seen must be written down in the end.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from oscloudd.cloud.changes import Changes
from oscloudd.cloud.events import EventKind, insert_event
from oscloudd.cloud.states import DOWN_STATES, VmState, WantedState
from oscloudd.cloud.vm_records import VmRecord, find_vm
from oscloudd.host.processes import ProcessIdentity
from oscloudd.store.database import Database
from oscloudd.store.models import Vm

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NO_PROCESS: dict[str, Any] = {
    "qemu_pid": None,
    "qemu_start_ticks": None,
    "qemu_boot_id": None,
    "started_at": None,
    "ready": False,
}


def insert_state_event(vm_id: int, name: str, state: str, reason: str, wanted: str) -> None:
    """Write the event of a vm's state, inside the transaction that changes it."""
    data = {"state": state, "reason": reason, "wanted_state": wanted}
    insert_event(EventKind.VM_STATE, name, data, vm_id=vm_id)


def write_state(
    vm_id: int,
    state: VmState,
    reason: str = "",
    *,
    wanted: WantedState | None = None,
    forget_process: bool = False,
) -> None:
    """Write a state inside a transaction; one without a process forgets the process."""
    seen = find_vm(vm_id)
    if seen is None:
        return
    wanted_state = seen.wanted_state if wanted is None else wanted
    if forget_process:
        Vm.update(**_NO_PROCESS).where(Vm.id == vm_id).execute()
    if (seen.state, seen.reason, seen.wanted_state) == (state, reason, wanted_state):
        return
    columns: dict[str, Any] = {"state": state, "reason": reason, "wanted_state": wanted_state}
    if state in DOWN_STATES:
        columns.update(_NO_PROCESS)
    Vm.update(**columns).where(Vm.id == vm_id).execute()
    insert_state_event(vm_id, seen.name, state, reason, wanted_state)
    _log.info("vm %d (%s) is %s%s", vm_id, seen.name, state, f": {reason}" if reason else "")


def write_gone(vm_id: int, name: str) -> None:
    """Say, inside the transaction that removes its row, that a vm is gone."""
    insert_state_event(vm_id, name, "DELETED", "", WantedState.DELETED)
    _log.info("vm %d (%s) is gone", vm_id, name)


class VmStates:
    """Owns the changing columns of the table `vm`."""

    def __init__(self, database: Database, changes: Changes) -> None:
        self._database = database
        self.changes = changes

    async def find(self, vm_id: int) -> VmRecord | None:
        """Read one vm, None when it is gone."""
        return await self._database.run_when_available(lambda: find_vm(vm_id))

    async def see(
        self, vm_id: int, state: VmState, reason: str = "", *, wanted: WantedState | None = None
    ) -> None:
        """Write down a state, and what the user wants where that is known to have changed."""
        await self.change(lambda: write_state(vm_id, state, reason, wanted=wanted))

    async def see_if(
        self, vm_id: int, among: frozenset[VmState], state: VmState, reason: str = ""
    ) -> bool:
        """Write down a state unless the vm is by now in another than those `among`."""

        def write() -> bool:
            seen = find_vm(vm_id)
            if seen is None or seen.state not in among:
                return False
            write_state(vm_id, state, reason)
            return True

        return await self.change(write)

    async def see_of(self, vm_id: int, pid: int, state: VmState, reason: str = "") -> None:
        """Write down what is seen of a qemu, unless its end has been written down by now."""

        def write() -> None:
            seen = find_vm(vm_id)
            if seen is not None and seen.pid == pid:
                write_state(vm_id, state, reason)

        await self.change(write)

    async def look(self, work: Callable[[], T]) -> T:
        """Run a transaction that only reads, however long it takes until the database answers."""
        return await self._database.run_when_available(work)

    async def change(self, work: Callable[[], T]) -> T:
        """Run a transaction that writes states, and announce it."""
        result = await self._database.run_when_available(work)
        self.changes.announce()
        return result

    async def forget_process(self, vm_id: int) -> None:
        """The vm's qemu has ended; what that means is for a job to say."""
        await self._update(vm_id, **_NO_PROCESS)

    async def record_process(
        self, vm_id: int, process: ProcessIdentity, accelerator: str, started: str = "cold"
    ) -> None:
        """Write down which qemu it is, before that qemu may take its first step."""
        await self._update(
            vm_id,
            qemu_pid=process.pid,
            qemu_start_ticks=process.start_time_ticks,
            qemu_boot_id=process.boot_id,
            accelerator=accelerator,
            started=started,
            started_at=time.time(),
            ready=False,
        )

    async def record_identified(self, vm_id: int) -> None:
        """The guest knows who it is, and its disk not yet: it may have to be told again."""
        await self._update(vm_id, identified=True)

    async def record_kept(self, vm_id: int) -> None:
        """The guest's disk has its identity: its secrets are no longer kept here."""
        await self._update(vm_id, identified=True, seed_document="")

    async def record_ready(self, vm_id: int, timings: dict[str, float]) -> None:
        """The guest can be logged into; `timings` are the seconds each stage has taken."""
        text = msgspec.json.encode({stage: round(took, 4) for stage, took in timings.items()})
        await self._update(vm_id, ready=True, identified=True, timings=text.decode())

    async def seed_document(self, vm_id: int) -> str:
        """Give what the guest is still to be told; "" when it knows."""

        def read() -> str:
            row = Vm.select(Vm.seed_document).where(Vm.id == vm_id).tuples().first()
            return str(row[0]) if row else ""

        return await self._database.run_when_available(read)

    async def _update(self, vm_id: int, **columns: Any) -> None:
        await self.change(lambda: Vm.update(**columns).where(Vm.id == vm_id).execute())
