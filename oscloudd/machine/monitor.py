"""A client of qemu's monitor (QMP) on one connected socket.

Owns the socket and the task that reads it. Commands may overlap: answers find their command by id.
Knows the protocol and nothing of what the commands do.
"""

import array
import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from oscloudd.errors import HostError, OperationTimeoutError

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0

# The longest answer is query-qmp-schema's, 150 KB in qemu 7.2; a line beyond this is no monitor.
_LINE_LIMIT_BYTES = 4 << 20

OnEvent = Callable[[str, Mapping[str, Any]], None]


class Monitor:
    """The daemon's one connection to a qemu's monitor; whoever opened it closes it.

    A monitor that is late is not closed: its answer is dropped when it comes, and the next command
    has a chance of its own.
    """

    def __init__(self, connection: socket.socket, on_event: OnEvent) -> None:
        self._socket = connection
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()

    async def open(self, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        """Read the greeting and leave negotiation; raise HostError or OperationTimeoutError."""
        try:
            async with asyncio.timeout(timeout_seconds):
                self._reader, self._writer = await asyncio.open_unix_connection(
                    sock=self._socket, limit=_LINE_LIMIT_BYTES
                )
                greeting = _parse_line(await self._reader.readline())
        except TimeoutError as error:
            raise _no_answer("greeting", timeout_seconds) from error
        except (OSError, ValueError) as error:
            raise _lost() from error
        if "QMP" not in greeting:
            raise HostError("qemu's monitor did not greet as one", output=str(greeting)[:200])
        self._task = asyncio.create_task(self._read(self._reader), name="monitor")
        await self.execute("qmp_capabilities", timeout_seconds=timeout_seconds)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float | None = ANSWER_SECONDS,
        descriptor: int | None = None,
    ) -> Any:
        """Run one command and give what it returns.

        `descriptor` travels with it, for `getfd` and `add-fd`; without `timeout_seconds` the answer
        may take for ever. Raises HostError when qemu refuses
        or the connection is lost, OperationTimeoutError when it does not answer.
        """
        if self._writer is None or self.closed.is_set():
            raise _lost()
        number = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._send(command, arguments, number, descriptor)
                return await answer
        except TimeoutError as error:
            raise _no_answer(command, timeout_seconds) from error
        except OSError as error:
            raise _lost() from error
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        """Close the connection; commands under way fail. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        self._end()

    async def _send(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        number: int,
        descriptor: int | None,
    ) -> None:
        assert self._writer is not None
        request = {"execute": command, "arguments": dict(arguments or {}), "id": number}
        line = msgspec.json.encode(request) + b"\n"
        await self._writer.drain()
        if descriptor is None:
            self._writer.write(line)
            return
        # The descriptor must arrive with the command, not with one still in the buffer.
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
        sent = self._socket.sendmsg([line], [rights])
        if sent < len(line):
            self._writer.write(line[sent:])

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._take(_parse_line(line))
        except OSError:
            return  # how qemu ended is told by its process, not here
        except (ValueError, HostError) as error:
            _log.warning("monitor: %s", error)
        finally:
            self._end()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._on_event(str(message["event"]), message.get("data") or {})
            return
        waiting = self._waiting.get(message.get("id", 0))
        if waiting is None or waiting.done():
            _log.debug("monitor: an answer nobody waits for: %.200r", message)
        elif "return" in message:
            waiting.set_result(message["return"])
        else:
            waiting.set_exception(_refusal(message.get("error") or {}))

    def _end(self) -> None:
        self.closed.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_lost())


def _parse_line(line: bytes) -> dict[str, Any]:
    if not line:
        raise _lost()
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise HostError(
            "qemu's monitor sent what is not its protocol", output=repr(line[:200])
        ) from error


def _refusal(error: Mapping[str, Any]) -> HostError:
    return HostError(f"qemu: {error.get('desc', 'unknown error')}", qemu_class=error.get("class"))


def _lost() -> HostError:
    return HostError("the connection to qemu's monitor is lost")


def _no_answer(command: str, timeout_seconds: float | None) -> OperationTimeoutError:
    return OperationTimeoutError(
        f"qemu's monitor did not answer {command} within {timeout_seconds or 0:g} s",
        hint="the guest is untouched; try again, or stop the vm with force",
        command=command,
    )
