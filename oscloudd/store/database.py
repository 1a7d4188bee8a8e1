"""The one database thread: every query of the program runs here, inside a transaction.

Connections of peewee belong to a thread, and a database that stalls must not stall the event
loop; so there is one worker thread, and callers hand it functions. Which database it is, SQLite
or MariaDB, is known to `sqlite` and `mariadb` only.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from peewee import (
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    PeeweeException,
    ProgrammingError,
)

from oscloudd.errors import HostError, UnavailableError
from oscloudd.store.address import parse_address
from oscloudd.store.backend import Backend, Verdict
from oscloudd.store.mariadb import MariaDbBackend
from oscloudd.store.migrations import migrate
from oscloudd.store.models import database_proxy
from oscloudd.store.sqlite import SqliteBackend

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5
# A server that kept us waiting in vain is not asked again so soon: a crowd would wait for it one
# after the other.
_AWAY_SECONDS = 1.0
_ATTEMPTS = 3
# Faults of the work, which no other attempt mends.
_OF_THE_WORK = (IntegrityError, DataError, ProgrammingError, NotSupportedError)
T = TypeVar("T")


class _Piece(Generic[T]):
    """A piece of work, and what became of it as far as is known."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.handed_in = time.monotonic()
        self.result: T | None = None
        self.done = False  # known of one whose commit was not answered


class Database:
    """Owns the connection and its thread; `main` opens and closes it.

    `path` is SQLite's file, `url` the address of a MariaDB database to use instead; raises
    InvalidArgumentError if that can't be read.
    """

    def __init__(self, path: Path, url: str = "") -> None:
        self._backend: Backend = MariaDbBackend(parse_address(url)) if url else SqliteBackend(path)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._away_until = 0.0
        self._away: UnavailableError | None = None
        # A piece whose commit was sent and not answered, and the mark to know it by.
        self._unsettled: tuple[_Piece[Any], str] | None = None

    async def open(self) -> None:
        """Connect and migrate, keeping a copy first.

        Raises HostError if SQLite's file is damaged, UnavailableError if a server is away.
        """
        await self._in_thread(self._open)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in one transaction on the database thread and give what it returns.

        An exception from `work` rolls everything back and comes out here. It is run again, from
        its beginning, when the database lost it on the way. UnavailableError: the database does
        not answer; what was handed in while it was found so is not kept waiting for the same.
        """
        piece = _Piece(work)
        while True:
            try:
                return await self._in_thread(lambda: self._do(piece))
            except UnavailableError:
                if not self._is_in_doubt(piece):
                    raise
            # Perhaps it was written: the caller is told once that is known.
            await asyncio.sleep(_RETRY_SECONDS)
            piece.handed_in = time.monotonic()

    async def run_when_available(self, work: Callable[[], T]) -> T:
        """Run `work` as `run` does, however long it takes until the database answers.

        For what must be written down and has nobody to complain to: how a qemu ended, which step
        of a job is done.
        """
        piece = _Piece(work)
        while True:
            try:
                return await self._in_thread(lambda: self._do(piece))
            except UnavailableError as error:
                _log.warning("%s; trying again", error.message)
                await asyncio.sleep(_RETRY_SECONDS)
                piece.handed_in = time.monotonic()

    async def refill_ballast(self) -> None:
        """Keep disk space in reserve again if there is enough; to be called now and then."""
        await asyncio.to_thread(self._backend.refill)

    async def close(self) -> None:
        """Finish what was handed in and close."""
        await self._in_thread(self._backend.close)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _do(self, piece: _Piece[T]) -> T:
        if self._away is not None and self._away_until > piece.handed_in:
            raise UnavailableError(self._away.message, hint=self._away.hint)
        began = time.monotonic()
        for attempt in range(_ATTEMPTS):
            try:
                return self._transaction(piece)
            except _OF_THE_WORK:
                raise
            except (DatabaseError, InterfaceError) as error:
                failure = error
            if (mark := self._backend.unsettled()) is not None:
                self._unsettled = (piece, mark)
            verdict = self._backend.judge(failure)
            if verdict is not Verdict.AGAIN or attempt == _ATTEMPTS - 1:
                break
        if verdict is Verdict.AWAY:
            now = time.monotonic()
            self._away_until = now + (_AWAY_SECONDS if now - began > _AWAY_SECONDS else 0)
        raise self._unavailable(verdict, failure, piece) from failure

    def _transaction(self, piece: _Piece[T]) -> T:
        with self._backend.connection.atomic(*self._backend.begin):
            self._settle()
            if not piece.done:
                piece.result = piece.work()
        return cast("T", piece.result)

    def _settle(self) -> None:
        """Find out what became of the last commit, before another one takes its mark away."""
        if self._unsettled is not None:
            piece, mark = self._unsettled
            piece.done = self._backend.was_committed(mark)
            self._unsettled = None

    def _is_in_doubt(self, piece: _Piece[Any]) -> bool:
        return piece.done or (self._unsettled is not None and self._unsettled[0] is piece)

    def _unavailable(
        self, verdict: Verdict, failure: PeeweeException, piece: _Piece[T]
    ) -> UnavailableError:
        is_unknown = self._unsettled is not None and self._unsettled[0] is piece
        unknown = "; whether the change was written is not known" if is_unknown else ""
        error = UnavailableError(
            f"the database {self._backend.shown} does not answer: {_text(failure)}{unknown}",
            hint=self._backend.hint,
        )
        if verdict is Verdict.AWAY:
            self._away = error
        return error

    def _open(self) -> None:
        backend = self._backend
        try:
            try:
                self._prepare()
            except (PeeweeException, sqlite3.DatabaseError) as error:
                if backend.judge(error) is not Verdict.AGAIN:
                    raise
                self._prepare()
        except (PeeweeException, sqlite3.DatabaseError, OSError) as error:
            if isinstance(backend, MariaDbBackend):
                raise UnavailableError(
                    f"the database {backend.shown} can't be used: {_text(error)}",
                    hint=f"running vms are left alone; {backend.hint}",
                ) from error
            raise HostError(
                f"the database {backend.shown} can't be used: {_text(error)}",
                hint="running vms are left alone; put one of its copies, or your own, in its "
                "place, or move the file away to begin with an empty cloud",
            ) from error

    def _prepare(self) -> None:
        database_proxy.initialize(self._backend.connection)
        self._backend.prepare()
        migrate(self._backend)
        self._backend.ready()


def _text(error: Exception) -> str:
    # PyMySQL's are a number and a text.
    return str(error.args[-1]) if error.args else type(error).__name__
