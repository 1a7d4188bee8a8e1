"""Limits of bandwidth where taps come and go meanwhile."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_cloud_ports import insert_vm

from oscloudd.cloud import rates
from oscloudd.cloud.rates import Rates
from oscloudd.errors import HostError
from oscloudd.store.database import Database
from oscloudd.store.models import Vm


def test_a_tap_that_goes_while_limits_are_set_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {0}
    applied: list[Mapping[str, int]] = []

    async def apply(limits: Mapping[str, int]) -> None:
        applied.append(dict(limits))
        if len(applied) == 1:
            there.clear()
        if limits:
            raise HostError("No such file or directory")

    async def scenario() -> None:
        database = Database(tmp_path / "oscloud.db")
        await database.open()
        await database.run(insert_vm)
        await database.run(lambda: Vm.update(bandwidth=64_000).execute())
        noun = Rates(database)
        try:
            await noun.sync()
            assert applied == [{"osctap0": 64_000}, {}]
            there.add(0)
            with pytest.raises(HostError, match="No such file"):
                await noun.sync()
        finally:
            noun.close()
            await database.close()

    monkeypatch.setattr(rates, "numbers_in_use", lambda _prefix: set(there))
    monkeypatch.setattr(rates, "apply_rates", apply)
    asyncio.run(scenario())
