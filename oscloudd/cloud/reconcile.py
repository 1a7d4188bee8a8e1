"""What the database says against what really runs, compared once at start.

One vm that can't be judged stops nobody else, and is never killed for it.
"""

import asyncio
import logging

from oscloudd.cloud.states import DOWN_STATES, VmState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_power import VmPower
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.cloud.vm_states import VmStates
from oscloudd.errors import CloudError, HostError, NotFoundError
from oscloudd.host.processes import boot_id
from oscloudd.machine.qemu import ForeignMachineError
from oscloudd.store.database import Database

_log = logging.getLogger(__name__)


async def reconcile(
    database: Database, states: VmStates, supervisor: Supervisor, power: VmPower
) -> None:
    """Adopt what runs, write down what ended, finish deletions, undo what was not made."""
    vms = await database.run(read_vms)
    await asyncio.gather(*(_one(vm, states, supervisor, power) for vm in vms))


async def _one(vm: VmRecord, states: VmStates, supervisor: Supervisor, power: VmPower) -> None:
    try:
        async with power.lock(vm.id):
            await _judge(vm, states, supervisor, power)
    except (CloudError, OSError) as error:
        _log.exception("vm %d (%s) can't be judged", vm.id, vm.name)
        await states.see(vm.id, VmState.UNRESPONSIVE, f"it could not be judged: {error}")


async def _judge(vm: VmRecord, states: VmStates, supervisor: Supervisor, power: VmPower) -> None:
    if vm.state == VmState.DELETING:
        await power.demolish(vm)
    elif vm.state in DOWN_STATES:
        return
    elif vm.process is not None and await _adopt(vm, supervisor):
        _log.info("vm %d (%s) adopted: its qemu is process %d", vm.id, vm.name, vm.process.pid)
    elif vm.state == VmState.CREATING:
        _log.warning("vm %d (%s) was not finished and is undone", vm.id, vm.name)
        await power.demolish(vm)
    else:
        await power.end_stray(vm)
        await _see_ended(vm, states)


async def _adopt(vm: VmRecord, supervisor: Supervisor) -> bool:
    try:
        await supervisor.adopt(vm)
    except (NotFoundError, ForeignMachineError) as error:
        _log.info("vm %d (%s): %s", vm.id, vm.name, error)
        return False
    except HostError as error:
        raise HostError(f"its qemu can't be reached: {error.message}") from error
    return True


async def _see_ended(vm: VmRecord, states: VmStates) -> None:
    if vm.state in (VmState.STOPPING, VmState.STARTING) or vm.process is None:
        await states.see(vm.id, VmState.STOPPED, "it ended while the daemon was away")
    elif vm.boot_id != boot_id():
        await states.see(vm.id, VmState.STOPPED, "the host was rebooted")
    else:
        await states.see(vm.id, VmState.CRASHED, "qemu ended while the daemon was away")
