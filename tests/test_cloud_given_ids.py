"""Whose an id is, whatever happened to the database: ours, deleted, or another's."""

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from oscloudd.cloud.given_ids import GivenIds, read_given_ids, set_aside
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Meta, Vm

Run = Callable[[Callable[[], Any]], Any]


@contextmanager
def opened() -> Iterator[Run]:
    with TemporaryDirectory() as directory:
        database = Database(Path(directory) / "oscloud.db")
        asyncio.run(database.open())
        yield lambda work: asyncio.run(database.run(work))
        asyncio.run(database.close())


def make_disk() -> int:
    return int(Disk.insert(name=uuid.uuid4().hex, size=1, created_at=0.0).execute())


def delete_disk(number: int) -> None:
    Disk.delete().where(Disk.id == number).execute()


def read() -> GivenIds:
    return read_given_ids(Disk)


def test_an_id_is_known_deleted_or_foreign() -> None:
    with opened() as run:
        assert [run(make_disk) for _ in range(3)] == [1, 2, 3]
        run(lambda: delete_disk(2))
        ids = run(read)
        assert [ids.is_deleted(number) for number in (1, 2, 3, 4)] == [False, True, False, False]
        assert [ids.is_foreign(number) for number in (1, 2, 3, 4)] == [False, False, False, True]


def test_what_is_set_aside_is_never_given_and_stays_foreign() -> None:
    with opened() as run:
        run(make_disk)
        run(lambda: set_aside(Disk, 5))
        run(lambda: set_aside(Disk, 3))
        assert run(make_disk) == 6
        run(lambda: set_aside(Disk, 8))
        assert run(make_disk) == 9
        run(lambda: delete_disk(9))
        ids = run(read)
        assert [number for number in range(1, 12) if ids.is_foreign(number)] == [
            2, 3, 4, 5, 7, 8, 10, 11,
        ]  # fmt: skip
        assert [number for number in range(1, 12) if ids.is_deleted(number)] == [9]
        assert run(lambda: read_given_ids(Vm)).highest == 0


def test_an_attempt_cut_short_before_the_ids_were_skipped_is_forgotten() -> None:
    with opened() as run:
        run(make_disk)
        run(lambda: Meta.create(name="foreign_disk_ids", value="[[2,6]]"))
        run(lambda: set_aside(Disk, 3))
        assert run(read).foreign == ((2, 3),)
        assert run(make_disk) == 4


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just("make"),
            st.tuples(st.just("delete"), st.integers(0, 30)),
            st.tuples(st.just("set aside"), st.integers(0, 40)),
        ),
        max_size=25,
    )
)
def test_only_what_was_given_is_ever_taken_for_deleted(steps: list[Any]) -> None:
    made: set[int] = set()
    gone: set[int] = set()
    aside = 0

    def work() -> None:
        nonlocal aside
        for step in steps:
            if step == "make":
                number = make_disk()
                assert number > aside
                assert number not in made
                made.add(number)
            elif step[0] == "delete":
                delete_disk(step[1])
                gone.update(made & {step[1]})
            else:
                set_aside(Disk, step[1])
                aside = max(aside, step[1])
        ids = read()
        for number in range(1, 80):
            assert ids.is_deleted(number) == (number in gone)
            assert ids.is_foreign(number) == (number not in made)

    with opened() as run:
        run(work)
