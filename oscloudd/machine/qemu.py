"""One running qemu: its process, monitor, serial console and channel, from launch to the end.

Owns the pidfd and the connections. A qemu outlives this object: `close` lets go of it, and
`adopt` takes hold of it again. Which vm it is, and what becomes of it, is for others to know.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from oscloudd.errors import HostError, NotFoundError, OperationTimeoutError
from oscloudd.host.processes import ProcessHandle, ProcessIdentity, open_process, peer_pid
from oscloudd.machine.console import SerialConsole
from oscloudd.machine.console_log import read_last_lines
from oscloudd.machine.ending import Ending, describe_ending
from oscloudd.machine.monitor import ANSWER_SECONDS, Monitor, OnEvent
from oscloudd.machine.run_directory import CHANNEL, MONITOR, SERIAL, RunDirectory

_log = logging.getLogger(__name__)

Heard = asyncio.Queue[Mapping[str, Any] | None]

QUIT_SECONDS = 5.0
KILL_SECONDS = 10.0

# qemu closes the monitor as it ends; its last event is read before the ending is told.
_LAST_EVENT_SECONDS = 1.0


class ForeignMachineError(HostError):
    """The sockets of this run directory belong to another process or another machine."""


class Qemu:
    """A qemu and the daemon's holds on it; whoever launched or adopted it closes it.

    `exited` comes to its result when the process has ended, whoever ended it; it is cancelled by
    `close`. Without a usable monitor (`is_connected` false) the process can be watched and killed.
    """

    def __init__(
        self,
        process: ProcessHandle,
        directory: RunDirectory,
        uuid: str,
        on_event: OnEvent,
        *,
        history: bytes = b"",
        log: Path | None = None,
    ) -> None:
        self._process = process
        self._directory = directory
        self._uuid = uuid
        self._on_event = on_event
        self._history = history
        self._log = log
        self._monitor: Monitor | None = None
        self._console: SerialConsole | None = None
        self._channel: socket.socket | None = None
        self._cause: str | None = None
        self._was_killed = False
        self._listeners: list[tuple[str, Heard]] = []
        self.exited: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(), name=f"qemu {process.identity.pid}")

    @property
    def identity(self) -> ProcessIdentity:
        """The process, in the form that survives a restart of the daemon."""
        return self._process.identity

    @property
    def is_connected(self) -> bool:
        """Whether the monitor can be asked."""
        return self._monitor is not None and not self._monitor.closed.is_set()

    @property
    def monitor(self) -> Monitor:
        """The monitor; raises HostError when there is no connection."""
        if self._monitor is None:
            raise HostError("there is no connection to qemu's monitor")
        return self._monitor

    @property
    def console(self) -> SerialConsole:
        """The serial console; raises HostError when there is no connection."""
        if self._console is None:
            raise HostError("there is no connection to the guest's serial line")
        return self._console

    def open_channel(self) -> socket.socket:
        """Give a blocking duplicate of the connection to the guest's channel; the caller closes it.

        Shutting it down ends the connection itself. Raises HostError when there is none, as with a
        qemu that was started before vms had one.
        """
        if self._channel is None:
            raise HostError("there is no connection to the guest's channel")
        duplicate = self._channel.dup()
        duplicate.settimeout(None)
        return duplicate

    def hand_over(self, path: Path, *, log: Path, on_event: OnEvent) -> None:
        """Belong to somebody else: the run directory and the log have moved there already.

        The process works on in its directory, and its sockets in it stay bound: both follow the
        directory itself, not its name.
        """
        self._directory = RunDirectory(path)
        self._log = log
        self._on_event = on_event

    def read_log(self) -> str:
        """Give the last lines that this qemu, or one before it, has printed; "" when unknown."""
        return "" if self._log is None else read_last_lines(self._log)

    async def connect(self, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        """Connect to what is not connected yet; may be called again after a failure.

        Raises HostError (ForeignMachineError among them) or OperationTimeoutError.
        """
        # The serial line first: the monitor's answers then come from a qemu that has accepted it,
        # and nothing the guest prints after `resume` is missed.
        if self._console is None or self._console.closed.is_set():
            console = SerialConsole(self._directory.connect(SERIAL), history=self._history)
            await console.open()
            self._console = console
        if self._channel is None:
            with suppress(HostError):
                # A guest's port is open for it as long as somebody is at this end.
                self._channel = self._directory.connect(CHANNEL)
        if not self.is_connected:
            await self._connect_monitor(timeout_seconds)

    @contextmanager
    def hear(self, event: str) -> Iterator[Heard]:
        """Collect the data of one kind of event while the context lasts.

        None is the end: the monitor's connection is lost and no more will come. Raises HostError
        when there is no connection.
        """
        heard: Heard = asyncio.Queue()
        listener = (event, heard)
        ending = asyncio.create_task(_tell_end(self.monitor, heard), name=f"end of {event}")
        self._listeners.append(listener)
        try:
            yield heard
        finally:
            ending.cancel()
            self._listeners.remove(listener)

    async def status(self, *, timeout_seconds: float | None = ANSWER_SECONDS) -> str:
        """Give qemu's own run state: `running`, `paused`, `prelaunch`, `io-error`, …"""
        answer = await self.monitor.execute("query-status", timeout_seconds=timeout_seconds)
        return str(answer["status"])

    async def resume(self) -> None:
        """Let the guest run: for the first time after launch, or after `pause`."""
        await self.monitor.execute("cont")

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self.monitor.execute("stop")

    async def power_button(self) -> None:
        """Press the ACPI power button; what comes of it is the guest's affair."""
        await self.monitor.execute("system_powerdown")

    async def reset(self) -> None:
        """Press the reset button."""
        await self.monitor.execute("system_reset")

    async def stop(self, *, timeout_seconds: float = 30.0, force: bool = False) -> Ending:
        """End the machine: power button and `timeout_seconds`, then `quit`, then SIGKILL.

        With `force` the first step is left out; without a monitor only the last is there. Raises
        OperationTimeoutError if even SIGKILL did not end the process, which a host with a dead
        disk can do.
        """
        if self.exited.done():
            return self.exited.result()
        ladder = [(self._quit, QUIT_SECONDS)]
        if not force:
            ladder.insert(0, (self._ask_guest, timeout_seconds))
        if not self.is_connected:
            ladder.clear()
        for step, limit_seconds in (*ladder, (self._kill, KILL_SECONDS)):
            # A step whose answer got lost may have worked: qemu writes its disks out as it quits.
            with suppress(HostError, OperationTimeoutError, NotFoundError):
                await step()
            await asyncio.wait([self.exited], timeout=limit_seconds)
            if self.exited.done():
                return self.exited.result()
            _log.warning(
                "qemu %d did not end after %s", self.identity.pid, step.__name__.strip("_")
            )
        raise OperationTimeoutError(
            f"process {self.identity.pid} has not ended {KILL_SECONDS:g} s after SIGKILL",
            pid=self.identity.pid,
        )

    async def close(self) -> None:
        """Let go of qemu, which runs on if it runs. May be called twice."""
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        self.exited.cancel()
        if self._monitor is not None:
            await self._monitor.close()
        if self._console is not None:
            await self._console.close()
        if self._channel is not None:
            self._channel.close()
        self._process.close()

    async def _connect_monitor(self, timeout_seconds: float) -> None:
        connection = self._directory.connect(MONITOR)
        monitor = Monitor(connection, self._take_event)
        try:
            self._check_peer(peer_pid(connection).pid)
            await monitor.open(timeout_seconds=timeout_seconds)
            await self._check_uuid(monitor, timeout_seconds)
        except BaseException:
            await monitor.close()
            raise
        self._monitor = monitor

    def _check_peer(self, pid: int) -> None:
        # The kernel names whoever called listen() last. Before a new qemu does, that is us.
        if pid not in (self.identity.pid, os.getpid()):
            raise ForeignMachineError(
                f"the monitor belongs to process {pid}, not {self.identity.pid}"
            )

    async def _check_uuid(self, monitor: Monitor, timeout_seconds: float) -> None:
        answer = await monitor.execute("query-uuid", timeout_seconds=timeout_seconds)
        if answer.get("UUID") != self._uuid:
            raise ForeignMachineError(f"the machine is {answer.get('UUID')}, not {self._uuid}")

    async def _ask_guest(self) -> None:
        if await self.status() in ("paused", "postmigrate"):
            await self.resume()  # a stopped guest can't see its power button
        await self.power_button()

    async def _quit(self) -> None:
        await self.monitor.execute("quit", timeout_seconds=QUIT_SECONDS)

    async def _kill(self) -> None:
        self._was_killed = True
        self._process.send_signal(signal.SIGKILL)

    def _take_event(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._cause = str(data.get("reason"))
        for event, heard in self._listeners:
            if event == name:
                heard.put_nowait(data)
        self._on_event(name, data)

    async def _watch(self) -> None:
        status = await self._process.wait_exit(None)
        if self._monitor is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_EVENT_SECONDS):
                    await self._monitor.closed.wait()
        ending = describe_ending(self._cause, status, was_killed=self._was_killed)
        if not self.exited.done():
            self.exited.set_result(ending)


async def _tell_end(monitor: Monitor, heard: Heard) -> None:
    await monitor.closed.wait()
    heard.put_nowait(None)


async def adopt(
    path: Path,
    identity: ProcessIdentity,
    uuid: str,
    on_event: OnEvent,
    *,
    history: bytes = b"",
    timeout_seconds: float = ANSWER_SECONDS,
) -> Qemu:
    """Take hold of a qemu started by an earlier daemon.

    `path` is its run directory, `history` the end of its console log. A monitor that does not
    answer is no reason to fail: the machine comes back with `is_connected` false, to be connected
    later. Raises NotFoundError when the process is gone, ForeignMachineError when the sockets are
    another's.
    """
    qemu = Qemu(open_process(identity), RunDirectory(path), uuid, on_event, history=history)
    try:
        await qemu.connect(timeout_seconds=timeout_seconds)
    except (HostError, OperationTimeoutError) as error:
        if isinstance(error, ForeignMachineError):
            await qemu.close()
            raise
        _log.warning("qemu %d: %s", identity.pid, error)
    except BaseException:
        await qemu.close()
        raise
    return qemu
