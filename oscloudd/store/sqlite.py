"""SQLite: one file, write-ahead logged, with a reserve for the day the disk is full."""

import contextlib
import filecmp
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from peewee import SqliteDatabase

from oscloudd.store.backend import Verdict
from oscloudd.store.ballast import Ballast

_log = logging.getLogger(__name__)
BALLAST_BYTES = 8 << 20
# Of the ballast, what the file and what its log get, and how long the log may become by itself.
_RESERVE_BYTES = 3 << 20
_LOG_PAGES = 500
# What a disk without a free byte makes of an attempt to write or to open.
_FULL_CODES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


class SqliteBackend:
    """The file, and beside it its copies and its ballast."""

    # Not the default DEFERRED: a read followed by a write would then fail at once with
    # "database is locked", whatever the timeout, when another process holds the lock.
    begin = ("IMMEDIATE",)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ballast = Ballast(path.with_name("ballast"), BALLAST_BYTES)
        self.shown = str(path)
        self.hint = f"look whether the disk of {path.parent} is full, read-only or failing"
        # FULL makes a commit survive a power cut; measured at 0.25 ms a commit in WAL mode.
        self.connection = SqliteDatabase(
            str(path),
            pragmas={
                "journal_mode": "wal",
                "synchronous": "full",
                "foreign_keys": 1,
                "wal_autocheckpoint": _LOG_PAGES,
            },
        )

    def prepare(self) -> None:
        """Connect and look through the whole file; raises a peewee or sqlite3 error."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.connection.connect(reuse_if_open=True)
        self._path.chmod(0o600)
        result = self.connection.execute_sql("PRAGMA quick_check").fetchone()[0]
        if result != "ok":
            raise sqlite3.DatabaseError(result)

    def keep_copy(self, version: int) -> None:
        """Write `oscloud.db.version-N`, or `….version-N.2` and so on where there is another one."""
        unfinished = self._path.with_name(f"{self._path.name}.copying")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(0o600)
        with contextlib.closing(sqlite3.connect(unfinished)) as copy:
            self.connection.connection().backup(copy)
        _fsync(unfinished)
        for path in self._copies(version):
            if not path.exists():
                unfinished.rename(path)
                break
            # The same again: a daemon that was ended between the copy and the migration.
            if filecmp.cmp(unfinished, path, shallow=False):
                unfinished.unlink()
                break
        _fsync(self._path.parent)

    def _copies(self, version: int) -> Iterator[Path]:
        name = f"{self._path.name}.version-{version}"
        yield self._path.with_name(name)
        number = 2
        while True:
            yield self._path.with_name(f"{name}.{number}")
            number += 1

    def ready(self) -> None:
        """Lay in the ballast."""
        self.refill()

    def judge(self, error: Exception) -> Verdict:
        """Free the ballast if it is the disk that is full: then the same may be tried again."""
        full = any(code in _FULL_CODES for code in _codes(error))
        if full and self._ballast.is_disk_full() and self._ballast.free():
            self._take_reserve()
            return Verdict.AGAIN
        return Verdict.REFUSED

    def _take_reserve(self) -> None:
        """Turn the space of the ballast into unused pages of the file and of its log.

        What is merely free on a full disk is gone at once: whoever filled it goes on.
        """
        if self.connection.is_closed():
            return
        connection = self.connection.connection()
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE reserve (pages BLOB)")
            connection.execute("INSERT INTO reserve VALUES (randomblob(?))", (_RESERVE_BYTES,))
            connection.execute("DROP TABLE reserve")
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.Error as error:
            _log.warning("no pages could be kept in reserve: %s", error)
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")

    def unsettled(self) -> None:
        """Give None: what is not committed here did not happen."""

    def was_committed(self, mark: str) -> bool:
        """Never asked."""
        raise NotImplementedError(mark)

    def refill(self) -> None:
        """Lay in the ballast again, if there is space."""
        self._ballast.refill()

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


def _codes(error: BaseException | None) -> Iterator[int]:
    """Give SQLite's primary codes along the chain: the first error is behind a failed ROLLBACK."""
    while error is not None:
        for seen in (error, getattr(error, "orig", None)):
            if isinstance(seen, sqlite3.Error):
                yield getattr(seen, "sqlite_errorcode", 0) & 0xFF
        error = error.__context__


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
