"""What stands on what, for those that open it: the files of a chain stay for as long as they do."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from oscloudd.cloud.layers import read_chain, remove_layers
from oscloudd.config import Config
from oscloudd.store.database import Database


class LayerChains:
    """Knows who is opening a chain."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self._readers: set[asyncio.Event] = set()

    @asynccontextmanager
    async def reading(self, layer_id: int | None) -> AsyncIterator[list[int]]:
        """Give a layer and all below it, the top first; their files are there until this ends.

        Meanwhile they may be opened, and not more: what is open stays so without.
        """
        done = asyncio.Event()
        self._readers.add(done)
        try:
            if layer_id is None:
                yield []
            else:
                yield await self._database.run_when_available(lambda: read_chain(layer_id))
        finally:
            self._readers.discard(done)
            done.set()

    async def remove(self, layer_ids: Iterable[int]) -> None:
        """Remove the files of layers that have no rows any more, when all who read those are done.

        A daemon that dies before leaves directories without a row, which are swept out.
        """
        for reader in list(self._readers):
            await reader.wait()
        await asyncio.to_thread(remove_layers, self._config, layer_ids)
