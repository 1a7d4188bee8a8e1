"""Keeping an nft table of ours as it should be, whoever changes it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from oscloudd.errors import CloudError
from oscloudd.host.network.nft_events import TableEvents

_log = logging.getLogger(__name__)

# When a table could not be put back.
_RETRY_SECONDS = 5.0


async def keep_table(
    name: str, changes: TableEvents, put_back: Callable[[], Awaitable[None]]
) -> None:
    """Do `put_back` whenever somebody else has changed our table, until cancelled."""
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
