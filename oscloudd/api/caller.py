"""One request's surroundings: who calls, where progress goes, what follows the answer."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from oscloudd.api.connection import Connection
from oscloudd.api.event_stream import EventStream
from oscloudd.cloud.jobs import Progress
from oscloudd.errors import UnavailableError
from oscloudd.host.processes import PeerCredentials
from oscloudd.machine.console import Attachment

T = TypeVar("T")
_encoder = msgspec.json.Encoder()


@dataclass
class Caller:
    """Who is calling, as the kernel recorded it, and how to reach them before the answer.

    `attachment` is set by `vm_console`: once answered, the connection carries that serial line.
    """

    credentials: PeerCredentials
    connection: Connection
    event_stream: EventStream
    attachment: Attachment | None = None

    def on_progress(self, progress: Progress) -> None:
        """Tell how it goes."""
        notification = {"jsonrpc": "2.0", "method": "progress", "params": progress}
        self.connection.notify(_encoder.encode(notification))

    async def send(self, piece: bytes) -> None:
        """Send one piece of what was asked for, and wait until nearly all of it is taken.

        A line with its size announces each piece, so that progress, an error or the answer can come
        between any two. Raises UnavailableError when the client is gone, or takes nothing for as
        long as a connection may.
        """
        self.connection.write_piece(piece)
        try:
            await self.connection.flush()
        except ConnectionError as error:
            raise UnavailableError("the client has hung up, or does not read") from error

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what is of no use to anybody else, for as long as the client is there."""
        task = asyncio.create_task(work)
        either: set[asyncio.Future[Any]] = {task, self.connection.gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        raise UnavailableError("the client has hung up")
