"""One qemu in the daemon's hands, with everything that is open or at work because of it."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from oscloudd.machine.qemu import Qemu
from oscloudd.machine.telnet import TelnetServer

_log = logging.getLogger(__name__)


class Held:
    """A hold on one qemu; `let_go` ends the hold, and qemu runs on."""

    qemu: Qemu  # set before anybody else sees the hold

    def __init__(self, vm_id: int) -> None:
        self.vm_id = vm_id
        self.telnet: TelnetServer | None = None
        self.settling: asyncio.Task[None] | None = None
        self.keeping: asyncio.Task[None] | None = None  # until the guest's disk has its identity
        self.watcher: asyncio.Task[None] | None = None
        self.pulse: asyncio.Task[None] | None = None
        self.timings: dict[str, float] = {}  # seconds of each stage of its coming up
        self.identified = asyncio.Event()
        self.is_adopted = False
        self.attended = asyncio.Event()  # its serial port is open, its boot is being followed
        self.is_late = False
        self.is_out_of_space = False
        self.last_stage: tuple[str, str] | None = None
        self._listener: Callable[[str, str], None] | None = None
        self._asides: set[asyncio.Task[Any]] = set()
        self._last_aside: asyncio.Task[Any] | None = None

    async def is_attended(self) -> bool:
        """Wait until its boot is being followed; False when it ends before."""
        assert self.watcher is not None
        attended = asyncio.ensure_future(self.attended.wait())
        try:
            await asyncio.wait({attended, self.watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attended.cancel()
        return self.attended.is_set()

    def on_stage(self, stage: str, message: str) -> None:
        """Say how far the guest's boot is."""
        self.last_stage = (stage, message)
        if self._listener is not None:
            self._listener(stage, message)

    def listen(self, listener: Callable[[str, str], None]) -> None:
        """Tell `listener` how far the boot is, now and from now on."""
        self._listener = listener
        if self.last_stage is not None:
            listener(*self.last_stage)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something on the side, one after the other, for as long as the hold lasts."""
        before = self._last_aside

        async def in_turn() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work

        task = self._last_aside = asyncio.create_task(in_turn(), name=f"vm {self.vm_id} aside")
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def let_go(self) -> None:
        """Close what is open and end what is at work, but the watcher, who calls this."""
        for task in (self.settling, self.keeping, self.pulse, *self._asides):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self.telnet is not None:
            await self.telnet.close()
        await self.qemu.close()
