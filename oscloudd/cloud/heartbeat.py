"""The heartbeat: whether each qemu still answers, and whether one stopped by a full disk can go on.

A qemu that does not answer is UNRESPONSIVE until it does; nothing is done to it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oscloudd.cloud.held import Held
from oscloudd.cloud.states import SEEN_STATES, VmState
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import CloudError
from oscloudd.host.resources import disk_free_bytes

_log = logging.getLogger(__name__)

# A qemu that hangs is known within their sum, 4.5 s.
BEAT_SECONDS = 2.0
LATE_SECONDS = 2.5

PAUSED_BY_USER = "paused by the user"
_STATE_OF_STATUS = {
    "running": (VmState.RUNNING, ""),
    "paused": (VmState.PAUSED, PAUSED_BY_USER),
    "postmigrate": (VmState.PAUSED, "it was to be suspended"),
    "io-error": (VmState.PAUSED, "an error of the host's disk stopped it"),
    "guest-panicked": (VmState.PAUSED, "the guest's kernel panicked"),
}


def state_of(status: str) -> tuple[VmState, str]:
    """Give the state and the reason that qemu's own run state stands for."""
    return _STATE_OF_STATUS.get(status, (VmState.UNRESPONSIVE, f"qemu is {status}"))


class Heartbeat:
    """Asks every qemu how it is; `on_back` is called for one that answers again."""

    def __init__(
        self, config: Config, states: VmStates, on_back: Callable[[Held], Awaitable[None]]
    ) -> None:
        self._config = config
        self._states = states
        self._on_back = on_back

    async def beat(self, held: Held) -> None:
        """Ask one qemu again and again; ends by being cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                status = await self._ask(held)
                if held.is_out_of_space:
                    await self._go_on(held, status)
            except (CloudError, OSError) as error:
                await self.see_late(held, str(error))
            except Exception:
                _log.exception("vm %d: its heartbeat", held.vm_id)

    async def see_late(self, held: Held, why: str) -> None:
        """Write down that a qemu can't be asked, the first time it is seen."""
        if not held.is_late:
            held.is_late = True
            reason = f"qemu does not answer: {why}"
            await self._states.see_if(held.vm_id, SEEN_STATES, VmState.UNRESPONSIVE, reason)

    async def is_out_of_space(self, held: Held) -> bool:
        """Tell whether a qemu that an error of its disk has stopped met a full host disk."""
        for device in await held.qemu.monitor.execute("query-block"):
            if device.get("io-status") == "nospace":
                return True
        return False

    def why_stopped(self, held: Held) -> str:
        """Say why a disk error has stopped a guest."""
        if held.is_out_of_space:
            return f"the host's disk is full; it goes on once {self._floor()} are free"
        return "stopped by a disk error"

    async def _ask(self, held: Held) -> str:
        """Wait for one answer however long it takes: more questions would only fill the socket."""
        if not held.qemu.is_connected:
            await held.qemu.connect(timeout_seconds=LATE_SECONDS)
        asking = asyncio.ensure_future(held.qemu.status(timeout_seconds=None))
        try:
            done, _ = await asyncio.wait({asking}, timeout=LATE_SECONDS)
            if not done:
                await self.see_late(held, f"its monitor is silent for {LATE_SECONDS:g} s")
            status = await asking
        finally:
            asking.cancel()
        if held.is_late:
            await self._see_back(held, status)
        return status

    async def _see_back(self, held: Held, status: str) -> None:
        """Write down what a qemu that answers again is in."""
        _log.info("vm %d answers again", held.vm_id)
        state, reason = state_of(status)
        if status == "prelaunch":
            state, reason = VmState.RUNNING, ""
        if status == "io-error":
            held.is_out_of_space = await self.is_out_of_space(held)
            reason = self.why_stopped(held)
        seen = await self._states.see_if(held.vm_id, SEEN_STATES, state, reason)
        if seen and status == "prelaunch":
            await held.qemu.resume()
        await self._on_back(held)
        held.is_late = False

    async def _go_on(self, held: Held, status: str) -> None:
        """Let a guest that a full disk has stopped go on; its user may have paused it since."""
        if status != "io-error":
            held.is_out_of_space = False
            return
        free = await asyncio.to_thread(disk_free_bytes, self._config.state_path)
        if free >= self._config.limits.min_free_disk_bytes():
            _log.info("vm %d goes on: %d bytes are free again", held.vm_id, free)
            await held.qemu.resume()
            held.is_out_of_space = False

    def _floor(self) -> str:
        return self._config.limits.min_free_disk
