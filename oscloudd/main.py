"""The daemon: reads its configuration, puts the rooms together, starts and stops them in order."""

import argparse
import asyncio
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from oscloudd import __version__
from oscloudd.api.dispatch import Dispatcher
from oscloudd.api.server import Server, bind_socket
from oscloudd.cloud.cloud import Cloud
from oscloudd.config import Config, load_config
from oscloudd.errors import CloudError, HostError, UnavailableError
from oscloudd.host.activation import take_listener
from oscloudd.host.journal import choose_formatter
from oscloudd.host.notify import Notifier
from oscloudd.store.database import Database

_log = logging.getLogger("oscloudd")

# A daemon killed between fork and exec of a command leaves a child with its lock for a moment.
_LOCK_SECONDS = 2.0
_LOCK_RETRY_SECONDS = 0.05

# 4,000 connections and some 5,000 vms.
_MAX_DESCRIPTORS = 65536


def main() -> None:
    """Run the daemon until SIGTERM or SIGINT; exit with the code of the error that stopped it."""
    arguments = _parse_arguments()
    handler = logging.StreamHandler()
    handler.setFormatter(choose_formatter(sys.stderr.fileno()))
    level = logging.DEBUG if arguments.debug else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])
    _raise_descriptor_limit()
    try:
        config = load_config(arguments.config)
        with _Lock(config.runtime_path):
            asyncio.run(_serve(config, Notifier(), take_listener()))
    except OSError as error:
        _log.error("oscloudd can't go on, and leaves its vms as they are: %s", error)
        _log.debug("where it happened", exc_info=True)
        sys.exit(HostError.exit_status)
    except CloudError as error:
        _log.error("%s%s", error.message, f" ({error.hint})" if error.hint else "")
        sys.exit(error.exit_status)


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as we may have, within reason.

    A service gets a soft limit of 1024 for the sake of select(2), which neither we nor qemu use,
    and systemd a hard one of 524288 or more. Children inherit it, and some programs close every
    descriptor there might be, one by one: hence the bound.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="oscloudd", description=__doc__)
    parser.add_argument("--config", type=Path, help="configuration file (or OSCLOUD_CONFIG)")
    parser.add_argument("--debug", action="store_true", help="log every command and connection")
    parser.add_argument("--version", action="version", version=f"oscloudd {__version__}")
    return parser.parse_args()


class _Lock:
    """Makes this the only daemon of its runtime directory; the kernel frees it at our death."""

    def __init__(self, runtime_path: Path) -> None:
        runtime_path.mkdir(parents=True, exist_ok=True)
        self._path = runtime_path / "oscloudd.lock"

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_SECONDS
        while not self._try_lock():
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"another oscloudd has {self._path}",
                    hint="it is left alone; stop it first, or give this one a runtime_dir of its "
                    "own",
                )
            time.sleep(_LOCK_RETRY_SECONDS)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_exception: object) -> None:
        os.close(self._fd)


async def _serve(config: Config, notifier: Notifier, passed: socket.socket | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for path in (config.state_path, config.runtime_path / "vms", config.log_path):
        path.mkdir(parents=True, exist_ok=True)
    database = Database(config.state_path / "oscloud.db", config.database)
    await database.open()
    cloud = Cloud(config, database)
    server = Server(Dispatcher(cloud))
    watchdog = asyncio.create_task(_watchdog(notifier))
    try:
        # Bound first: where that fails, no vm has been touched.
        listener = passed or bind_socket(config.socket_path, config.socket_group)
        await cloud.prepare()
        await server.start(listener)
        cloud.start()
        notifier.ready()
        notifier.status(f"serving {config.socket_path}")
        _log.info("oscloudd %s serves %s", __version__, config.socket_path)
        await stop.wait()
    finally:
        notifier.stopping()
        _log.info("stopping; vms run on")
        watchdog.cancel()
        await server.stop()
        if passed is None:  # systemd's own stays, and clients wait at it for the next daemon
            config.socket_path.unlink(missing_ok=True)
        await cloud.stop()
        await database.close()


async def _watchdog(notifier: Notifier) -> None:
    """Show systemd that the event loop still turns."""
    if notifier.watchdog_interval_seconds is not None:
        while True:
            notifier.watchdog()
            await asyncio.sleep(notifier.watchdog_interval_seconds)
