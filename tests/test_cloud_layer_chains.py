"""The files of a chain stay for as long as somebody is about to open them."""

import asyncio
from pathlib import Path

from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.layers import layer_directory
from oscloudd.config import Config
from oscloudd.store.database import Database


def test_a_layer_goes_when_those_that_read_of_it_are_done(tmp_path: Path) -> None:
    asyncio.run(remove_while_reading(tmp_path))


async def remove_while_reading(state: Path) -> None:
    config = Config(state_dir=str(state))
    database = Database(state / "oscloud.db")
    await database.open()
    chains = LayerChains(config, database)
    directory = layer_directory(config, 7)
    directory.mkdir(parents=True)
    async with chains.reading(None) as layers:
        assert layers == []
        removing = asyncio.ensure_future(chains.remove(7, lambda: True))
        await asyncio.sleep(0)
        await database.run(lambda: None)  # answered after what was asked before
        async with chains.reading(None):  # who comes later reads of it no more
            await asyncio.sleep(0)
            assert directory.exists()
            assert not removing.done()
    async with asyncio.timeout(10):
        await removing
    assert not directory.exists()
    assert not chains.is_leaving(7)
    directory.mkdir()
    async with asyncio.timeout(10):
        await chains.remove(7, lambda: False)
    assert directory.exists()
    await database.close()
