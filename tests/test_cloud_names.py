"""Name servers through what a host does to them."""

import asyncio
from ipaddress import IPv4Network
from pathlib import Path
from typing import cast

import pytest

from oscloudd.cloud import names
from oscloudd.cloud.events import Events
from oscloudd.cloud.names import Names
from oscloudd.config import Config
from oscloudd.errors import UnavailableError
from oscloudd.host.network import name_server
from oscloudd.host.network.name_server import NameServer
from oscloudd.store.database import Database

SUBNET = IPv4Network("10.0.0.0/24")
LIMIT_SECONDS = 60


class AwayEvents:
    """A history that can't be written to at first, for the database is away."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._tries = 0

    async def warn(self, _name: str, message: str) -> None:
        self._tries += 1
        if self._tries == 1:
            raise UnavailableError("the database is away")
        self.told.append(message)


def test_a_name_server_is_tried_again_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = AwayEvents()
    tries: list[NameServer] = []
    third = asyncio.Event()
    real_start = name_server.start_name_server

    async def start(server: NameServer) -> None:
        tries.append(server)
        if len(tries) == 3:
            third.set()
        await real_start(server)

    async def scenario() -> None:
        config = Config(runtime_dir=str(tmp_path))
        noun = Names(config, cast("Database", None), cast("Events", events))
        noun.is_available = True
        (tmp_path / "names").write_text("no directory")
        async with asyncio.timeout(LIMIT_SECONDS):
            await noun.serve("oscbr0", SUBNET, isolated=False)
            await third.wait()
            await noun.end("oscbr0", SUBNET)

    monkeypatch.setattr(names, "start_name_server", start)
    monkeypatch.setattr(names, "_FIRST_PAUSE_SECONDS", 0.0)
    asyncio.run(scenario())
    assert "oscbr0" in events.told[0]
    assert str(tmp_path / "names") in events.told[0]
