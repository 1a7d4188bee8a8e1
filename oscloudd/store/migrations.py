"""Versioned migrations: a list of steps, each run once, in order, in a transaction of its own.

A new step is appended; a step that has been released is never edited.
"""

from collections.abc import Callable

from peewee import SqliteDatabase

from oscloudd.store.models import TABLES


def _first_tables(database: SqliteDatabase) -> None:
    database.create_tables(TABLES)


MIGRATIONS: tuple[Callable[[SqliteDatabase], None], ...] = (_first_tables,)


def schema_version(database: SqliteDatabase) -> int:
    """Give how many migrations this database has had."""
    return int(database.execute_sql("PRAGMA user_version").fetchone()[0])


def pending_migrations(database: SqliteDatabase) -> int:
    """Give how many are still to run."""
    return len(MIGRATIONS) - schema_version(database)


def migrate(database: SqliteDatabase) -> None:
    """Bring the database to the newest schema; does nothing when it is there."""
    for number in range(schema_version(database), len(MIGRATIONS)):
        with database.atomic("IMMEDIATE"):
            MIGRATIONS[number](database)
            database.execute_sql(f"PRAGMA user_version = {number + 1}")
