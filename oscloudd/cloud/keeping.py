"""Keeping what is ours in the kernel as it should be, whoever changes it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from oscloudd.errors import CloudError

_log = logging.getLogger(__name__)

# When it could not be put back.
_RETRY_SECONDS = 5.0


class Changes(Protocol):
    """What somebody else has changed, as the kernel tells it."""

    async def touched(self) -> None:
        """Wait until somebody has changed it, since the last time."""

    def touch(self) -> None:
        """Take it for changed."""


async def keep_as_it_was(
    name: str, changes: Changes, put_back: Callable[[], Awaitable[None]]
) -> None:
    """Do `put_back` whenever somebody else has changed what is ours, until cancelled."""
    while True:
        await changes.touched()
        try:
            await put_back()
        except CloudError as error:
            _log.warning("%s can't be put back: %s", name, error.message)
            await asyncio.sleep(_RETRY_SECONDS)
            changes.touch()
        except Exception:
            _log.exception("%s", name)
