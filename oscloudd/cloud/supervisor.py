"""Supervision: every qemu this daemon has hold of, from launch or adoption to its end.

Owns the holds (`Qemu`, telnet port, the task that sees a guest through its boot). Writes what it
sees to `VmStates`; what should happen next is decided by `vm_power` and `vm_create`.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from oscloudd.cloud.networks import NetworkRecord, Networks, read_network
from oscloudd.cloud.states import VmState
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, InvalidStateError
from oscloudd.guest.dialogue import tell_identity
from oscloudd.guest.readiness import wait_ssh_banner
from oscloudd.host.network.neighbours import delete_neighbour, set_neighbour
from oscloudd.host.network.taps import open_tap
from oscloudd.host.users import QemuUser
from oscloudd.machine.accelerator import Accelerator
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.console_log import read_log_tail, trim_log
from oscloudd.machine.ending import Ending
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.qemu import Qemu, adopt
from oscloudd.machine.run_directory import RunDirectory
from oscloudd.machine.telnet import TelnetServer
from oscloudd.store.database import Database

_log = logging.getLogger(__name__)

# debian_12 boots in 30 s under emulation on an idle machine; ten vms at once take ten times that.
BOOT_SECONDS = 600.0
_EXIT_SECONDS = 5.0

_OnStage = Callable[[str, str], None]

_STATE_OF_STATUS = {
    "running": (VmState.RUNNING, ""),
    "paused": (VmState.PAUSED, "paused by the user"),
    "io-error": (VmState.PAUSED, "an error of the host's disk stopped it"),
    "guest-panicked": (VmState.CRASHED, "the guest's kernel panicked"),
}


def _ignore_stage(_stage: str, _message: str) -> None:
    pass


@dataclass
class Held:
    """One qemu held: closing lets go of it, and it runs on."""

    qemu: Qemu
    telnet: TelnetServer | None = None
    settling: asyncio.Task[None] | None = None
    watcher: asyncio.Task[None] | None = None
    on_stage: _OnStage = field(default=_ignore_stage)


class Supervisor:
    """All qemus of this daemon by vm id; `main` closes it."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        networks: Networks,
        templates: Templates,
        user: QemuUser,
        accelerator: "asyncio.Task[Accelerator]",
    ) -> None:
        self._config = config
        self._database = database
        self._states = states
        self._networks = networks
        self._templates = templates
        self._user = user
        self._accelerator = accelerator
        self._held: dict[int, Held] = {}

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

    async def launch(self, vm: VmRecord, on_stage: _OnStage = _ignore_stage) -> None:
        """Start a qemu for the vm and let the guest take its first step.

        Raises HostError; nothing is left running then. Its boot is seen through in the
        background: `settled` waits for that.
        """
        template = self._templates.get_ready(vm.template)
        network = await self._database.run(lambda: read_network(vm.network_id))
        await self._networks.ensure_up(network)
        accelerator = await asyncio.shield(self._accelerator)
        on_stage("starting", f"starting qemu ({accelerator.name})")
        tap_fd = open_tap(vm.tap, vm.bridge)
        try:
            spec = _spec(vm, template, accelerator.name, self._config.qemu.binary)
            files = self._files(vm, template)
            qemu = await launch(spec, files, self._user, self._on_event(vm.id), tap_fd=tap_fd)
        finally:
            os.close(tap_fd)
        await self._states.record_process(vm.id, qemu.identity, accelerator.name)
        self._hold(vm, qemu, on_stage)
        self._remember_neighbour(vm)
        await qemu.resume()
        await self._states.see(vm.id, VmState.RUNNING)
        await self._attend(vm, network)

    async def adopt(self, vm: VmRecord) -> None:
        """Take hold of the qemu an earlier daemon started; raises NotFoundError when it is gone.

        Also raises ForeignMachineError when the process is not this vm's.
        """
        assert vm.process is not None
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        history = await asyncio.to_thread(read_log_tail, paths.console_log)
        qemu = await adopt(
            paths.run_directory, vm.process, vm.uuid, self._on_event(vm.id), history=history
        )
        self._hold(vm, qemu, _ignore_stage)
        try:
            await self._see_adopted(vm, qemu)
        except CloudError as error:
            await self._states.see(vm.id, VmState.UNRESPONSIVE, f"its monitor: {error.message}")

    async def settled(self, vm_id: int) -> None:
        """Wait until the guest has its identity and its sshd answers; raises what went wrong."""
        held = self._held.get(vm_id)
        if held is None or held.settling is None:
            await self.released(vm_id)
            raise await self._ended_early(vm_id)
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

    def forget_neighbour(self, vm: VmRecord) -> None:
        """Take the vm's address out of the host's neighbour table, before another vm gets it."""
        delete_neighbour(vm.bridge, IPv4Address(vm.ip))

    async def close(self) -> None:
        """Let go of every qemu; all of them run on."""
        for held in list(self._held.values()):
            if held.watcher is not None:
                held.watcher.cancel()
                await asyncio.gather(held.watcher, return_exceptions=True)
            await self._let_go(held)
        self._held.clear()

    async def _ended_early(self, vm_id: int) -> CloudError:
        seen = await self._states.find(vm_id)
        why = seen.reason if seen is not None else "it was deleted"
        message = f"the vm ended before its guest was ready: {why}"
        if seen is not None and seen.state == VmState.CRASHED:
            return HostError(message)
        return InvalidStateError(message)

    async def _see_adopted(self, vm: VmRecord, qemu: Qemu) -> None:
        status = await qemu.status()
        if status == "prelaunch":
            await qemu.resume()
            status = "running"
        state, reason = _STATE_OF_STATUS.get(status, (VmState.UNRESPONSIVE, f"qemu is {status}"))
        await self._states.see(vm.id, state, reason)
        network = await self._database.run(lambda: read_network(vm.network_id))
        await self._networks.ensure_up(network)
        self._remember_neighbour(vm)
        await self._attend(vm, network)

    def _hold(self, vm: VmRecord, qemu: Qemu, on_stage: _OnStage) -> None:
        held = Held(qemu, on_stage=on_stage)
        self._held[vm.id] = held
        held.watcher = asyncio.create_task(self._watch(vm, held), name=f"vm {vm.id}")

    async def _attend(self, vm: VmRecord, network: NetworkRecord) -> None:
        """Open the serial port and see the guest through its boot."""
        held = self._held.get(vm.id)
        if held is None:
            return
        console_log = vm_paths(self._config, vm.id, vm.disk_id).console_log
        await asyncio.to_thread(trim_log, console_log)
        telnet = TelnetServer(
            held.qemu.console, vm.serial_port, lambda uid: uid in (0, vm.owner_uid)
        )
        try:
            await telnet.start()
            held.telnet = telnet
        except CloudError as error:
            # A busy port takes away one of three ways to the console, not the vm.
            _log.warning("vm %d: %s", vm.id, error.message)
        if held.qemu.exited.done():
            # It died meanwhile, and the watcher may have let go before there was a port to close.
            await telnet.close()
            return
        if not vm.ready or held.settling is None:
            held.settling = asyncio.create_task(self._settle(vm, held), name=f"vm {vm.id} boot")
            held.settling.add_done_callback(_retrieve)

    async def _settle(self, vm: VmRecord, held: Held) -> None:
        document = await self._states.seed_document(vm.id)
        if document:
            held.on_stage("booting", "waiting for the guest's first boot")
            line = held.qemu.console.attach_socket(with_history=True)
            await _tell(line, document)
            await self._states.record_identified(vm.id)
        held.on_stage("ready", f"waiting for sshd at {vm.ip}")
        await wait_ssh_banner(vm.ip, timeout_seconds=BOOT_SECONDS)
        if not document:
            await self._states.record_identified(vm.id)
        await self._states.record_ready(vm.id)

    async def _watch(self, vm: VmRecord, held: Held) -> None:
        ending: Ending = await held.qemu.exited
        await self._let_go(held)
        state = VmState.STOPPED if ending.is_orderly else VmState.CRASHED
        seen = await self._states.find(vm.id)
        if seen is not None and seen.state != VmState.DELETING:
            await self._states.see(vm.id, state, ending.message)
        run_directory = vm_paths(self._config, vm.id, vm.disk_id).run_directory
        await asyncio.to_thread(RunDirectory(run_directory).remove)
        if self._held.get(vm.id) is held:
            del self._held[vm.id]

    async def _let_go(self, held: Held) -> None:
        if held.settling is not None:
            held.settling.cancel()
            await asyncio.gather(held.settling, return_exceptions=True)
        if held.telnet is not None:
            await held.telnet.close()
        await held.qemu.close()

    def _on_event(self, vm_id: int) -> Callable[[str, Mapping[str, Any]], None]:
        """Follow what qemu says of its guest: paused, resumed, out of disk space."""
        pending: set[asyncio.Task[None]] = set()
        trouble: list[str] = []

        def take(name: str, data: Mapping[str, Any]) -> None:
            if name == "BLOCK_IO_ERROR" and data.get("action") == "stop":
                full = "the host's disk is full" if data.get("nospace") else "a disk error"
                trouble.append(f"stopped by {full}")
            elif name == "STOP":
                reason = trouble.pop() if trouble else "paused by the user"
                _spawn(pending, self._see_if_held(vm_id, VmState.PAUSED, reason))
            elif name == "RESUME":
                _spawn(pending, self._see_if_held(vm_id, VmState.RUNNING, ""))

        return take

    async def _see_if_held(self, vm_id: int, state: VmState, reason: str) -> None:
        seen = await self._states.find(vm_id)
        if (
            vm_id in self._held
            and seen is not None
            and seen.state
            in (
                VmState.RUNNING,
                VmState.PAUSED,
            )
        ):
            await self._states.see(vm_id, state, reason)

    def _remember_neighbour(self, vm: VmRecord) -> None:
        # The kernel asks for an address it does not know once a second only, and a booting guest
        # misses most of that; and an address that is fixed can't be taken over by another guest.
        set_neighbour(vm.bridge, IPv4Address(vm.ip), vm.mac)

    def _files(self, vm: VmRecord, template: ReadyTemplate) -> MachineFiles:
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        paths.run_directory.mkdir(parents=True, exist_ok=True)
        return MachineFiles(
            run_directory=paths.run_directory,
            qemu_log=paths.qemu_log,
            console_log=paths.console_log,
            disk=paths.disk,
            base=template.image,
            seed=paths.seed if paths.seed.exists() else None,
            kernel=template.kernel,
            initrd=template.initrd,
        )


async def _tell(line: socket.socket, document: str) -> None:
    telling = asyncio.ensure_future(
        asyncio.to_thread(tell_identity, line, document, boot_seconds=BOOT_SECONDS)
    )
    try:
        await asyncio.shield(telling)
    finally:
        # The thread waits in poll(2), which a shutdown ends and a close does not; and closed under
        # it, the descriptor would be another's by the time it reads.
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(telling, return_exceptions=True)
        line.close()


def _spec(vm: VmRecord, template: ReadyTemplate, accelerator: str, binary: str) -> MachineSpec:
    return MachineSpec(
        name=vm.name,
        uuid=vm.uuid,
        memory_bytes=vm.mem_size,
        cpus=vm.cpus,
        accelerator=accelerator,
        mac=vm.mac,
        binary=binary,
        base_format=template.declaration.image.format,
        cmdline=template.declaration.boot.cmdline,
    )


def _spawn(pending: set[asyncio.Task[None]], work: Any) -> None:
    task = asyncio.create_task(work)
    pending.add(task)
    task.add_done_callback(pending.discard)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Log how a boot went wrong, since perhaps nobody waits for it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("%s: %s", task.get_name(), error)
