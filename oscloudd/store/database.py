"""The one database thread: every query of the program runs here, inside a transaction.

Connections of peewee belong to a thread, and a database that stalls must not stall the event
loop; so there is one worker thread, and callers hand it functions.
"""

import asyncio
import logging
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from peewee import DatabaseError, IntegrityError, SqliteDatabase

from oscloudd.errors import HostError, UnavailableError
from oscloudd.store.migrations import migrate, pending_migrations
from oscloudd.store.models import database_proxy

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5
T = TypeVar("T")


class Database:
    """Owns the connection and its thread; `main` opens and closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        # FULL makes a commit survive a power cut; measured at 0.25 ms a commit in WAL mode.
        self._database = SqliteDatabase(
            str(path), pragmas={"journal_mode": "wal", "synchronous": "full", "foreign_keys": 1}
        )

    async def open(self) -> None:
        """Connect and migrate, keeping a copy of the file first; raises HostError if damaged."""
        await self._in_thread(self._open)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in one transaction on the database thread and give what it returns.

        An exception from `work` rolls everything back and comes out here.
        """
        return await self._in_thread(lambda: self._transaction(work))

    async def run_when_available(self, work: Callable[[], T]) -> T:
        """Run `work` as `run` does, however long it takes until the database answers.

        For what must be written down and has nobody to complain to: how a qemu ended, which step
        of a job is done.
        """
        while True:
            try:
                return await self.run(work)
            except UnavailableError as error:
                _log.warning("%s; trying again", error.message)
                await asyncio.sleep(_RETRY_SECONDS)

    async def close(self) -> None:
        """Finish what was handed in and close."""
        await self._in_thread(self._database.close)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _transaction(self, work: Callable[[], T]) -> T:
        try:
            # Not the default DEFERRED: a read followed by a write would then fail at once with
            # "database is locked", whatever the timeout, when another process holds the lock.
            with self._database.atomic("IMMEDIATE"):
                return work()
        except IntegrityError:
            raise
        except DatabaseError as error:
            raise UnavailableError(f"the database {self._path} does not answer: {error}") from error

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            existed = self._path.exists()
            database_proxy.initialize(self._database)
            self._database.connect(reuse_if_open=True)
            self._path.chmod(0o600)
            result = self._database.execute_sql("PRAGMA quick_check").fetchone()[0]
            if result != "ok":
                raise sqlite3.DatabaseError(result)
            if existed and pending_migrations(self._database):
                self._keep_copy()
            migrate(self._database)
        except (DatabaseError, sqlite3.DatabaseError) as error:
            raise HostError(
                f"the database {self._path} can't be used: {error}",
                hint=f"running vms are left alone; restore a copy from {self._path.parent}, "
                "or move the file away to begin with an empty cloud",
            ) from error

    def _keep_copy(self) -> None:
        self._database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy2(self._path, self._path.with_suffix(".db.before-migration"))
