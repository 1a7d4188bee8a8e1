"""What becomes of a deletion while layers are merged, when its vm or their files go away."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from test_cloud_leftovers import insert_vm

from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.layer_merging import LayerMerger
from oscloudd.cloud.layers import forget_layers
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.snapshots import SnapshotDeleted, Snapshots
from oscloudd.cloud.suspension import Suspension
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_records import read_vm
from oscloudd.config import Config, QemuConfig
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Layer, Network, Snapshot, Vm

ORDER = Order(0)
T = TypeVar("T")


class OperationsUntilThen:
    """Operations whose vm is deleted when its layers are merged."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, _kind: str, vm_id: int, _order: Order, decide: Decide) -> Any:
        await self._database.run(lambda: decide(read_vm(vm_id)))
        gone = self._database.run(lambda: Vm.delete().where(Vm.id == vm_id).execute())
        return None, asyncio.ensure_future(gone)


class DatabaseThatLosesThem(Database):
    """A database in which all layers are deleted after the first look at them."""

    async def run_when_available(self, work: Callable[[], T]) -> T:
        answer = await super().run_when_available(work)
        await self.run(forget_all)
        return answer


def forget_all() -> None:
    Snapshot.delete().execute()
    Disk.update(layer_id=None).execute()
    forget_layers([2, 1])


class TemplatesThatCanNotBeRead:
    """Templates in a directory that somebody has removed."""

    def get_ready(self, name: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", name)


class JobThatReports:
    """A job, as far as a merger knows one."""

    def report(self, _stage: str, _message: str) -> None:
        pass


def fill() -> None:
    """Have a vm whose disk stands on layer 2, that has a name, and that on layer 1."""
    Network.create(name="default", ip="10.0.0.0", mask=16, bridge_interface_idx=0, created_at=0.0)
    insert_vm(1)
    for parent in (None, 1):
        Layer.create(parent=parent, size=1, whole=True, created_at=0.0)
    Disk.update(layer_id=2).execute()
    Snapshot.create(vm=1, layer=2, name="a", kind="disk", created_at=0.0)


def with_database(
    path: Path,
    test: Callable[[Config, Database], Awaitable[None]],
    kind: type[Database] = Database,
) -> None:
    async def scenario() -> None:
        config = Config(state_dir=str(path), qemu=QemuConfig(user="nobody"))
        database = kind(path / "oscloud.db")
        await database.open()
        try:
            await database.run(fill)
            await test(config, database)
        finally:
            await database.close()

    asyncio.run(scenario())


def test_a_snapshot_is_deleted_even_if_its_vm_is_then(tmp_path: Path) -> None:
    async def scenario(config: Config, database: Database) -> None:
        operations = cast("Operations", OperationsUntilThen(database))
        nothing = cast("Suspension", None), cast("Jobs", None)
        snapshots = Snapshots(config, database, *nothing, operations)
        answer = await snapshots.delete("vm-1", "a", ORDER)
        assert answer == SnapshotDeleted("a", "vm-1", kept=True)
        assert await database.run(lambda: Vm.select().count()) == 0

    with_database(tmp_path, scenario)


def test_layers_whose_files_go_away_are_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(config: Config, database: Database) -> None:
        await merge_all(config, database)
        assert await database.run(lambda: Layer.select().count()) == 2

    with_database(tmp_path, scenario)
    assert "layer 1 stays below layer 2 for now: [Errno 2]" in caplog.text


def test_layers_that_are_deleted_are_not_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_database(tmp_path, merge_all, DatabaseThatLosesThem)
    assert "stays below" not in caplog.text


async def merge_all(config: Config, database: Database) -> None:
    templates = cast("Templates", TemplatesThatCanNotBeRead())
    merger = LayerMerger(config, database, templates, LayerChains(config, database))
    vm = await database.run(lambda: read_vm(1))
    await merger.merge_all(vm, cast("Job", JobThatReports()))
