"""Being told that something changed, instead of asking again and again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from oscloudd.errors import OperationTimeoutError

T = TypeVar("T")


class Changes:
    """Wakes whoever waits for a change of a vm or a job, or for the next event."""

    def __init__(self) -> None:
        self._next: asyncio.Event = asyncio.Event()

    def announce(self) -> None:
        """Say that something changed."""
        self._next.set()
        self._next = asyncio.Event()

    async def next_change(self) -> None:
        """Wait for the next announcement."""
        await self._next.wait()

    async def wait_until(
        self, look: Callable[[], Awaitable[T | None]], *, timeout_seconds: float, what: str
    ) -> T:
        """Look after every change until `look` gives something, and give that.

        Raises OperationTimeoutError saying `what` did not happen.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    change = self._next
                    seen = await look()
                    if seen is not None:
                        return seen
                    await change.wait()
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"{what} did not happen within {timeout_seconds:g} s"
            ) from error
