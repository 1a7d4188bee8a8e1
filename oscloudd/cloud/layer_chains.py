"""What stands on what, for those that open it: the files of a chain stay for as long as they do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from oscloudd.cloud.layers import read_chain, remove_layers
from oscloudd.config import Config
from oscloudd.store.database import Database


class LayerChains:
    """Knows who is opening a chain, and which layers go when those are done."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self._readers: set[asyncio.Event] = set()
        self._leaving: set[int] = set()

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

    async def remove(self, layer_id: int, forget: Callable[[], bool]) -> None:
        """Remove a layer's row, if `forget` does, and its files when all who read that are done.

        A daemon that ends before leaves a directory without a row, which the next one sweeps out.
        """
        self._leaving.add(layer_id)
        if await self._database.run_when_available(forget):
            for reader in list(self._readers):
                await reader.wait()
            await asyncio.to_thread(remove_layers, self._config, [layer_id])
        self._leaving.discard(layer_id)

    def is_leaving(self, layer_id: int) -> bool:
        """Tell whether a layer may have files without a row for now.

        Who sees its files, and then no row, and then asks this, sees True or its files are gone.
        """
        return layer_id in self._leaving
