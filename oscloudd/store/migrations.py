"""Versioned migrations: a list of steps, each run once, in order, in a transaction of its own.

A new step is appended; a step that has been released is never edited.
"""

from collections.abc import Callable

from peewee import SqliteDatabase
from playhouse.migrate import SchemaMigrator
from playhouse.migrate import migrate as migrate_schema

from oscloudd.store.models import LATER_TABLES, TABLES, Job


def _first_tables(database: SqliteDatabase) -> None:
    database.create_tables(TABLES)


def _journal_and_events(database: SqliteDatabase) -> None:
    database.create_tables(LATER_TABLES)
    # A new database has them already: the step above makes the tables as they are today.
    there = {column.name for column in database.get_columns("job")}
    migrator = SchemaMigrator.from_database(database)
    for field in (Job.step, Job.params, Job.attempts, Job.error_kind):
        if field.column_name not in there:
            migrate_schema(migrator.add_column("job", field.column_name, field))


MIGRATIONS: tuple[Callable[[SqliteDatabase], None], ...] = (_first_tables, _journal_and_events)


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
