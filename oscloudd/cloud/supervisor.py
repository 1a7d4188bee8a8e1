"""Supervision: every qemu this daemon has hold of, from its start or adoption to its end.

Owns the holds. Writes what it sees to `VmStates`; what should happen next is decided by jobs
(`vm_steps`) and, when a qemu ends by itself, by the `keeper`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec

from oscloudd.cloud.boot import Boot
from oscloudd.cloud.data_disks import DataDisks
from oscloudd.cloud.heartbeat import PAUSED_BY_USER, Heartbeat, state_of
from oscloudd.cloud.held import Held
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.machine_files import machine_files
from oscloudd.cloud.nics import Nics, opened_tap, rejoin
from oscloudd.cloud.spare import Spare
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.states import SEEN_STATES, VmState, WantedState
from oscloudd.cloud.suspended_files import SavedState
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord, find_vm
from oscloudd.cloud.vm_states import VmStates, write_state
from oscloudd.cloud.warm_files import WarmStart
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, InvalidStateError, NotFoundError
from oscloudd.host.processes import find_processes_in
from oscloudd.host.scopes import VmScope, ensure_scope
from oscloudd.host.users import QemuUser
from oscloudd.machine.accelerator import Accelerator
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.console_log import read_log_tail
from oscloudd.machine.ending import Ending, EndingKind
from oscloudd.machine.launch import launch
from oscloudd.machine.qemu import Qemu, adopt
from oscloudd.machine.run_directory import RunDirectory
from oscloudd.machine.suspend import restore_whole, transfer_seconds
from oscloudd.machine.warm import ended_on_failure, resize_disk, restore_or_end
from oscloudd.store.database import Database

_log = logging.getLogger(__name__)

# A qemu that is well answers in milliseconds; one that is not must not keep others waiting.
ADOPTION_SECONDS = 3.0
_EXIT_SECONDS = 5.0

# What a vm that is let run may be in; by then its qemu may have ended, and that stands.
_BECOMING = SEEN_STATES | {VmState.CREATING, VmState.STARTING}


class Supervisor:
    """All qemus of this daemon by vm id; `close` lets go of them.

    `on_ended` is called with the id of a vm whose qemu has ended without a job having wanted it.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        nics: Nics,
        templates: Templates,
        user: QemuUser,
        accelerator: "asyncio.Task[Accelerator]",
        slots: StartSlots,
        disks: DataDisks,
        chains: LayerChains,
    ) -> None:
        self._config = config
        self._database = database
        self._states = states
        self._nics = nics
        self._templates = templates
        self._user = user
        self._accelerator = accelerator
        self._disks = disks
        self._chains = chains
        self._held: dict[int, Held] = {}
        self._boot = Boot(config, states, slots)
        self._heartbeat = Heartbeat(config, states, self._attend_again)
        self._expected: dict[int, asyncio.Event] = {}
        self.on_ended: Callable[[int], None] = lambda _vm_id: None

    def find(self, vm_id: int) -> Qemu | None:
        """Give the qemu of a vm, or None when there is none."""
        held = self._held.get(vm_id)
        return None if held is None or held.qemu.exited.done() else held.qemu

    def get(self, vm: VmRecord) -> Qemu:
        """Give the qemu of a vm; raises InvalidStateError when there is none."""
        qemu = self.find(vm.id)
        if qemu is None:
            raise InvalidStateError(
                f"vm {vm.name!r} is not running: it is {vm.state}",
                hint=f"start it: oscloudctl vm-start {vm.name}",
                state=vm.state,
            )
        return qemu

    def expect(self, vm_id: int) -> None:
        """A vm of an earlier daemon is about to be judged; `judged` says when it has been."""
        self._expected[vm_id] = asyncio.Event()

    def judged(self, vm_id: int) -> None:
        """Whether a vm of an earlier daemon runs is known now."""
        self._expected.pop(vm_id).set()

    async def get_judged(self, vm: VmRecord) -> Qemu:
        """Give the qemu of a vm as `get` does, once it is known whether there is one."""
        expected = self._expected.get(vm.id)
        if expected is not None:
            await expected.wait()
        return self.get(vm)

    async def spawn(
        self,
        vm: VmRecord,
        timings: dict[str, float],
        warm: WarmStart | None = None,
        saved: SavedState | None = None,
    ) -> None:
        """Start a qemu for the vm that stands still, and write down which process it is.

        What each stage took is written into `timings`. With `warm` it stands where that was saved,
        and the vm's disk must be fresh; with `saved` where the vm itself was suspended, and its
        disk must be as it was then. Raises HostError; nothing is left running then.
        """
        template = self._templates.get_ready(vm.template)
        accelerator = await asyncio.shield(self._accelerator)
        await self._nics.admit(vm)
        with opened_tap(vm.nics[0]) as tap_fd:
            spec = machine_spec(vm, template, accelerator.name, self._config.qemu.binary)
            spec = replace(
                spec,
                incoming=warm is not None or saved is not None,
                memory_object=saved is not None and saved.has_memory_object,
            )
            held = Held(vm.id)
            held.timings = timings
            on_event = self._on_event(held)
            async with self._chains.reading(vm.layer_id) as layers:
                files = await asyncio.to_thread(
                    machine_files, self._config, vm, template, layers, warm
                )
                began = time.monotonic()
                held.qemu = await launch(spec, files, self._user, on_event, tap_fd=tap_fd)
            await ensure_scope(held.qemu.identity.pid, scope_of(vm))
            held.timings["spawn"] = time.monotonic() - began
        if warm is None:
            await self._disks.equip(vm, held.qemu)
            await self._nics.equip(vm, held.qemu)
        else:
            began = time.monotonic()
            await restore_or_end(held.qemu, warm.state, vm.disk_size)
            held.timings["restore"] = time.monotonic() - began
        if saved is not None:
            began, limit = time.monotonic(), transfer_seconds(vm.mem_size)
            async with ended_on_failure(held.qemu, "its saved memory can't be restored"):
                await restore_whole(held.qemu, saved.descriptor, timeout_seconds=limit)
            held.timings["restore"] = time.monotonic() - began
        started = vm.started if saved is not None else "cold" if warm is None else "warm"
        await self._states.record_process(vm.id, held.qemu.identity, accelerator.name, started)
        self._hold(vm, held)

    async def take(self, vm: VmRecord, spare: Spare, timings: dict[str, float]) -> None:
        """Make a spare the qemu of a vm that has its uuid, MAC and tap; it stands still.

        Raises CloudError; the spare is only good for being ended then.
        """
        began = time.monotonic()
        held = Held(vm.id)
        held.timings = timings
        held.qemu = spare.qemu
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        await spare.hand_over(paths, self._on_event(held))
        await resize_disk(spare.qemu, vm.disk_size, timeout_seconds=ADOPTION_SECONDS)
        await self._nics.admit(vm)
        rejoin(vm.nics[0])
        await ensure_scope(spare.qemu.identity.pid, scope_of(vm))
        held.timings["take"] = time.monotonic() - began
        identity = spare.qemu.identity
        await self._states.record_process(vm.id, identity, spare.accelerator, "warm")
        self._hold(vm, held)

    async def identified(self, vm_id: int) -> None:
        """Wait until a guest has taken its identity in; raises what went wrong with that."""
        held = self._held.get(vm_id)
        if held is None or held.settling is None:
            return  # `settled` says what has become of it
        told = asyncio.ensure_future(held.identified.wait())
        try:
            await asyncio.wait({told, held.settling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
        if held.settling.cancelled():  # its qemu has ended, and took what waited for it along
            await self.released(vm_id)
            raise await self._ended_early(vm_id)
        if held.settling.done() and not held.identified.is_set():
            held.settling.result()

    async def let_run(self, vm: VmRecord) -> None:
        """Let the guest take its first step, and see it through its boot in the background.

        Does nothing more to a guest that runs already. `settled` waits for the boot.
        """
        held = self._held.get(vm.id)
        if held is None:
            raise await self._ended_early(vm.id)
        if await held.qemu.status() in ("prelaunch", "paused"):
            await held.qemu.resume()
        await self._states.see_if(vm.id, _BECOMING, VmState.RUNNING)
        await self._boot.attend(vm, held)

    async def adopt(self, vm: VmRecord, *, see: bool = True) -> None:
        """Take hold of the qemu an earlier daemon started; raises NotFoundError when it is gone.

        With `see` its state is written down; without, a job is about to do so. A qemu that does
        not answer is held all the same, UNRESPONSIVE. Raises ForeignMachineError when the process
        lives and its sockets are another's.
        """
        assert vm.process is not None
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        history = await asyncio.to_thread(read_log_tail, paths.console_log)
        held = Held(vm.id)
        held.is_adopted = True
        held.qemu = await adopt(
            paths.run_directory, vm.process, vm.uuid, self._on_event(held),
            history=history, timeout_seconds=ADOPTION_SECONDS,
        )  # fmt: skip
        self._hold(vm, held)
        held.spawn(ensure_scope(vm.process.pid, scope_of(vm)))
        held.is_late = True  # the heartbeat sees to what is cut short here
        try:
            await self._see_adopted(vm, held, see=see)
            held.is_late = False
        except CloudError as error:
            _log.warning("vm %d (%s): %s", vm.id, vm.name, error.message)
            if see:
                reason = f"qemu does not answer: {error.message}"
                await self._see_of(held, VmState.UNRESPONSIVE, reason)

    async def adopt_unrecorded(self, vm: VmRecord) -> bool:
        """Take hold of a qemu that runs in the vm's directory though no row says so.

        So it is when an older copy of the database was put back. False where there is none, or one
        that has never run: that was being started when a daemon died.
        """
        directory = vm_paths(self._config, vm.id, vm.disk_id).run_directory
        for identity in await asyncio.to_thread(find_processes_in, directory):
            found = msgspec.structs.replace(
                vm,
                pid=identity.pid,
                start_ticks=identity.start_time_ticks,
                boot_id=identity.boot_id,
                state=VmState.RUNNING,
            )
            with suppress(NotFoundError):  # it has ended meanwhile
                if await self._has_run(found):
                    await self._states.record_process(vm.id, identity, vm.accelerator)
                    await self.adopt(found)
                    return True
        return False

    async def _has_run(self, vm: VmRecord) -> bool:
        assert vm.process is not None
        directory = vm_paths(self._config, vm.id, vm.disk_id).run_directory
        qemu = await adopt(
            directory, vm.process, vm.uuid, lambda _name, _data: None,
            timeout_seconds=ADOPTION_SECONDS,
        )  # fmt: skip
        try:
            # One that does not answer may have run, and is not to be killed for its silence.
            return await qemu.status(timeout_seconds=ADOPTION_SECONDS) != "prelaunch"
        finally:
            await qemu.close()

    def pause_stands(self, vm_id: int) -> None:
        """A vm that a full disk has paused is paused by its user as well, and stays so."""
        held = self._held.get(vm_id)
        if held is not None:
            held.is_out_of_space = False

    async def settled(self, vm_id: int, on_stage: Callable[[str, str], None]) -> None:
        """Wait until the guest has its identity and its sshd answers; raises what went wrong."""
        held = self._held.get(vm_id)
        if held is None or not await held.is_attended():
            await self.released(vm_id)
            raise await self._ended_early(vm_id)
        if held.settling is None:
            return  # an earlier daemon saw it through
        held.listen(on_stage)
        try:
            await asyncio.shield(held.settling)
        except asyncio.CancelledError:
            if not held.settling.cancelled():
                raise  # it is the caller who was cancelled
            await self.released(vm_id)
            raise await self._ended_early(vm_id) from None
        except HostError:
            # A qemu that dies closes the serial line a moment before the kernel tells of its end.
            if held.qemu.console.closed.is_set():
                await asyncio.wait([held.qemu.exited], timeout=_EXIT_SECONDS)
            if not held.qemu.exited.done():
                raise
            await self.released(vm_id)
            raise await self._ended_early(vm_id) from None

    async def released(self, vm_id: int) -> None:
        """Wait until the end of the vm's qemu has been written down."""
        held = self._held.get(vm_id)
        if held is not None and held.watcher is not None:
            await asyncio.shield(held.watcher)

    async def refresh(self, vm: VmRecord) -> None:
        """Write down what qemu says of the vm, or that it says nothing, after a job gave up."""
        held = self._held.get(vm.id)
        if held is None and vm.is_process_alive():
            reason = "its qemu could not be taken hold of"
            await self._states.see(vm.id, VmState.UNRESPONSIVE, reason)
            return
        if held is None or held.qemu.exited.done():
            await self.released(vm.id)
            await self._states.see(vm.id, VmState.STOPPED, "it ended meanwhile")
            self.on_ended(vm.id)
            return
        try:
            state, reason = state_of(await held.qemu.status(timeout_seconds=ADOPTION_SECONDS))
        except CloudError as error:
            state, reason = VmState.UNRESPONSIVE, error.message
            held.is_late = True
        await self._see_of(held, state, reason)

    async def close(self) -> None:
        """Let go of every qemu; all of them run on."""
        for held in list(self._held.values()):
            if held.watcher is not None:
                held.watcher.cancel()
                await asyncio.gather(held.watcher, return_exceptions=True)
            await held.let_go()
        self._held.clear()

    async def _ended_early(self, vm_id: int) -> CloudError:
        seen = await self._states.find(vm_id)
        why = seen.reason if seen is not None else "it was deleted"
        message = f"the vm ended before its guest was ready: {why}"
        if seen is not None and seen.state == VmState.CRASHED:
            return HostError(message)
        return InvalidStateError(message)

    async def _see_adopted(self, vm: VmRecord, held: Held, *, see: bool) -> None:
        await self._nics.take_up(vm, checked_within_seconds=5.0)
        status = await held.qemu.status(timeout_seconds=ADOPTION_SECONDS)
        if see:
            if status == "prelaunch":
                await held.qemu.resume()
                status = "running"
            if status != "io-error" or vm.state != VmState.PAUSED:
                await self._see_of(held, *state_of(status))
        if status == "io-error" and vm.reason != PAUSED_BY_USER:
            held.is_out_of_space = await self._heartbeat.is_out_of_space(held)
        await self._boot.attend(vm, held)

    async def _attend_again(self, held: Held) -> None:
        vm = await self._states.find(held.vm_id)
        if vm is not None:
            await self._boot.attend(vm, held)

    def _hold(self, vm: VmRecord, held: Held) -> None:
        self._held[vm.id] = held
        held.watcher = asyncio.create_task(self._watch(vm, held), name=f"vm {vm.id}")
        held.pulse = asyncio.create_task(self._heartbeat.beat(held), name=f"vm {vm.id} heartbeat")

    async def _watch(self, vm: VmRecord, held: Held) -> None:
        ending: Ending = await held.qemu.exited
        await held.let_go()
        by_itself = await self._states.change(lambda: _write_ending(vm.id, ending))
        run_directory = vm_paths(self._config, vm.id, vm.disk_id).run_directory
        try:
            await asyncio.to_thread(RunDirectory(run_directory).remove)
        except OSError as error:
            _log.warning("vm %d: %s", vm.id, error)  # the next start or sweep removes it
        if self._held.get(vm.id) is held:
            del self._held[vm.id]
        if by_itself:
            self.on_ended(vm.id)

    def _on_event(self, held: Held) -> Callable[[str, Mapping[str, Any]], None]:
        """Follow what qemu says of its guest: paused, resumed, out of disk space."""
        trouble: list[str] = []

        def take(name: str, data: Mapping[str, Any]) -> None:
            if name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
                held.is_out_of_space = bool(data.get("nospace"))
                trouble[:] = [self._heartbeat.why_stopped(held)]
            elif name == "STOP":
                reason = trouble.pop() if trouble else PAUSED_BY_USER
                held.spawn(self._see_if_held(held, VmState.PAUSED, reason))
            elif name == "RESUME":
                trouble.clear()
                held.is_out_of_space = False
                held.spawn(self._see_if_held(held, VmState.RUNNING, ""))

        return take

    async def _see_of(self, held: Held, state: VmState, reason: str) -> None:
        pid = held.qemu.identity.pid
        await self._states.see_of(held.vm_id, pid, state, reason)

    async def _see_if_held(self, held: Held, state: VmState, reason: str) -> None:
        if self._held.get(held.vm_id) is held:
            await self._states.see_if(held.vm_id, SEEN_STATES, state, reason)


def scope_of(vm: VmRecord) -> VmScope:
    """Give the scope that a vm's qemu is in, where systemd runs."""
    return VmScope(vm.id, vm.name, vm.mem_size, vm.cpus)


def _write_ending(vm_id: int, ending: Ending) -> bool:
    """Write down how a qemu ended, in a transaction; True unless a job is ending it."""
    seen = find_vm(vm_id)
    if seen is None:
        return False
    if seen.state in (VmState.STOPPING, VmState.DELETING):
        # What becomes of the vm is its job's to say.
        write_state(vm_id, VmState(seen.state), seen.reason, forget_process=True)
        return False
    state = VmState.STOPPED if ending.is_orderly else VmState.CRASHED
    by_guest = ending.kind == EndingKind.GUEST_SHUTDOWN and seen.restart != "always"
    wanted = WantedState.STOPPED if by_guest else None
    write_state(vm_id, state, ending.message, wanted=wanted)
    return True


def machine_spec(
    vm: VmRecord, template: ReadyTemplate, accelerator: str, binary: str
) -> MachineSpec:
    """Give what the machine of a vm is to be."""
    cmdline = template.declaration.boot.cmdline
    is_copy = vm.layer_id is not None or template.has_identity
    if is_copy and not vm.identified:
        # Its disk is somebody's already.
        cmdline += f" oscloud.identity={vm.uuid}"
    return MachineSpec(
        name=vm.name,
        uuid=vm.uuid,
        memory_bytes=vm.mem_size,
        cpus=vm.cpus,
        accelerator=accelerator,
        mac=vm.mac,
        binary=binary,
        base_format=template.declaration.image.format,
        cmdline=cmdline,
    )
