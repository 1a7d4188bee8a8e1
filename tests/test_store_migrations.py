"""Databases of an earlier version, migrations cut short, and the copies kept of both."""

import asyncio
import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from ipaddress import IPv6Network
from pathlib import Path
from typing import Any

import pytest
from mariadb_server import MariaDb
from peewee import IntegrityError

from oscloudd.errors import HostError
from oscloudd.store import migrations
from oscloudd.store.database import Database
from oscloudd.store.mariadb import _Connection
from oscloudd.store.models import Disk, Event, Job, Meta, Network, Vm

# What oscloudd 0.1.0 made, word for word.
_VERSION_1 = """
CREATE TABLE "disk" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "name" VARCHAR(63) NOT NULL,
  "size" INTEGER NOT NULL, "template_name" VARCHAR(63), "created_at" REAL NOT NULL);
CREATE UNIQUE INDEX "disk_name" ON "disk" ("name");
CREATE TABLE "job" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "kind" VARCHAR(32) NOT NULL,
  "target" VARCHAR(63) NOT NULL, "vm_id" INTEGER, "state" VARCHAR(10) NOT NULL,
  "stage" VARCHAR(32) NOT NULL, "message" TEXT NOT NULL, "owner_uid" INTEGER NOT NULL,
  "created_at" REAL NOT NULL, "finished_at" REAL);
CREATE INDEX "job_vm_id" ON "job" ("vm_id");
CREATE INDEX "job_state" ON "job" ("state");
CREATE TABLE "network" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  "name" VARCHAR(63) NOT NULL, "ip" VARCHAR(15) NOT NULL, "mask" INTEGER NOT NULL,
  "bridge_interface_idx" INTEGER NOT NULL, "dns" TEXT NOT NULL, "created_at" REAL NOT NULL);
CREATE UNIQUE INDEX "network_name" ON "network" ("name");
CREATE UNIQUE INDEX "network_bridge_interface_idx" ON "network" ("bridge_interface_idx");
CREATE TABLE "vm" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "name" VARCHAR(63) NOT NULL,
  "uuid" VARCHAR(36) NOT NULL, "disk_id" INTEGER NOT NULL, "network_id" INTEGER NOT NULL,
  "mem_size" INTEGER NOT NULL, "cpus" INTEGER NOT NULL, "ip" VARCHAR(15) NOT NULL,
  "mac" VARCHAR(17) NOT NULL, "tap_interface_idx" INTEGER NOT NULL,
  "qemu_serial_port" INTEGER NOT NULL, "state" VARCHAR(16) NOT NULL,
  "wanted_state" VARCHAR(16) NOT NULL, "reason" TEXT NOT NULL, "ready" INTEGER NOT NULL,
  "started" VARCHAR(4) NOT NULL, "started_at" REAL, "accelerator" VARCHAR(8) NOT NULL,
  "qemu_pid" INTEGER, "qemu_start_ticks" INTEGER, "qemu_boot_id" VARCHAR(36),
  "host_keys" TEXT NOT NULL, "identified" INTEGER NOT NULL, "seed_document" TEXT NOT NULL,
  "owner_uid" INTEGER NOT NULL, "autostart" VARCHAR(10) NOT NULL, "restart" VARCHAR(10) NOT NULL,
  "created_at" REAL NOT NULL,
  FOREIGN KEY ("disk_id") REFERENCES "disk" ("id") ON DELETE RESTRICT,
  FOREIGN KEY ("network_id") REFERENCES "network" ("id") ON DELETE RESTRICT);
CREATE UNIQUE INDEX "vm_name" ON "vm" ("name");
CREATE UNIQUE INDEX "vm_uuid" ON "vm" ("uuid");
CREATE UNIQUE INDEX "vm_disk_id" ON "vm" ("disk_id");
CREATE INDEX "vm_network_id" ON "vm" ("network_id");
CREATE UNIQUE INDEX "vm_mac" ON "vm" ("mac");
CREATE UNIQUE INDEX "vm_tap_interface_idx" ON "vm" ("tap_interface_idx");
CREATE UNIQUE INDEX "vm_qemu_serial_port" ON "vm" ("qemu_serial_port");
CREATE UNIQUE INDEX "vm_network_id_ip" ON "vm" ("network_id", "ip");
INSERT INTO disk VALUES (3, 'web', 1073741824, 'debian_12', 1795565077.5);
INSERT INTO network VALUES (1, 'default', '192.168.0.0', 16, 1, '', 1795565077.5);
INSERT INTO vm VALUES (3, 'web', 'f4c1', 3, 1, 1073741824, 1, '192.168.0.2', '52:54:00:00:00:02', 1,
  5001, 'RUNNING', 'RUNNING', '', 1, 'cold', 1795565078.5, 'tcg', 4711, 99, 'b007', 'key', 1, '',
  0, 'no', 'no', 1795565077.5);
INSERT INTO job VALUES (7, 'vm_create', 'web', 3, 'RUNNING', 'booting', '', 0, 1795565077.5, NULL);
PRAGMA user_version = 1;
"""


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "oscloud.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = wal")
        database.executescript(_VERSION_1)
    return path


@pytest.fixture
def url(mariadb: MariaDb) -> Iterator[str]:
    name = mariadb.make_database()
    yield mariadb.url(name)
    mariadb.drop_database(name)


def read(database: Database, work: Callable[[], Any]) -> Any:
    """Open it, as a daemon that starts does, ask one thing and close it."""

    async def run() -> Any:
        try:
            await database.open()
            return await database.run(work)
        finally:
            await database.close()

    return asyncio.run(run())


NEWEST = str(len(migrations.MIGRATIONS))


def version() -> str:
    value: str = Meta.get(Meta.name == "schema_version").value
    return value


def user_version(path: Path) -> Any:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA user_version").fetchone()[0]


def tables(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master")}


def test_a_file_of_version_1_is_taken_over(old_file: Path) -> None:
    vm, job, network = read(Database(old_file), lambda: (Vm.get(), Job.get(), Network.get()))
    assert (network.name, network.isolated, network.nat) == ("default", False, True)
    assert IPv6Network(network.subnet6).subnet_of(IPv6Network("fd00::/8"))
    assert not vm.dual_stack
    assert (vm.id, vm.name, vm.qemu_pid, vm.started_at) == (3, "web", 4711, 1795565078.5)
    assert (job.id, job.state, job.stage) == (7, "RUNNING", "booting")
    assert (job.step, job.params, job.attempts, job.error_kind) == (0, "{}", 1, "")
    assert read(Database(old_file), version) == str(len(migrations.MIGRATIONS))
    job = read(
        Database(old_file),
        lambda: Job.create(kind="x", target="y", state="DONE", owner_uid=0, created_at=0.5),
    )
    assert job.id == 8
    assert read(Database(old_file), lambda: Event.select().count()) == 0
    disk = read(Database(old_file), Disk.get)
    assert (disk.id, disk.vm_id, disk.slot, disk.is_kept) == (3, None, None, False)
    assert not vm.protect


def test_a_slot_takes_one_disk_in_an_old_file_as_in_a_new_one(old_file: Path) -> None:
    def plug_in(name: str) -> None:
        Disk.create(name=name, size=512, vm_id=3, slot=1, created_at=0.5)

    for path in (old_file, old_file.with_name("new.db")):
        read(Database(path), lambda: plug_in("one"))
        with pytest.raises(IntegrityError):
            read(Database(path), lambda: plug_in("two"))


def test_the_copy_is_whole_private_and_named_after_its_version(old_file: Path) -> None:
    read(Database(old_file), version)
    copy = old_file.with_name("oscloud.db.version-1")
    assert user_version(copy) == 1
    assert "meta" not in tables(copy)
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("SELECT id, name FROM vm").fetchall() == [(3, "web")]
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    # Put back, it is migrated again.
    for path in old_file.parent.glob("oscloud.db-*"):
        path.unlink()
    copy.rename(old_file)
    assert read(Database(old_file), version) == NEWEST


def test_copies_of_different_content_are_kept_apart(old_file: Path) -> None:
    with contextlib.closing(sqlite3.connect(old_file)) as database:
        original = list(database.iterdump())
    for _ in range(2):
        read(Database(old_file), version)
        for path in old_file.parent.glob("oscloud.db*"):
            if ".version-" not in path.name:
                path.unlink()
        with contextlib.closing(sqlite3.connect(old_file)) as database:
            database.executescript("\n".join(original))
            database.executescript("UPDATE vm SET name = 'shop'; PRAGMA user_version = 1")
    names = {path.name for path in old_file.parent.glob("*.version-*")}
    assert names == {"oscloud.db.version-1", "oscloud.db.version-1.2"}


def test_a_migration_that_fails_changes_nothing_and_copies_once(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_after_all(database: Any) -> None:
        first_two[1](database)
        database.execute_sql("INSERT INTO nowhere VALUES (1)")

    first_two = migrations.MIGRATIONS
    with monkeypatch.context() as context:
        context.setattr(migrations, "MIGRATIONS", (first_two[0], fail_after_all))
        for _ in range(3):
            with pytest.raises(HostError):
                read(Database(old_file), version)
    assert user_version(old_file) == 1
    assert "event" not in tables(old_file)
    assert [path.name for path in old_file.parent.glob("*.version-*")] == ["oscloud.db.version-1"]
    assert read(Database(old_file), version) == NEWEST


def test_a_new_file_has_no_copy_and_needs_none(tmp_path: Path) -> None:
    path = tmp_path / "state" / "oscloud.db"
    for _ in range(2):
        assert read(Database(path), version) == NEWEST
    assert not list(path.parent.glob("*.version-*"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "oscloud.db"
    read(Database(path), lambda: Meta.update(value="99").execute())
    with pytest.raises(HostError, match="version 99"):
        read(Database(path), version)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"not a database" * 1000), id="another file"),
        pytest.param(lambda path: overwrite_pages(path), id="pages overwritten"),
        pytest.param(lambda path: os.truncate(path, 5000), id="cut off"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a directory"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(
    old_file: Path, damage: Callable[[Path], Any]
) -> None:
    damage(old_file)
    before = old_file.read_bytes() if old_file.is_file() else b""
    with pytest.raises(HostError) as refused:
        read(Database(old_file), version)
    assert str(old_file) in refused.value.message
    assert refused.value.hint is not None
    assert "running vms are left alone" in refused.value.hint
    assert (old_file.read_bytes() if old_file.is_file() else b"") == before


def overwrite_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 40960)


def test_mariadb_gets_the_same_tables(url: str, mariadb: MariaDb) -> None:
    for _ in range(2):
        assert read(Database(Path("unused"), url), version) == NEWEST
    name = url.split("/")[3].partition("?")[0]
    found = mariadb.query("SHOW TABLES", database=name)
    expected = {
        "disk", "event", "job", "layer", "meta", "network", "nic", "port", "snapshot", "vm",
    }  # fmt: skip
    assert {table for (table,) in found} == expected
    collations = mariadb.query(
        "SELECT DISTINCT engine, table_collation FROM information_schema.tables"
        " WHERE table_schema = %s",
        (name,),
    )
    assert collations == [("InnoDB", "utf8mb4_nopad_bin")]


# Not every statement is worth its second; no group of them is as regular as this.
_STRIDE = 4


class KilledError(Exception):
    """Where a daemon would have been ended."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, url: str, statement_number: int) -> list[str]:
    """Open the database and be ended before that many changes of tables; give what was done."""
    done: list[str] = []
    real = _Connection.execute_sql

    def execute(self: Any, sql: str, params: Any = None) -> Any:
        if sql.startswith(("CREATE", "ALTER", "REPLACE", "RENAME", "INSERT", "DROP")):
            if len(done) == statement_number:
                raise KilledError
            done.append(sql)
        return real(self, sql, params)

    with monkeypatch.context() as context:
        context.setattr(_Connection, "execute_sql", execute)
        with contextlib.suppress(KilledError):
            read(Database(Path("unused"), url), version)
    return done


def schema(mariadb: MariaDb, name: str) -> dict[str, str]:
    found = [table for (table,) in mariadb.query("SHOW TABLES", database=name)]
    return {
        table: mariadb.query(f"SHOW CREATE TABLE {table}", database=name)[0][1] for table in found
    }


def test_a_first_start_on_mariadb_may_be_cut_short_anywhere(
    mariadb: MariaDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, str] = {}
    number = 10_000
    while number >= 0:
        name = mariadb.make_database()
        try:
            done = interrupt_at(monkeypatch, mariadb.url(name), number)
            assert read(Database(Path("unused"), mariadb.url(name)), version) == NEWEST
            found = schema(mariadb, name)
        finally:
            mariadb.drop_database(name)
        # Cut short between two steps it is an older version, and gets copies like any other.
        found = {table: text for table, text in found.items() if not table.startswith("before_")}
        wanted = wanted or found
        assert found == wanted, done[-1:]
        number = min(number, len(done)) - _STRIDE
    assert len(wanted) == 10


def make_version_1(mariadb: MariaDb, name: str) -> None:
    """As 0.1.0 would have made it there: tables of the first step, without what the second adds."""
    read(Database(Path("unused"), mariadb.url(name)), lambda: Job.create(**_JOB))
    for statement in (
        "DROP TABLE snapshot",
        "DROP TABLE layer",
        "DROP TABLE event",
        "DROP TABLE port",
        "DROP TABLE nic",
        "DELETE FROM meta WHERE name <> 'schema_version'",
        "UPDATE meta SET value = '1'",
        "ALTER TABLE job DROP step, DROP params, DROP attempts, DROP error_kind",
        "ALTER TABLE network DROP isolated, DROP nat",
    ):
        mariadb.query(statement, database=name)


_JOB = {"kind": "x", "target": "web", "state": "DONE", "owner_uid": 0, "created_at": 0.5}


def test_a_migration_of_mariadb_may_be_cut_short_anywhere_and_keeps_copies(
    mariadb: MariaDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, str] = {}
    number = 10_000
    while number >= 0:
        name = mariadb.make_database()
        try:
            make_version_1(mariadb, name)
            before = schema(mariadb, name)
            done = interrupt_at(monkeypatch, mariadb.url(name), number)
            job = read(Database(Path("unused"), mariadb.url(name)), Job.get)
            found = schema(mariadb, name)
            copied = mariadb.query("SELECT id, target FROM before_1_job", database=name)
        finally:
            mariadb.drop_database(name)
        assert (job.step, job.params, job.attempts, job.error_kind) == (0, "{}", 1, "")
        assert copied == [(1, "web")]
        # One that was cut short between two migrations keeps the version between them, too.
        between = {name for name in found if re.match("before_[2-9]_", name)}
        versions = {name[: len("before_2_")] for name in between}
        assert len(versions) <= 1
        whole = {version + table for version in versions for table in (*before, "meta", "event")}
        # Tables without a row yet, which the last ones had made before it was cut short.
        later = ("layer", "snapshot", "port", "nic")
        begun = {version + table for version in versions for table in later}
        assert between - begun == whole
        found = {name: text for name, text in found.items() if name not in between}
        copies = {f"before_1_{table}" for table in before}
        assert set(found) == {*before, *copies, "event", *later}
        wanted = wanted or found
        assert found == wanted, done[-1:]
        number = min(number, len(done)) - _STRIDE
