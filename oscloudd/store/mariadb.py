"""MariaDB through PyMySQL: a server that may be slow, gone for a while, or started anew.

The only other kind of database than SQLite, and to behave as SQLite does: names differ by case
and by trailing blanks, a value that does not fit is an error, an id is never given twice.
"""

import socket
import uuid
from collections.abc import Iterator
from typing import Any

import pymysql
from peewee import MySQLDatabase, PeeweeException

from oscloudd.errors import HostError
from oscloudd.store.address import MariaDbAddress
from oscloudd.store.backend import Verdict

_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 10
_MIGRATION_SECONDS = 3600
# How long the server may take to notice that the connection we had before is gone.
_CLAIM_SECONDS = 3
# idle_transaction_timeout, of MariaDB 10.3, is the youngest thing used here.
_OLDEST = (10, 3)
# Not utf8mb4_bin, which takes "a" and "a " for the same.
_COLLATION = "utf8mb4_nopad_bin"
# What waits for a lock gives up before the connection does; and a transaction whose client was
# lost is rolled back by the server within seconds, not when TCP notices; nor does a lost one keep
# the claim for longer than a minute.
_SESSION = (
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,NO_ZERO_DATE,"
    "ERROR_FOR_DIVISION_BY_ZERO', default_storage_engine = InnoDB, foreign_key_checks = 1,"
    " innodb_lock_wait_timeout = 4, lock_wait_timeout = 4, idle_transaction_timeout = 20,"
    " wait_timeout = 60"
)
_COMMIT_MARK = "last_commit"
# https://mariadb.com/kb/en/mariadb-error-codes/
_LOCK_WAIT_TIMEOUT, _DEADLOCK = 1205, 1213
# What PyMySQL itself finds: 0 is a connection it has given up, 2000 and more are its own.
_CLIENT_CODES = {0, *range(2000, 3000)}
_NO_SERVER = 2002
_CAN_NOT_CONNECT = {_NO_SERVER, 2003}


class _Connection(MySQLDatabase):
    """A peewee database that marks each commit of a change, so that its fate can be found out.

    When a connection breaks between COMMIT and its answer, nobody knows whether it happened. The
    mark is a row of `meta`, written in the same transaction: there, if that was committed.
    """

    safe_create_index = True  # MariaDB, unlike MySQL, has CREATE INDEX IF NOT EXISTS
    _changed = False
    mark: str | None = None

    def _connect(self) -> Any:
        parameters = {**self.connect_params, "database": self.database, "autocommit": True}
        connection = pymysql.connect(**parameters, defer_connect=True)
        path = parameters.get("unix_socket")
        connection.connect(None if path is None else _open_socket(path))
        _claim(connection, self.database)
        return connection

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        if not sql.lstrip("( ").startswith("SELECT"):
            self._changed = True
        return super().execute_sql(sql, params)

    def begin(self, isolation_level: str | None = None) -> None:
        self._changed = False
        super().begin(isolation_level)

    def commit(self) -> None:
        if self._changed:
            mark = uuid.uuid4().hex
            self.execute_sql(
                "REPLACE INTO meta (name, value) VALUES (%s, %s)", (_COMMIT_MARK, mark)
            )
            self.mark = mark
        super().commit()
        self.mark = None


class MariaDbBackend:
    """One database on a server that belongs to somebody else."""

    begin: tuple[str, ...] = ()

    def __init__(self, address: MariaDbAddress) -> None:
        self._address = address
        self.shown = str(address)
        self.hint = (
            f"look whether the server runs, has a database {address.name}, and lets user "
            f"{address.user} in with the password of `database` in the configuration"
        )
        self.connection = _Connection(address.name, **self._parameters(_MIGRATION_SECONDS))

    def _parameters(self, answer_seconds: int) -> dict[str, Any]:
        place: dict[str, Any] = {"host": self._address.host, "port": self._address.port}
        if self._address.unix_socket is not None:
            place = {"unix_socket": self._address.unix_socket}
        return {
            **place,
            "user": self._address.user,
            "password": self._address.password,
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": answer_seconds,
            "write_timeout": _ANSWER_SECONDS,
            "init_command": _SESSION,
        }

    def prepare(self) -> None:
        """Connect and set how names compare; raises a peewee error, HostError for what is too old.

        Tables take the database's collation when they are made, so it is set before.
        """
        version = self.connection.execute_sql("SELECT VERSION()").fetchone()[0]
        if "MariaDB" not in version or tuple(self.connection.server_version) < _OLDEST:
            raise HostError(
                f"the server of the database {self.shown} is version {version}",
                hint="MariaDB 10.3 or newer is needed",
            )
        collation = self.connection.execute_sql("SELECT @@collation_database").fetchone()[0]
        if collation != _COLLATION:
            self.connection.execute_sql(
                f"ALTER DATABASE `{self._address.name}` CHARACTER SET utf8mb4 COLLATE {_COLLATION}"
            )

    def keep_copy(self, version: int) -> None:
        """Copy each table to `before_<version>_<table>`, unless there are such copies already.

        Those are of an attempt at the same migration that was cut short; the tables may be half
        migrated by now. To go back: drop the tables and rename the copies to what they were.
        """
        tables = [name for name in self.connection.get_tables() if not name.startswith("before_")]
        # Copied last, `meta` says that the others were.
        for table in sorted(tables, key=lambda name: name == "meta"):
            if not self.connection.table_exists(f"before_{version}_meta"):
                self._copy_table(table, f"before_{version}_{table}")

    def _copy_table(self, table: str, copy: str) -> None:
        for statement in (
            f"DROP TABLE IF EXISTS `{copy}`",
            "DROP TABLE IF EXISTS `before_copying`",
            f"CREATE TABLE `before_copying` LIKE `{table}`",
            f"INSERT INTO `before_copying` SELECT * FROM `{table}`",  # noqa: S608
            f"RENAME TABLE `before_copying` TO `{copy}`",
        ):
            self.connection.execute_sql(statement)

    def ready(self) -> None:
        """Connect anew with the patience of a daemon that serves, not of one that migrates."""
        self._hang_up()
        self.connection.init(self._address.name, **self._parameters(_ANSWER_SECONDS))

    def judge(self, error: Exception) -> Verdict:
        """Hang up after anything but a lock; tell a server that is away from one that refuses."""
        chain = list(_chain(error))
        codes = {each.args[0] for each in chain if isinstance(each, PeeweeException) and each.args}
        broken = any(code in _CLIENT_CODES for code in codes)
        if not broken and codes & {_DEADLOCK, _LOCK_WAIT_TIMEOUT}:
            return Verdict.AGAIN if _DEADLOCK in codes else Verdict.REFUSED
        self._hang_up()
        if not broken:
            return Verdict.REFUSED
        # Broken without a wait: most likely the server was started anew since we last asked.
        waited = any(isinstance(each, TimeoutError) for each in chain)
        return Verdict.AWAY if waited or _CAN_NOT_CONNECT & codes else Verdict.AGAIN

    def unsettled(self) -> str | None:
        """Give the mark of a commit that was never answered, once."""
        mark, self.connection.mark = self.connection.mark, None
        return mark

    def was_committed(self, mark: str) -> bool:
        """Look for the mark, waiting for the lock the old transaction may still hold on it."""
        query = "SELECT value FROM meta WHERE name = %s FOR UPDATE"
        row = self.connection.execute_sql(query, (_COMMIT_MARK,)).fetchone()
        return row is not None and row[0] == mark

    def refill(self) -> None:
        """Do nothing: the disk is the server's."""

    def close(self) -> None:
        """Hang up."""
        self._hang_up()

    def _hang_up(self) -> None:
        try:
            self.connection.close()
        except Exception:  # PyMySQL raises its own for a connection it has closed itself
            self.connection.dispose()


def _open_socket(path: str) -> socket.socket:
    """Connect to a server of this host; PyMySQL 1.2 leaks the socket where that fails."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.settimeout(_CONNECT_SECONDS)
        line.connect(path)
    except OSError as error:
        line.close()
        raise pymysql.OperationalError(_NO_SERVER, f"{path}: {error}") from error
    return line


def _claim(connection: "pymysql.Connection[Any]", name: str) -> None:
    """Make this the only daemon that uses the database, for as long as the connection lasts."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT GET_LOCK(%s, %s)", (f"oscloud.{name}"[:64], _CLAIM_SECONDS))
        if cursor.fetchone() != (1,):
            connection.close()
            raise pymysql.OperationalError(_NO_SERVER, f"another oscloudd uses the database {name}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and those behind it: the first one is often behind a ROLLBACK that failed."""
    while error is not None:
        yield error
        error = error.__context__
