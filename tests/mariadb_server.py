"""One real mariadbd for the tests, on a socket in a directory of its own.

Owns the process and the directory; `close()` ends it by pid. It is not on the network, asks root
for no password, and does not wait for the disk: nothing in it has to survive.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pymysql

LIMIT_SECONDS = 90.0
_MEMORY = "/dev/shm"
_MEMORY_BYTES = 1 << 30
_numbers = itertools.count(1)

_INSTALL = (
    "--skip-test-db",
    "--skip-name-resolve",
    "--auth-root-authentication-method=normal",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=4M",
)
_SERVE = (
    "--skip-networking",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--performance-schema=off",
    "--innodb-buffer-pool-size=16M",
    "--innodb-log-file-size=4M",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-flush-method=nosync",
    "--key-buffer-size=1M",
    "--aria-pagecache-buffer-size=1M",
)


def is_installed() -> bool:
    return shutil.which("mariadbd") is not None and shutil.which("mariadb-install-db") is not None


class MariaDb:
    """A server that can be stopped, killed and started again on the same data."""

    def __init__(self) -> None:
        # In memory where there is that much of it: making a table waits for the disk many times.
        directory = _MEMORY if shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES else None
        self.root = Path(tempfile.mkdtemp(prefix="oscloud-mariadb-", dir=directory))
        self.socket_path = self.root / "mariadb.sock"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._run("mariadb-install-db", *_INSTALL)
            self.start()
        except BaseException:
            self.close()
            raise

    def _arguments(self) -> list[str]:
        # Debian's files of options are for a server of the host.
        user = pwd.getpwuid(os.geteuid()).pw_name
        return ["--no-defaults", f"--datadir={self.root / 'data'}", f"--user={user}"]

    def _run(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [program, *self._arguments(), *options],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        assert self._process is None
        command = ["mariadbd", *self._arguments(), f"--socket={self.socket_path}", *_SERVE]
        with (self.root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.root
            )
        end = time.monotonic() + LIMIT_SECONDS
        while not self._answers():
            log_text = (self.root / "server.log").read_text()[-3000:]
            assert self._process.poll() is None, f"mariadbd died:\n{log_text}"
            assert time.monotonic() < end, f"mariadbd does not answer:\n{log_text}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        # PyMySQL leaks a socket that it can't connect, so it is not the one to find out.
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as line:
            if line.connect_ex(str(self.socket_path)) != 0:
                return False
        return self.query("SELECT 1") == [(1,)]

    def send_signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the server by signal and wait for it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(number)
        try:
            self._process.wait(LIMIT_SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process = None

    def query(
        self, statement: str, values: tuple[object, ...] = (), *, database: str | None = None
    ) -> list[tuple[Any, ...]]:
        connection = pymysql.connect(
            user="root",
            unix_socket=str(self.socket_path),
            database=database,
            autocommit=True,
            connect_timeout=int(LIMIT_SECONDS),
            read_timeout=LIMIT_SECONDS,
        )
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall())

    def make_database(self) -> str:
        """Make an empty database, with a collation that is not ours, and give its name."""
        name = f"oscloud_{os.getpid()}_{next(_numbers)}"
        self.query(f"CREATE DATABASE {name} CHARACTER SET latin1")
        return name

    def drop_database(self, name: str) -> None:
        self.query(f"DROP DATABASE {name}")

    def url(self, name: str) -> str:
        return f"mysql://root@localhost/{name}?unix_socket={self.socket_path}"

    def close(self) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)
        shutil.rmtree(self.root)
