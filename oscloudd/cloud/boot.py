"""Seeing a guest through its boot: its serial port open, its identity told, its sshd waited for."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from oscloudd.cloud.held import Held
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import CloudError, HostError, OperationTimeoutError
from oscloudd.guest.dialogue import tell_clone, tell_identity
from oscloudd.guest.readiness import wait_ssh_banner
from oscloudd.machine.console_log import trim_log
from oscloudd.machine.telnet import TelnetServer

_log = logging.getLogger(__name__)

# debian_12 boots in 30 s under emulation on an idle machine; ten vms at once take ten times that.
BOOT_SECONDS = 600.0

# A clone answers in 0.3 s on an idle machine.
_CLONE_SECONDS = 60.0


class Boot:
    """Attends to guests that have begun to run, new and adopted."""

    def __init__(self, config: Config, states: VmStates) -> None:
        self._config = config
        self._states = states

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
            held.settling = asyncio.create_task(self._settle(vm, held), name=f"vm {vm.id} boot")
            held.settling.add_done_callback(_retrieve)
        held.attended.set()

    async def _settle(self, vm: VmRecord, held: Held) -> None:
        document = await self._states.seed_document(vm.id)
        began = time.monotonic()
        if document:
            is_warm = vm.started == "warm"
            if is_warm and held.is_adopted:
                # It does not ask, so nobody can tell how much of it an earlier daemon has told.
                raise HostError("the daemon that was telling it who it is has ended")
            waiting = "telling the clone who it is" if is_warm else "waiting for its first boot"
            held.on_stage("booting", waiting)
            line = held.qemu.console.attach_socket(with_history=not is_warm)
            tell = (
                partial(tell_clone, line, document, seconds=_CLONE_SECONDS)
                if is_warm
                else partial(tell_identity, line, document, boot_seconds=BOOT_SECONDS)
            )
            await self._tell(line, tell)
            await self._states.record_identified(vm.id)
            held.timings["identity"] = time.monotonic() - began
        held.identified.set()
        held.on_stage("ready", f"waiting for sshd at {vm.ip}")
        began = time.monotonic()
        await self._wait_ssh(vm, may_take_longer=not document)
        held.timings["banner"] = time.monotonic() - began
        if not document:
            await self._states.record_identified(vm.id)
        await self._states.record_ready(vm.id, held.timings)

    async def _wait_ssh(self, vm: VmRecord, *, may_take_longer: bool) -> None:
        while True:
            try:
                await wait_ssh_banner(vm.ip, timeout_seconds=BOOT_SECONDS)
            except OperationTimeoutError:
                # Checking a large disk may take an old guest longer; a new one has none.
                if not may_take_longer:
                    raise
            else:
                return

    async def _tell(self, line: socket.socket, tell: Callable[[], None]) -> None:
        telling = asyncio.ensure_future(_in_thread(tell))
        try:
            await asyncio.shield(telling)
        finally:
            # The thread waits in poll(2), which a shutdown ends and a close does not; and closed
            # under it, the descriptor would be another's by the time it reads.
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            await asyncio.gather(telling, return_exceptions=True)
            line.close()


async def _in_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, which ends with it.

    A dialogue waits for its guest for minutes. The loop's own pool has six threads on two
    processors: six guests that hang would hold up everything else.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error = None
        try:
            work()
        except BaseException as failure:
            error = failure
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="dialogue", daemon=True).start()
    await done


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
