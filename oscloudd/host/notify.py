"""Telling systemd how we are: ready, status, stopping, alive (sd_notify(3), by way of sdnotify).

Owns the notification socket. Without systemd every call does nothing.
"""

import logging
import os

import sdnotify

_log = logging.getLogger(__name__)

_SOCKET, _WATCHDOG_USEC, _WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"


class Notifier:
    """The line to systemd, opened at construction; lives as long as the daemon."""

    def __init__(self) -> None:
        self._systemd = _connect()
        self.watchdog_interval_seconds = _read_watchdog_interval()
        # Children must not inherit them: a qemu could speak to systemd in our name.
        for name in (_SOCKET, _WATCHDOG_USEC, _WATCHDOG_PID):
            os.environ.pop(name, None)

    def ready(self) -> None:
        """Say that requests are served."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Say in one line what is going on, for `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Say that we are alive; due every `watchdog_interval_seconds`, where that is not None."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if self._systemd is None:
            return
        try:
            # sdnotify encodes as latin-1 and raises for anything beyond it.
            self._systemd.notify(state.encode("latin-1", "replace").decode("latin-1"))
        except OSError as error:
            _log.warning("systemd was not told %r: %s", state, error)
            if self.watchdog_interval_seconds is None:
                # Whoever listened was waiting for READY and has gone; one line of log is enough.
                self._systemd.socket.close()
                self._systemd = None


def _connect() -> sdnotify.SystemdNotifier | None:
    if not os.environ.get(_SOCKET):
        return None
    try:
        # Without debug it keeps its errors to itself.
        return sdnotify.SystemdNotifier(debug=True)
    except OSError as error:
        _log.warning("systemd's socket %s can't be reached: %s", os.environ[_SOCKET], error)
        return None


def _read_watchdog_interval() -> float | None:
    """Give half of what systemd allows between signs of life, as sd_watchdog_enabled(3) advises."""
    limit = os.environ.get(_WATCHDOG_USEC, "")
    pid = os.environ.get(_WATCHDOG_PID, str(os.getpid()))
    if not limit.isdigit() or int(limit) == 0 or pid != str(os.getpid()):
        return None
    return int(limit) / 2_000_000
