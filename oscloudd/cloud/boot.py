"""Seeing a guest through its boot: its serial port open, its identity told, and until it is ready.

It is when its sshd greets and, where it has cloud-init, that has ended. One that is told nothing
but its address may have no sshd: it is when its address answers.
"""

import asyncio
import logging
import time
from functools import partial

from oscloudd.cloud.dialogues import converse
from oscloudd.cloud.held import Held
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, OperationTimeoutError
from oscloudd.guest.cloud_init import wait_cloud_init
from oscloudd.guest.dialogue import let_rest, tell_clone, tell_identity
from oscloudd.guest.readiness import ADDRESS, SSH, Sign, wait_sign, wait_ssh_banner
from oscloudd.machine.console_log import trim_log
from oscloudd.machine.telnet import TelnetServer

_log = logging.getLogger(__name__)

# debian_12 boots in 30 s under emulation on an idle machine; ten vms at once take ten times that.
BOOT_SECONDS = 600.0

# The question comes long before sshd; this is for one that somebody else's sshd has overtaken.
_QUESTION_SECONDS = 10.0

# A clone answers in 0.3 s on an idle machine.
_CLONE_SECONDS = 60.0

# It installs what its user data ask for, and says every second that it is at work.
_CLOUD_INIT_SECONDS = 3600.0

# What others' starts may put off that nobody waits for; a guest that is not told waits 60 s.
_REST_SECONDS = 30.0


class Boot:
    """Attends to guests that have begun to run, new and adopted."""

    def __init__(self, config: Config, states: VmStates, slots: StartSlots) -> None:
        self._config = config
        self._states = states
        self._slots = slots

    async def attend(self, vm: VmRecord, held: Held) -> None:
        """Open the serial port and see the guest through its boot, in the background."""
        if held.attended.is_set():
            return
        console_log = vm_paths(self._config, vm.id, vm.disk_id).console_log
        try:
            await asyncio.to_thread(trim_log, console_log)
        except OSError as error:
            _log.warning("vm %d: %s", vm.id, error)
        if held.telnet is None:
            held.telnet = await _open_port(vm, held)
        if held.qemu.exited.done():
            # It died meanwhile, and the watcher may have let go before there was a port to close.
            await held.telnet.close()
            return
        seen = await self._states.find(vm.id)
        if seen is not None and not seen.ready and held.settling is None:
            held.settling = asyncio.create_task(self._settle(seen, held), name=f"vm {vm.id} boot")
            held.settling.add_done_callback(_retrieve)
        elif seen is not None and seen.ready:
            self._attend_document(seen, held, await self._states.seed_document(vm.id))
        held.attended.set()

    async def _settle(self, vm: VmRecord, held: Held) -> None:
        is_new = not vm.identified
        began = time.monotonic()
        document = await self._states.seed_document(vm.id)
        if is_new and vm.started == "warm":
            await self._tell_clone(vm, held, document)
            held.timings["identity"] = time.monotonic() - began
        keeping = self._attend_document(vm, held, document)
        if is_new and vm.started == "cold" and keeping is not None:
            held.on_stage("booting", "waiting for its first boot")
            await self._until_told(vm, keeping)
            held.timings["identity"] = time.monotonic() - began
        held.identified.set()
        is_told = bool(vm.host_keys)
        sign = SSH if is_told else ADDRESS
        held.on_stage("ready", f"waiting for {sign} at {vm.ip}")
        began = time.monotonic()
        await _wait_sign(vm, sign, may_take_longer=keeping is None and (is_told or not is_new))
        held.timings["banner"] = time.monotonic() - began
        if self._has_seed(vm) and vm.started == "cold":
            began = time.monotonic()
            await self._wait_cloud_init(vm, held, is_new=is_new)
            held.timings["cloud_init"] = time.monotonic() - began
            if document:  # it was to begin warm
                await self._states.record_kept(vm.id)
        await self._states.record_ready(vm.id, held.timings)

    async def _wait_cloud_init(self, vm: VmRecord, held: Held, *, is_new: bool) -> None:
        """Wait for cloud-init's end; raises HostError with its words if a first boot has failed.

        What a later boot says of errors is logged: that vm has been of use before.
        """
        held.on_stage("ready", "waiting for cloud-init to end")
        with held.qemu.open_channel() as channel:
            wait = partial(wait_cloud_init, channel, seconds=_CLOUD_INIT_SECONDS)
            errors = await converse(wait, channel)
        if errors and is_new:
            raise HostError(
                f"cloud-init failed: {errors}",
                hint="the console says more; with wait=started the vm stays to be looked at",
            )
        if errors:
            _log.warning("vm %d (%s): cloud-init: %s", vm.id, vm.name, errors)

    async def _tell_clone(self, vm: VmRecord, held: Held, document: str) -> None:
        if held.is_adopted:
            # It does not ask, so nobody can tell how much of it an earlier daemon has told.
            raise HostError("the daemon that was telling it who it is has ended")
        held.on_stage("booting", "telling the clone who it is")
        with held.qemu.open_channel() as channel:
            tell = partial(tell_clone, channel, document, seconds=_CLONE_SECONDS)
            await converse(tell, channel)
        await self._states.record_identified(vm.id)

    def _attend_document(
        self, vm: VmRecord, held: Held, document: str
    ) -> "asyncio.Task[None] | None":
        """See that the guest keeps what it is told, in the background; None when it has.

        One that boots with a seed is told by that.
        """
        if self._has_seed(vm) and vm.started == "cold":
            return None
        if document and held.keeping is None:
            keeping = self._until_kept(vm, held, document)
            held.keeping = asyncio.create_task(keeping, name=f"vm {vm.id} identity")
            held.keeping.add_done_callback(_retrieve)
        return held.keeping

    async def _until_kept(self, vm: VmRecord, held: Held, document: str) -> None:
        """Wait until the guest's disk has its identity, and forget what it was told.

        A boot that finds none asks for it, if there is no seed: the first one, and that of a clone
        which ended before it had kept what it was told.
        """
        boot_seconds = BOOT_SECONDS if not vm.identified and vm.started == "cold" else None
        waiting = []
        if not self._has_seed(vm):
            waiting.append(asyncio.create_task(self._answer(held, document, boot_seconds)))
        if vm.started == "warm":
            waiting.append(asyncio.create_task(self._let_rest(held)))
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        await self._states.record_kept(vm.id)

    def _has_seed(self, vm: VmRecord) -> bool:
        return vm_paths(self._config, vm.id, vm.disk_id).seed.exists()

    async def _answer(self, held: Held, document: str, boot_seconds: float | None) -> None:
        with held.qemu.console.attach_socket(with_history=True) as line:
            tell = partial(tell_identity, line, document, boot_seconds=boot_seconds)
            await converse(tell, line)

    async def _let_rest(self, held: Held) -> None:
        """Let a clone write its identity down, and do the rest, when nobody waits for a vm."""
        if held.settling is not None:
            await asyncio.wait({held.settling})
        await self._slots.wait_idle(_REST_SECONDS)
        with held.qemu.open_channel() as channel:
            await converse(partial(let_rest, channel), channel)

    async def _until_told(self, vm: VmRecord, keeping: "asyncio.Task[None]") -> None:
        """Wait for the end of `keeping`, or for a guest that turns out to have its identity.

        It has when a daemon died before it had written that down. What it is to be told is
        forgotten on its own word only: another may answer at its address.
        """
        # That a guest asks nothing is for `keeping` to say, which waits as long.
        limit_seconds = 2 * BOOT_SECONDS
        answers = asyncio.create_task(wait_ssh_banner(vm.ip, timeout_seconds=limit_seconds))
        try:
            await asyncio.wait({keeping, answers}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({keeping}, timeout=_QUESTION_SECONDS)
            (keeping if keeping.done() else answers).result()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)


async def _wait_sign(vm: VmRecord, sign: Sign, *, may_take_longer: bool) -> None:
    while True:
        try:
            await wait_sign(vm.ip, sign, timeout_seconds=BOOT_SECONDS)
        except OperationTimeoutError:
            # Checking a large disk may take an old guest longer; a new one has none.
            if not may_take_longer:
                raise
        else:
            return


async def _open_port(vm: VmRecord, held: Held) -> TelnetServer:
    telnet = TelnetServer(held.qemu.console, vm.serial_port, lambda uid: uid in (0, vm.owner_uid))
    try:
        await telnet.start()
    except CloudError as error:
        # A busy port takes away one of three ways to the console, not the vm.
        _log.warning("vm %d: %s", vm.id, error.message)
    return telnet


def _retrieve(task: asyncio.Task[None]) -> None:
    """Log how a boot went wrong, since perhaps nobody waits for it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("%s: %s", task.get_name(), error)
