"""The pool: so many spares of the warm image used last, kept for the vms to come.

Owns every spare from its making until a vm has it. Decides when one is made and when they go; what
one is, and how it is made, is in `spare`.
"""

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress

from oscloudd.cloud.memory import most_at_once_bytes
from oscloudd.cloud.spare import Spare, SpareMaker
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.warm_files import WarmImage
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.config import Config
from oscloudd.errors import CloudError
from oscloudd.host.resources import memory_available_bytes, memory_total_bytes

_log = logging.getLogger(__name__)

# How often the host's memory is looked at while there are spares, or would be.
_LOOK_SECONDS = 2.0
# None is made for so long after they had to make room.
_ROOM_SECONDS = 10.0
# After one that failed or died, doubled for each that follows before one has been taken.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0


class WarmPool:
    """Spares, those that a new vm has claimed among them; `run` keeps them, `close` ends them."""

    def __init__(
        self, config: Config, warm_images: WarmImages, maker: SpareMaker, slots: StartSlots
    ) -> None:
        self._size = 0 if config.warm.mode == "off" else config.warm.pool
        self._min_free_mem = config.warm.pool_min_free_mem
        self._overcommit = config.limits.overcommit
        self._warm_images = warm_images
        self._maker = maker
        self._slots = slots
        self._ready: list[Spare] = []  # the oldest first
        self._claimed: dict[str, Spare] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._making: str | None = None  # the name of the warm image one is being made of
        self._not_before = 0.0
        self._failures = 0
        self._stirred = asyncio.Event()

    def claim(self, image: WarmImage) -> Spare | None:
        """Give a spare of this image that nobody else is given, or None.

        Whoever has it gives it back, has it `taken`, or ends it with `end_claimed`.
        """
        self.stir()
        for spare in self._ready:
            if spare.image == image.name and spare.is_well:
                self._ready.remove(spare)
                self._claimed[spare.uuid] = spare
                return spare
        return None

    def find_claimed(self, uuid: str | None) -> Spare | None:
        """Give the spare with this uuid that was claimed; None where an earlier daemon did."""
        return None if uuid is None else self._claimed.get(uuid)

    def give_back(self, spare: Spare) -> None:
        """A claimed spare was not taken after all, and the next one may claim it."""
        del self._claimed[spare.uuid]
        self._ready.insert(0, spare)
        self.stir()

    def taken(self, spare: Spare) -> None:
        """A claimed spare is a vm's now."""
        del self._claimed[spare.uuid]
        self._failures = 0
        self.stir()

    async def end_claimed(self, uuid: str | None) -> None:
        """End a claimed spare if there is one of this uuid: its vm goes on without it."""
        if (spare := self.find_claimed(uuid)) is not None:
            await self._end([spare])
            self._claimed.pop(spare.uuid, None)
            self.stir()

    async def forget(self, images: set[str]) -> None:
        """End the spares that stand on these warm images: their template is gone."""
        await self._drop([spare for spare in self._ready if spare.image in images])

    async def make_room(self, wanted_bytes: int) -> None:
        """End what nobody has claimed if else too little memory is available for a vm."""
        if self._ready and wanted_bytes > most_at_once_bytes(self._overcommit):
            await self._yield_memory("a vm needs their memory")

    def images(self) -> set[str]:
        """Name the warm images that spares stand on, those being made included."""
        names = {spare.image for spare in (*self._ready, *self._claimed.values())}
        return names | ({self._making} if self._making else set())

    def count_ready(self) -> Counter[str]:
        """Count the spares of each warm image that a new vm can have."""
        return Counter(spare.image for spare in self._ready if spare.is_well)

    def stir(self) -> None:
        """Something has happened that the pool may have to follow."""
        self._stirred.set()

    async def run(self) -> None:
        """Keep the spares as they should be, until cancelled."""
        while self._size > 0:
            self._stirred.clear()
            try:
                pause_seconds = await self.tend()
            except Exception:
                _log.exception("spare clones")
                self._put_off()
                pause_seconds = _LOOK_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._stirred.wait()

    async def close(self) -> None:
        """End all spares, those of vms that have not come to take them included."""
        await self._end([*self._ready, *self._claimed.values()])
        await asyncio.gather(*self._ending.values())

    async def tend(self) -> float | None:
        """Do one thing that is due; give after how many seconds to look again, None for never."""
        await self._end_what_must_go()
        image = await self._warm_images.find_last_used()
        if image is None:
            await self._drop(list(self._ready))
            return None
        if self.count_ready()[image.name] >= self._size:
            return _LOOK_SECONDS
        if (wait_seconds := self._seconds_until_next()) > 0:
            return min(wait_seconds, _LOOK_SECONDS) if self._ready else wait_seconds
        if await self._slots.wait_idle(_LOOK_SECONDS):
            await self._replace(image)
        return 0

    async def _end_what_must_go(self) -> None:
        for spare in [spare for spare in self._ready if not spare.is_well]:
            _log.warning("a spare clone, process %d, has ended", spare.qemu.identity.pid)
            self._put_off()
            await self._drop([spare])
        if self._ready and self._free_memory() < self._min_free_mem:
            await self._yield_memory("little memory is available")

    def _seconds_until_next(self) -> float:
        """Give how long to wait at least before one may be made."""
        if self._claimed:  # what goes on with it tells
            return _LOOK_SECONDS
        if self._free_memory() < 2 * self._min_free_mem:
            return _ROOM_SECONDS
        return self._not_before - time.monotonic()

    async def _replace(self, image: WarmImage) -> None:
        """Make a spare of this image, and room for it among the others."""
        others = [spare for spare in self._ready if spare.image != image.name]
        await self._drop(others[: max(0, len(self._ready) + 1 - self._size)])
        self._making = image.name
        try:
            spare = await self._maker.make(image)
        except (CloudError, OSError) as error:
            self._put_off()
            _log.warning("no spare clone of %s: %s", image.manifest.template, error)
            return
        finally:
            self._making = None
        spare.qemu.exited.add_done_callback(lambda _ended: self.stir())
        self._ready.append(spare)
        _log.info("a spare clone of %s: process %d", image.name, spare.qemu.identity.pid)

    def _put_off(self) -> None:
        """Make none for a while, longer each time, so that what always fails is not always done."""
        pause_seconds = min(_FIRST_PAUSE_SECONDS * 2**self._failures, _LONGEST_PAUSE_SECONDS)
        self._failures = min(self._failures + 1, 16)
        self._not_before = time.monotonic() + pause_seconds

    async def _yield_memory(self, why: str) -> None:
        _log.info("%d spare clones are ended: %s", len(self._ready), why)
        self._not_before = max(self._not_before, time.monotonic() + _ROOM_SECONDS)
        await self._drop(list(self._ready))

    async def _drop(self, spares: list[Spare]) -> None:
        # First of all nobody may claim them.
        self._ready = [spare for spare in self._ready if spare not in spares]
        await self._end(spares)

    async def _end(self, spares: list[Spare]) -> None:
        """End these spares, each once; one that has been begun is ended even if nobody waits."""
        for spare in spares:
            if spare.uuid not in self._ending:
                task = asyncio.create_task(self._end_one(spare), name=f"end of spare {spare.uuid}")
                self._ending[spare.uuid] = task
        tasks = [self._ending[spare.uuid] for spare in spares]
        await asyncio.shield(asyncio.gather(*tasks))

    async def _end_one(self, spare: Spare) -> None:
        try:
            await spare.end()
        except (CloudError, OSError) as error:
            _log.warning("spare clone, process %d: %s", spare.qemu.identity.pid, error)
        finally:
            del self._ending[spare.uuid]

    def _free_memory(self) -> float:
        return memory_available_bytes() / memory_total_bytes()
