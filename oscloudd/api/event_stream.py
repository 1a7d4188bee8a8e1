"""Events to whoever watches: each read from the database once for all, none left out.

Owns the newest events, encoded, while somebody watches. Who is further behind reads the database:
that is the queue, and there is no other. Who does not read is cut off, with an error that says
from where to go on.
"""

import asyncio
import bisect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from oscloudd.api.connection import Connection
from oscloudd.cloud.events import KEPT_EVENTS, EventInfo, Events
from oscloudd.errors import InvalidArgumentError, UnavailableError

_BATCH = 256
_RECENT_EVENTS = 512
# So many new events while the client has taken nothing. It can still come back and miss none.
_MOST_BEHIND = KEPT_EVENTS // 4
# A burst of events outruns every client for as long as the client is not given a processor.
_BEHIND_SECONDS = 2.0
_log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


class Line(NamedTuple):
    """An event as it is sent."""

    sequence: int
    text: bytes


class EventStream:
    """What `event_watch` does, for every client of one daemon."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._tip: _Tip | None = None

    async def watch(
        self, connection: Connection, since: int | None, *, follow: bool, limit: int
    ) -> dict[str, int]:
        """Send the events after `since`, and give the number up to which none is missing.

        With `follow` until the client has hung up, else up to `limit` of those there are. Raises
        InvalidArgumentError for a number not reached yet, NotFoundError when some are no longer
        kept, UnavailableError when the client is cut off.
        """
        latest = await self._events.latest()
        position = latest if since is None else since
        if position > latest:
            raise InvalidArgumentError(
                f"since {position} is yet to come: the latest event is {latest}",
                hint="the database is another than before? look at the vms, then watch from "
                f"{latest} on",
                parameter="since",
                latest=latest,
            )
        if follow:
            with self._following(latest) as tip:
                position = await self._follow(tip, connection, position)
        else:
            position = await self._replay(connection, position, limit)
        return {"latest": position}

    async def _replay(self, connection: Connection, position: int, limit: int) -> int:
        while limit > 0:
            lines = await self._read(position, min(limit, _BATCH))
            if not lines:
                break
            position = _send(connection, lines)
            limit -= len(lines)
            await connection.flush()
        return position

    async def _follow(self, tip: "_Tip", connection: Connection, position: int) -> int:
        while not connection.gone.done():
            news = tip.news
            lines = tip.after(position, _BATCH)
            if lines is None:
                lines = await self._read(position, _BATCH)
            if lines:
                position = _send(connection, lines)
                await _make_way(tip, connection, position)
            else:
                await asyncio.wait(
                    {news, tip.task, connection.gone}, return_when=asyncio.FIRST_COMPLETED
                )
                tip.check()
        return position

    async def _read(self, position: int, limit: int) -> list[Line]:
        return [_encode(event) for event in await self._events.read(position, limit)]

    @contextmanager
    def _following(self, latest: int) -> Iterator["_Tip"]:
        tip = self._tip
        if tip is None or tip.task.done():
            tip = self._tip = _Tip(self._events, latest)
        tip.watchers += 1
        try:
            yield tip
        finally:
            tip.watchers -= 1
            if tip.watchers == 0:
                tip.task.cancel()
                if self._tip is tip:
                    self._tip = None


class _Tip:
    """The newest events, read as they come, for as long as anybody follows."""

    def __init__(self, events: Events, latest: int) -> None:
        self._events = events
        self._recent: list[Line] = []
        self._complete_after = latest
        self.latest = latest
        self.watchers = 0
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._run(), name="event tip")

    def after(self, position: int, limit: int) -> list[Line] | None:
        """Give what came after, or None where that reaches further back than is kept here."""
        if position < self._complete_after:
            return None
        start = bisect.bisect_right(self._recent, position, key=lambda line: line.sequence)
        return self._recent[start : start + limit]

    def check(self) -> None:
        """Raise what has ended the reading."""
        if self.task.done():
            self.task.result()

    async def _run(self) -> None:
        while True:
            # Begun before the look, so that what is announced meanwhile is looked for again.
            change = asyncio.create_task(self._events.changes.next_change())
            try:
                full = True
                while full:
                    lines = [
                        _encode(event) for event in await self._events.read(self.latest, _BATCH)
                    ]
                    full = len(lines) == _BATCH
                    if lines:
                        self._take(lines)
                await change
            finally:
                change.cancel()

    def _take(self, lines: list[Line]) -> None:
        self._recent += lines
        self.latest = lines[-1].sequence
        if forgotten := self._recent[:-_RECENT_EVENTS]:
            self._complete_after = forgotten[-1].sequence
            del self._recent[:-_RECENT_EVENTS]
        self.news.set_result(None)
        self.news = asyncio.get_running_loop().create_future()


def _encode(event: EventInfo) -> Line:
    notification = {"jsonrpc": "2.0", "method": "event", "params": event}
    return Line(event.sequence, _encoder.encode(notification))


def _send(connection: Connection, lines: list[Line]) -> int:
    for line in lines:
        connection.write_line(line.text)
    return lines[-1].sequence


async def _make_way(tip: _Tip, connection: Connection, position: int) -> None:
    """Wait until the client has taken nearly everything, or cut it off."""
    loop = asyncio.get_running_loop()
    left, latest, since = connection.unsent_bytes, tip.latest, loop.time()
    while not connection.writable.done():
        is_far_behind = tip.latest - latest >= _MOST_BEHIND
        seconds = _BEHIND_SECONDS if is_far_behind else connection.limits.stalled_seconds
        remaining = since + seconds - loop.time()
        if remaining <= 0:
            connection.is_last_answer = True
            _log.info("a client that watches events is cut off after event %d", position)
            raise UnavailableError(
                f"cut off after event {position}: they are not read as fast as they happen",
                hint=f"watch from {position} on: nothing is lost yet",
                since=position,
            )
        await asyncio.wait(
            {connection.writable, tip.news, tip.task},
            timeout=remaining,
            return_when=asyncio.FIRST_COMPLETED,
        )
        tip.check()
        if connection.unsent_bytes < left:
            left, latest, since = connection.unsent_bytes, tip.latest, loop.time()
