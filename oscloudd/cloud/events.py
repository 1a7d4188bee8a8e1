"""Events: what happened, in order, each with a number; kept for a while and read by whoever asks.

They are written in the transaction of the change they tell of, so there is never one without the
other. A reader that comes back with the last number it has seen misses nothing.
"""

import time
from enum import StrEnum
from typing import Any

import msgspec
from peewee import fn

from oscloudd.cloud.changes import Changes
from oscloudd.errors import NotFoundError
from oscloudd.store.database import Database
from oscloudd.store.models import Event, Meta

# A vm that is made and deleted writes about 20.
KEPT_EVENTS = 20_000
_FORGOTTEN = "events_forgotten_up_to"


class EventKind(StrEnum):
    """What sort of thing happened."""

    VM_STATE = "vm_state"  # data: state, reason, wanted_state; state DELETED once it is gone
    JOB = "job"  # data: kind, state, stage, message
    PORT = "port"  # data: port (as in `vm_info`), change ("added" or "deleted")
    DISK = "disk"  # data: change (deleted, resized), size
    NETWORK = "network"  # data: message
    WARNING = "warning"  # data: message


class EventInfo(msgspec.Struct, frozen=True):
    """One event as it is shown; `at` in seconds since 1970."""

    sequence: int
    at: float
    kind: str
    vm: int | None
    job: int | None
    name: str
    data: dict[str, Any]


def insert_event(
    kind: EventKind,
    name: str,
    data: dict[str, Any],
    *,
    vm_id: int | None = None,
    job_id: int | None = None,
) -> None:
    """Write an event, inside the transaction of what it tells of."""
    Event.insert(
        at=time.time(),
        kind=kind,
        vm_id=vm_id,
        job_id=job_id,
        name=name,
        data=msgspec.json.encode(data).decode(),
    ).execute()


class Events:
    """The history; `changes` is announced after each addition."""

    def __init__(self, database: Database, changes: Changes) -> None:
        self._database = database
        self.changes = changes

    async def warn(self, name: str, message: str, *, vm_id: int | None = None) -> None:
        """Write down what an administrator should know."""
        await self._database.run(
            lambda: insert_event(EventKind.WARNING, name, {"message": message}, vm_id=vm_id)
        )
        self.changes.announce()

    async def latest(self) -> int:
        """Give the number of the newest event, 0 when there was none yet."""
        return await self._database.run(lambda: int(Event.select(fn.MAX(Event.id)).scalar() or 0))

    async def read(self, since: int, limit: int) -> list[EventInfo]:
        """Give up to `limit` events after number `since`, oldest first.

        Raises NotFoundError when some of them are no longer kept.
        """

        def read() -> list[tuple[Any, ...]]:
            forgotten = Meta.get_or_none(Meta.name == _FORGOTTEN)
            if forgotten is not None and since < int(forgotten.value):
                raise NotFoundError(
                    f"the events after {since} are no longer kept up to {forgotten.value}",
                    hint=f"watch from {forgotten.value} on, and look at the vms anew",
                    oldest=int(forgotten.value) + 1,
                )
            query = Event.select().where(Event.id > since).order_by(Event.id).limit(limit)
            return list(query.tuples())

        return [
            EventInfo(sequence, at, kind, vm_id, job_id, name, msgspec.json.decode(data))
            for sequence, at, kind, vm_id, job_id, name, data in await self._database.run(read)
        ]

    async def prune(self) -> None:
        """Forget all but the newest."""

        def prune() -> None:
            newest = Event.select(fn.MAX(Event.id)).scalar() or 0
            if newest > KEPT_EVENTS:
                Event.delete().where(Event.id <= newest - KEPT_EVENTS).execute()
                Meta.replace(name=_FORGOTTEN, value=str(newest - KEPT_EVENTS)).execute()

        await self._database.run(prune)
