"""The directory of one running qemu: its sockets and the number of its process.

Owns the names in it. The sockets are bound here and qemu inherits them listening, so connecting
never has to wait for qemu, and qemu itself needs no right to the directory.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oscloudd.errors import HostError

MONITOR = "qmp.sock"
SERIAL = "serial.sock"
CHANNEL = "channel.sock"
PID_FILE = "qemu.pid"


class RunDirectory:
    """Where the sockets of one qemu are; `prepare` makes it, `remove` takes it away."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the directory, empty of what an earlier qemu has left; may be called twice."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_files()

    def remove(self) -> None:
        """Remove the directory and what is ours in it; may be called twice."""
        if self.path.is_dir():
            self._remove_files()
            self.path.rmdir()

    def listen(self, name: str) -> socket.socket:
        """Bind and open a listening socket; the caller closes it."""
        listener = socket.socket(socket.AF_UNIX)
        with self._reachable(name) as address:
            listener.bind(address)
        listener.listen(1)
        return listener

    def connect(self, name: str) -> socket.socket:
        """Give a connection to one of qemu's sockets; the caller closes it. Raises HostError.

        A Unix socket connects at once or not at all, so this does not wait.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(0)
        try:
            with self._reachable(name) as address:
                connection.connect(address)
        except OSError as error:
            connection.close()
            raise _connect_failure(self.path / name, error) from error
        return connection

    def write_pid(self, pid: int) -> None:
        """Leave qemu's process number for people and for a daemon that has lost its database."""
        (self.path / PID_FILE).write_text(f"{pid}\n", encoding="ascii")

    def _remove_files(self) -> None:
        for name in (MONITOR, SERIAL, CHANNEL, PID_FILE):
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def _reachable(self, name: str) -> Iterator[str]:
        # An address holds 108 bytes at most (unix(7)); a path through a descriptor always fits.
        directory = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{directory}/{name}"
        finally:
            os.close(directory)


def _connect_failure(path: Path, error: OSError) -> HostError:
    if isinstance(error, BlockingIOError):
        # A full backlog: qemu serves one client, and somebody is waiting already.
        return HostError(
            f"{path} is taken by another client",
            hint=f"see who holds it: ss -xp | grep {path.name}",
        )
    return HostError(f"qemu can't be reached at {path}: {error.strerror or error}")
