"""Ids that are never given twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from peewee import SqliteDatabase

from oscloudd.store.ids import highest_id_given, never_give_up_to
from oscloudd.store.models import Job, database_proxy


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(str(tmp_path / "oscloud.db"))
    database_proxy.initialize(database)
    database.create_tables([Job])
    yield database
    database.close()


def give() -> int:
    job = Job.create(kind="x", target="web", state="DONE", owner_uid=0, created_at=0.0)
    number: int = job.id
    return number


def test_an_id_stays_given_when_its_row_is_gone(database: SqliteDatabase) -> None:
    assert highest_id_given(Job) == 0
    assert [give(), give()] == [1, 2]
    Job.delete().execute()
    assert highest_id_given(Job) == 2


@pytest.mark.parametrize("rows", [0, 1])
def test_ids_up_to_a_number_are_never_given(database: SqliteDatabase, rows: int) -> None:
    for _ in range(rows):
        give()
    with database.atomic("IMMEDIATE"):
        never_give_up_to(Job, 50)
        never_give_up_to(Job, 20)
        assert highest_id_given(Job) == 50
    assert give() == 51
    assert highest_id_given(Job) == 51
