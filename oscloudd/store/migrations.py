"""Versioned migrations: a list of steps, each run once, in order.

A new step is appended; a step that has been released is never edited. SQLite runs each in a
transaction. MariaDB has none for changes of tables: a step may be cut short anywhere and is then
run again, so it asks for each thing whether it is there.

The version is a row of `meta`. Files of version 1 have no such table, and their version where
SQLite itself keeps one for its users, in `PRAGMA user_version`.
"""

from collections.abc import Callable
from typing import Any

from peewee import SqliteDatabase

from oscloudd.errors import HostError
from oscloudd.store.backend import Backend
from oscloudd.store.models import (
    LATER_TABLES,
    NIC_TABLES,
    PORT_TABLES,
    SNAPSHOT_TABLES,
    TABLES,
    Meta,
    Network,
)
from oscloudd.store.subnet6 import draw_subnet6

_VERSION = "schema_version"


def _first_tables(database: Any) -> None:
    database.create_tables(TABLES)


def _journal_and_events(database: Any) -> None:
    database.create_tables(LATER_TABLES)
    # A new database has them already: the step above makes the tables as they are today.
    there = {column.name for column in database.get_columns("job")}
    for name, kind in (
        ("step", "INTEGER NOT NULL DEFAULT 0"),
        ("params", "LONGTEXT NOT NULL DEFAULT '{}'"),
        ("attempts", "INTEGER NOT NULL DEFAULT 1"),
        ("error_kind", "VARCHAR(32) NOT NULL DEFAULT ''"),
    ):
        if name not in there:
            database.execute_sql(f"ALTER TABLE job ADD COLUMN {name} {kind}")


def _warm_images(database: Any) -> None:
    _add_columns(database, "disk", {"warm_image": "VARCHAR(32)"})
    _add_columns(database, "vm", {"timings": "LONGTEXT NOT NULL DEFAULT '{}'"})


def _disks_of_their_own(database: Any) -> None:
    disk = {
        "vm_id": "INTEGER",
        "slot": "INTEGER",
        "is_kept": "BOOL NOT NULL DEFAULT 0",
        "has_identity": "BOOL NOT NULL DEFAULT 0",
    }
    _add_columns(database, "disk", disk)
    _add_columns(database, "vm", {"protect": "BOOL NOT NULL DEFAULT 0"})
    if "disk_vm_id_slot" not in {index.name for index in database.get_indexes("disk")}:
        database.execute_sql("CREATE UNIQUE INDEX disk_vm_id_slot ON disk (vm_id, slot)")


def _networks_people_make(database: Any) -> None:
    columns = {
        "isolated": "BOOLEAN NOT NULL DEFAULT 0",
        "nat": "BOOLEAN NOT NULL DEFAULT 1",
    }
    _add_columns(database, "network", columns)


def _snapshots(database: Any) -> None:
    database.create_tables(SNAPSHOT_TABLES)
    _add_columns(database, "disk", {"layer_id": "INTEGER"})


def _ports(database: Any) -> None:
    database.create_tables(PORT_TABLES)


def _bandwidth(database: Any) -> None:
    _add_columns(database, "vm", {"bandwidth": "BIGINT NOT NULL DEFAULT 0"})


def _nics(database: Any) -> None:
    database.create_tables(NIC_TABLES)


def _dual_stack(database: Any) -> None:
    _add_columns(database, "network", {"subnet6": "VARCHAR(43)"})
    _add_columns(database, "vm", {"dual_stack": "BOOL NOT NULL DEFAULT 0"})
    if "network_subnet6" not in {index.name for index in database.get_indexes("network")}:
        database.execute_sql("CREATE UNIQUE INDEX network_subnet6 ON network (subnet6)")
    for (network_id,) in list(Network.select(Network.id).where(Network.subnet6.is_null()).tuples()):
        drawn = Network.update(subnet6=str(draw_subnet6()))
        drawn.where(Network.id == network_id).execute()


def _add_columns(database: Any, table: str, columns: dict[str, str]) -> None:
    there = {column.name for column in database.get_columns(table)}
    for name, kind in columns.items():
        if name not in there:
            database.execute_sql(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")


MIGRATIONS: tuple[Callable[[Any], None], ...] = (
    _first_tables,
    _journal_and_events,
    _warm_images,
    _disks_of_their_own,
    _networks_people_make,
    _snapshots,
    _ports,
    _bandwidth,
    _nics,
    _dual_stack,
)


def schema_version(database: Any) -> int:
    """Give how many migrations this database has had."""
    if Meta.table_exists():
        row = Meta.get_or_none(Meta.name == _VERSION)
        if row is not None:
            return int(row.value)
    if isinstance(database, SqliteDatabase):
        return int(database.execute_sql("PRAGMA user_version").fetchone()[0])
    return 0


def migrate(backend: Backend) -> None:
    """Bring the database to the newest schema, keeping a copy of any earlier one.

    Raises HostError if it is newer than this program.
    """
    database = backend.connection
    version = schema_version(database)
    if version > len(MIGRATIONS):
        raise HostError(
            f"the database {backend.shown} is of version {version}, made by a newer oscloudd",
            hint=f"this one knows versions up to {len(MIGRATIONS)}: start the newer one, or put "
            "back the copy it made of the older version",
        )
    if 0 < version < len(MIGRATIONS):
        backend.keep_copy(version)
    for number in range(version, len(MIGRATIONS)):
        with database.atomic(*backend.begin):
            MIGRATIONS[number](database)
            database.create_tables([Meta])
            Meta.replace(name=_VERSION, value=str(number + 1)).execute()
