"""A disk without a free byte, and the ballast that gets a database over it."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from oscloudd.errors import HostError, UnavailableError
from oscloudd.store.ballast import Ballast
from oscloudd.store.database import Database
from oscloudd.store.models import Job
from oscloudd.store.sqlite import BALLAST_BYTES

DISK_BYTES = 96 << 20


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system, whose last block may be taken."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image, directory = tmp_path / "image", tmp_path / "disk"
    directory.mkdir()
    if request.param == "ext4":
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-m", "0", str(image))
        run("mount", "-o", "loop", str(image), str(directory))
    else:
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory))
    try:
        yield directory
    finally:
        run("umount", str(directory))


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=60)


def fill(disk: Path) -> None:
    """Take every free block; SQLite's log first gives back what it has and does not use."""
    if (disk / "oscloud.db").exists():
        with contextlib.closing(sqlite3.connect(disk / "oscloud.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * size)
    with pytest.raises(OSError, match="No space left"):
        (disk / "one more").write_bytes(b"x" * 4096)
    (disk / "one more").unlink(missing_ok=True)


def with_database(disk: Path, work: Callable[[Database], Coroutine[Any, Any, None]]) -> None:
    async def run_it() -> None:
        database = Database(disk / "oscloud.db")
        try:
            await database.open()
            await work(database)
        finally:
            await database.close()

    asyncio.run(run_it())


def add_jobs() -> None:
    for number in range(20):
        Job.create(kind="x", target=f"{number}", state="RUNNING", owner_uid=0, created_at=0.0)


def delete_some() -> None:
    Job.delete().where(Job.id <= 10).execute()


def change_all() -> None:
    Job.update(state="DONE").execute()


@pytest.mark.parametrize("work", [delete_some, change_all])
def test_without_ballast_a_full_disk_is_the_end(disk: Path, work: Callable[[], None]) -> None:
    async def run_it(database: Database) -> None:
        await database.run(add_jobs)
        (disk / "ballast").unlink()
        fill(disk)
        with pytest.raises(UnavailableError) as full:
            await database.run(work)
        assert "full" in full.value.message
        assert full.value.hint is not None
        assert str(disk) in full.value.hint
        assert await database.run(lambda: Job.select().where(Job.state == "RUNNING").count()) == 20

    with_database(disk, run_it)


def test_with_ballast_rows_are_deleted_and_changed(disk: Path) -> None:
    async def run_it(database: Database) -> None:
        await database.run(add_jobs)
        fill(disk)
        await database.run(delete_some)
        await database.run(change_all)
        states = await database.run(lambda: [job.state for job in Job.select()])
        assert states == ["DONE"] * 10
        assert not (disk / "ballast").exists()

    with_database(disk, run_it)


def take_all(disk: Path) -> None:
    """Take every block that is free by now, and leave SQLite's log as it is."""
    with (disk / "more").open("ab", buffering=0) as more, contextlib.suppress(OSError):
        while True:
            more.write(b"x" * 4096)


def test_what_the_ballast_gave_is_not_lost_to_whoever_fills_the_disk(disk: Path) -> None:
    async def run_it(database: Database) -> None:
        await database.run(add_jobs)
        fill(disk)
        await database.run(delete_some)
        for number in range(300):
            take_all(disk)
            await database.run(change_all)
            await database.run(
                lambda number=number: Job.create(
                    kind="y", target=f"{number}", state="x" * 9, owner_uid=0, created_at=0.0
                )
            )
        assert await database.run(lambda: Job.select().count()) == 310

    with_database(disk, run_it)


def test_ballast_is_laid_in_again_when_there_is_space_to_spare(disk: Path) -> None:
    ballast = disk / "ballast"

    async def run_it(database: Database) -> None:
        assert ballast.stat().st_size == BALLAST_BYTES
        assert ballast.stat().st_blocks * 512 >= BALLAST_BYTES
        assert ballast.stat().st_mode & 0o777 == 0o600
        await database.run(add_jobs)
        fill(disk)
        await database.run(delete_some)
        # The ballast's own size is free now, and it must not be what fills the disk again.
        await database.refill_ballast()
        assert not ballast.exists()
        (disk / "filler").unlink()
        await database.refill_ballast()
        assert ballast.stat().st_blocks * 512 >= BALLAST_BYTES

    with_database(disk, run_it)


@pytest.mark.parametrize("has_ballast", [True, False])
def test_a_database_on_a_full_disk_is_opened_with_the_help_of_its_ballast(
    disk: Path, *, has_ballast: bool
) -> None:
    async def prepare(database: Database) -> None:
        await database.run(add_jobs)

    async def finish(database: Database) -> None:
        await database.run(change_all)

    with_database(disk, prepare)
    if not has_ballast:
        (disk / "ballast").unlink()
    fill(disk)
    if has_ballast:
        with_database(disk, finish)
    else:
        with pytest.raises((HostError, UnavailableError)) as full:
            with_database(disk, finish)
        assert str(disk) in full.value.message


def test_half_a_ballast_is_made_whole(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast", 1 << 20)
    (tmp_path / "ballast").write_bytes(b"x")
    assert ballast.refill()
    with (tmp_path / "ballast").open("r+b") as file:
        file.truncate(0)
        file.truncate(1 << 20)  # of the right length, and without a block
    assert ballast.refill()
    assert (tmp_path / "ballast").stat().st_blocks * 512 >= 1 << 20
    assert ballast.free()
    assert not ballast.free()
