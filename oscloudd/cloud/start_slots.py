"""Whose turn it is to load the host with making disks and starting qemus."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class StartSlots:
    """So many vms at a time are given their disk and started: `async with` waits for its turn.

    What nobody waits for does so with `wait_idle`, while no vm has, or wants, a turn.
    """

    def __init__(self, count: int) -> None:
        self._slots = asyncio.Semaphore(count)
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> None:
        self._begin()
        try:
            await self._slots.acquire()
        except BaseException:
            self._end()
            raise

    async def __aexit__(self, *_exception: object) -> None:
        self._slots.release()
        self._end()

    @contextmanager
    def without_turn(self) -> Iterator[None]:
        """Do what needs no turn and is to be over soon all the same."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until no vm is being started; False when that takes longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        return self._idle.is_set()

    def _begin(self) -> None:
        self._busy += 1
        self._idle.clear()

    def _end(self) -> None:
        self._busy -= 1
        if self._busy == 0:
            self._idle.set()
