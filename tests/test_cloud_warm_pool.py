"""When spares are made and when they go: what the pool decides, with spares of no process."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from oscloudd.cloud import warm_pool as module
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.warm_files import MANIFEST, Manifest, WarmImage, read_warm
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.cloud.warm_pool import WarmPool
from oscloudd.config import Config, LimitsConfig, WarmConfig, load_config
from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.store.database import Database

SIZE = 2
TOTAL_BYTES = 100
MANIFEST_OF_NOTHING = Manifest("key", "tiny", 0, 1, 0, 0.0, "", 0, "", "")


class Qemu:
    """What the pool asks of a spare's qemu."""

    def __init__(self, pid: int) -> None:
        self.identity = self
        self.pid = pid
        self.exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class Spare:
    """A spare that ends when it is told to."""

    uuid: str
    image: str
    qemu: Qemu
    is_well: bool = True
    is_ended: bool = False

    async def end(self) -> None:
        assert not self.is_ended
        self.is_ended, self.is_well = True, False


class Scene:
    """A pool of two and what it sees of the world."""

    def __init__(self, root: Path, mode: Any = "auto") -> None:
        config = Config(
            warm=WarmConfig(mode=mode, pool=SIZE, pool_min_free_mem=0.1),
            limits=LimitsConfig(overcommit=1.0),
        )
        self.slots = StartSlots(1)
        self.pool = WarmPool(config, cast("Any", self), cast("Any", self), self.slots)
        self.root = root
        self.last_used: str | None = "old"
        self.made: list[Spare] = []
        self.fails = False
        self.now = 1000.0
        self.available_bytes = 90

    # As WarmImages and as SpareMaker

    async def find_last_used(self) -> WarmImage | None:
        return None if self.last_used is None else self.image(self.last_used)

    async def make(self, image: WarmImage) -> Spare:
        if self.fails:
            raise HostError("no")
        assert len(self.there()) < SIZE
        self.made.append(Spare(str(len(self.made)), image.name, Qemu(len(self.made))))
        return self.made[-1]

    # For tests

    def image(self, name: str) -> WarmImage:
        return WarmImage(self.root / name, MANIFEST_OF_NOTHING)

    def there(self) -> list[str]:
        return [spare.image for spare in self.made if not spare.is_ended]

    async def fill(self) -> None:
        for _ in range(SIZE):
            assert await self.pool.tend() == 0
        assert len(self.there()) == SIZE


Story = Callable[[Scene], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    async def whole(story: Story) -> None:
        scene = Scene(tmp_path)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: scene.now))
        monkeypatch.setattr(module, "memory_total_bytes", lambda: TOTAL_BYTES)
        monkeypatch.setattr(module, "memory_available_bytes", lambda: scene.available_bytes)
        monkeypatch.setattr(module, "most_at_once_bytes", lambda _: scene.available_bytes)
        await story(scene)
        await scene.pool.close()
        assert scene.there() == []

    return lambda story: asyncio.run(whole(story))


def test_so_many_are_made_and_no_more(play: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.fill()
        assert await scene.pool.tend() == 2.0
        assert scene.pool.count_ready() == {"old": SIZE}
        assert scene.pool.images() == {"old"}
        scene.last_used = None  # it was removed
        assert await scene.pool.tend() is None
        assert scene.there() == []

    play(story)


def test_those_of_a_former_image_go_as_others_are_made(play: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.fill()
        scene.last_used = "new"
        assert scene.pool.claim(scene.image("new")) is None
        seen = []
        for _ in range(SIZE):
            assert await scene.pool.tend() == 0
            seen.append(scene.there())
        assert seen == [["old", "new"], ["new", "new"]]

    play(story)


def test_nobody_is_given_what_another_has(play: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.fill()
        claimed = [scene.pool.claim(scene.image("old")) for _ in range(SIZE + 1)]
        assert claimed == [*scene.made, None]
        one, other = scene.made
        assert await scene.pool.tend() == 2.0  # while vms take them, none is made
        assert scene.there() == ["old", "old"]
        scene.pool.taken(cast("Any", one))
        scene.pool.give_back(cast("Any", other))
        assert scene.pool.claim(scene.image("old")) is cast("Any", other)
        await scene.pool.end_claimed(other.uuid)
        await scene.pool.end_claimed(other.uuid)
        assert other.is_ended
        one.is_ended = True  # as its vm
        await scene.fill()

    play(story)


def test_none_is_made_while_vms_are_started(
    play: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)

    async def story(scene: Scene) -> None:
        async with scene.slots:
            assert await scene.pool.tend() == 0
            with scene.slots.without_turn():
                assert await scene.pool.tend() == 0
        assert scene.there() == []
        await scene.fill()

    play(story)


def test_what_always_fails_is_tried_less_and_less(play: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        scene.fails = True
        pauses = []
        for _ in range(12):
            assert await scene.pool.tend() == 0
            pause = await scene.pool.tend()
            assert pause is not None
            pauses.append(pause)
            scene.now += pause
        assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
        scene.fails = False
        await scene.fill()
        # Dying young counts, too, and only one that a vm has taken is a success.
        scene.made[0].is_well = False
        assert await scene.pool.tend() == 2.0
        assert scene.there() == ["old"]
        scene.now += 300
        await scene.pool.tend()
        spare = scene.pool.claim(scene.image("old"))
        assert spare is not None
        scene.pool.taken(spare)
        scene.made[1].is_ended = True
        scene.fails = True
        assert await scene.pool.tend() == 0
        assert await scene.pool.tend() == 1

    play(story)


def test_they_give_way_and_come_back_later(play: Callable[[Story], None]) -> None:
    async def story(scene: Scene) -> None:
        await scene.fill()
        scene.available_bytes = 9
        assert await scene.pool.tend() == 10.0
        assert scene.there() == []
        for scene.available_bytes in (11, 19):
            scene.now += 100
            assert await scene.pool.tend() == 10.0
        scene.available_bytes = 20
        await scene.fill()
        await scene.pool.make_room(20)
        assert len(scene.there()) == SIZE
        await scene.pool.make_room(21)
        assert scene.there() == []

    play(story)


def test_without_warm_images_there_is_no_pool(tmp_path: Path) -> None:
    async def story() -> None:
        scene = Scene(tmp_path, mode="off")
        async with asyncio.timeout(10):
            await scene.pool.run()
        assert scene.there() == []

    asyncio.run(story())


def test_an_image_that_spares_stand_on_stays(tmp_path: Path) -> None:
    async def story() -> None:
        config = Config(state_dir=str(tmp_path), warm=WarmConfig(max_age_days=1.0))
        database = Database(tmp_path / "oscloud.db")
        await database.open()
        unused = cast("Any", None)
        images = WarmImages(config, database, *[unused] * 5)
        directory = tmp_path / "warm" / "some"
        directory.mkdir(parents=True)
        for name in ("memory", "state", "disk.qcow2"):
            (directory / name).touch()
        (directory / MANIFEST).write_bytes(msgspec.json.encode(MANIFEST_OF_NOTHING))
        os.utime(directory / MANIFEST, (0, 0))
        images.stood_on = lambda: {"some"}
        await images.prune()
        assert read_warm(directory) is not None
        images.stood_on = set
        await images.prune()
        assert not directory.exists()
        await database.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pool = -1", "warm.pool -1 is not between 0 and 100"),
        ("pool = 101", "warm.pool 101 is not between 0 and 100"),
        ("pool_min_free_mem = 1.0", "warm.pool_min_free_mem 1.0 is not a share between 0 and 1"),
    ],
)
def test_a_pool_that_can_not_be_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "oscloud.toml"
    path.write_text(f"[warm]\n{line}\n")
    with pytest.raises(InvalidArgumentError, match=said):
        load_config(path)
