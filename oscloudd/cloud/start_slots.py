"""Whose turn it is to load the host with making disks and starting qemus."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

# A clone greets within two seconds. One that does not is waited for, but keeps nobody waiting.
_CLONE_SECONDS = 10.0
# Between two steps of a job, or two vms of one client, nobody is being started either.
_CALM_SECONDS = 0.3


class CloneTurn:
    """The turn of one clone, which ends by itself in the end."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._end = asyncio.get_running_loop().call_later(_CLONE_SECONDS, self.release)

    def release(self) -> None:
        """Let the next clone begin. May be called twice."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            self._end.cancel()
            give_back()


class StartSlots:
    """So many vms at a time are given their disk and started: `async with` waits for its turn.

    Clones have a turn besides, from the start of their qemu to their sshd's greeting: a boot waits
    for disks and timers, while they keep a processor busy all along, and emulated ones push each
    other's translated code out of its caches. What nobody waits for does so with `wait_idle`, while
    no vm has, or wants, a turn.
    """

    def __init__(self, count: int) -> None:
        self._slots = asyncio.Semaphore(count)
        # One more than there are processors, for qemu to be started meanwhile.
        self._clones = asyncio.Semaphore(len(os.sched_getaffinity(0)) + 1)
        self._busy = 0
        self._begun = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> None:
        await self._take(self._slots)

    async def __aexit__(self, *_exception: object) -> None:
        self._give_back(self._slots)

    async def begin_clone(self) -> CloneTurn:
        """Wait for the turn of a clone, and give it, to be released when the clone greets."""
        await self._take(self._clones)
        return CloneTurn(partial(self._give_back, self._clones))

    @contextmanager
    def without_turn(self) -> Iterator[None]:
        """Do what needs no turn and is to be over soon all the same."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no vm has been started for a moment; False when that takes longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                begun = None
                while begun != self._begun or not self._idle.is_set():
                    await self._idle.wait()
                    begun = self._begun
                    await asyncio.sleep(_CALM_SECONDS)
        return self._idle.is_set()

    async def _take(self, turns: asyncio.Semaphore) -> None:
        self._begin()
        try:
            await turns.acquire()
        except BaseException:
            self._end()
            raise

    def _give_back(self, turns: asyncio.Semaphore) -> None:
        turns.release()
        self._end()

    def _begin(self) -> None:
        self._busy += 1
        self._begun += 1
        self._idle.clear()

    def _end(self) -> None:
        self._busy -= 1
        if self._busy == 0:
            self._idle.set()
