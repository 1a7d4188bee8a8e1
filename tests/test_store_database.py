"""The database thread on SQLite and on a real MariaDB: the same words, the same answers."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pymysql
import pytest
from mariadb_server import MariaDb
from peewee import DataError, IntegrityError

from oscloudd.cloud import nic_records, vm_records
from oscloudd.cloud.vm_records import find_vm, read_vm, read_vms
from oscloudd.errors import NotFoundError, UnavailableError
from oscloudd.store.database import Database
from oscloudd.store.ids import highest_id_given, never_give_up_to
from oscloudd.store.mariadb import _Connection
from oscloudd.store.models import Disk, Job, Meta, Network, Vm

T = TypeVar("T")
PASSWORD = "s3cret"


@pytest.fixture(params=["sqlite", "mariadb"])
def new_database(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[], Database]]:
    """Give a way to make a daemon's `Database` on one and the same database."""
    # It keeps the texts of its queries, and a daemon has only one kind of database.
    for module in (vm_records, nic_records):
        module._statement.cache_clear()
    if request.param == "sqlite":
        yield lambda: Database(tmp_path / "oscloud.db")
        return
    server: MariaDb = request.getfixturevalue("mariadb")
    name = server.make_database()
    yield lambda: Database(tmp_path / "unused.db", server.url(name))
    server.drop_database(name)
    assert not (tmp_path / "unused.db").exists()


@pytest.fixture
def mariadb_name(mariadb: MariaDb) -> Iterator[str]:
    name = mariadb.make_database()
    yield name
    mariadb.drop_database(name)


@contextlib.asynccontextmanager
async def opened(database: Database) -> AsyncIterator[Database]:
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def with_database(
    new_database: Callable[[], Database], work: Callable[[Database], Coroutine[Any, Any, T]]
) -> T:
    async def run() -> T:
        async with opened(new_database()) as database:
            return await work(database)

    return asyncio.run(run())


def add_job(target: str = "web") -> int:
    job = Job.create(kind="x", target=target, state="DONE", owner_uid=0, created_at=time.time())
    number: int = job.id
    return number


def add_disk(name: str) -> int:
    number: int = Disk.create(name=name, size=1 << 40, created_at=time.time()).id
    return number


VM = {
    "name": "web",
    "uuid": "1",
    "mem_size": 1 << 33,
    "cpus": 2,
    "ip": "192.168.0.2",
    "mac": "52:54:00:00:00:01",
    "tap_interface_idx": 1,
    "qemu_serial_port": 5001,
    "state": "RUNNING",
    "wanted_state": "RUNNING",
    "ready": True,
    "started_at": 1795565077.7275512,
    "owner_uid": 2**32 - 2,
    "created_at": 1795565077.1,
    "seed_document": "ä€😀\0" + "x" * 100_000,
    "qemu_start_ticks": 2**40,
}


def add_vm() -> None:
    network = Network.create(
        name="default", ip="192.168.0.0", mask=16, bridge_interface_idx=1, created_at=1.5
    )
    Vm.create(**VM, disk=add_disk("web"), network=network)


def test_values_come_back_as_they_went_in(new_database: Callable[[], Database]) -> None:
    async def work(database: Database) -> None:
        await database.run(add_vm)
        vm = await database.run(lambda: Vm.get())
        for name, value in VM.items():
            assert getattr(vm, name) == value
            assert type(getattr(vm, name)) is type(value)
        record = await database.run(lambda: read_vm("web"))
        assert await database.run(read_vms) == [record]
        assert await database.run(lambda: find_vm(1)) == record
        assert await database.run(lambda: find_vm(2)) is None
        assert (record.ready, record.identified, record.pid) == (1, 0, None)
        assert (type(record.ready), type(record.disk_size)) == (int, int)
        assert record.started_at == VM["started_at"]
        with pytest.raises(NotFoundError):
            await database.run(lambda: read_vm(2**63 - 1))

    with_database(new_database, work)


def test_names_differ_by_case_and_trailing_blanks(new_database: Callable[[], Database]) -> None:
    async def work(database: Database) -> None:
        names = ["web", "Web", "web ", "wéb"]
        for name in names:
            await database.run(lambda name=name: add_disk(name))
        for name in names:
            found = await database.run(
                lambda name=name: [disk.name for disk in Disk.select().where(Disk.name == name)]
            )
            assert found == [name]

    with_database(new_database, work)


def test_what_is_taken_is_an_integrity_error(new_database: Callable[[], Database]) -> None:
    async def work(database: Database) -> None:
        await database.run(add_vm)
        with pytest.raises(IntegrityError):
            await database.run(lambda: add_disk("web"))
        with pytest.raises(IntegrityError):  # a vm stands on it
            await database.run(lambda: Disk.delete().execute())
        with pytest.raises(IntegrityError):  # there is no such disk
            await database.run(lambda: Vm.update(disk=99).execute())
        with pytest.raises(IntegrityError):
            await database.run(lambda: Vm.update(state=None).execute())
        assert await database.run(Disk.select().count) == 1

    with_database(new_database, work)


def test_an_exception_rolls_everything_back(new_database: Callable[[], Database]) -> None:
    def fail() -> None:
        add_job()
        raise NotFoundError("no such thing")

    async def work(database: Database) -> None:
        with pytest.raises(NotFoundError):
            await database.run(fail)
        assert await database.run(Job.select().count) == 0
        assert await database.run(add_job) > 0

    with_database(new_database, work)


def test_ids_are_never_given_again(new_database: Callable[[], Database]) -> None:
    async def first(database: Database) -> None:
        assert await database.run(lambda: highest_id_given(Job)) == 0
        assert [await database.run(add_job) for _ in range(3)] == [1, 2, 3]
        await database.run(lambda: Job.delete().execute())
        assert await database.run(lambda: highest_id_given(Job)) == 3

    async def second(database: Database) -> None:
        assert await database.run(lambda: highest_id_given(Job)) == 3
        await database.run(lambda: never_give_up_to(Job, 50))
        await database.run(lambda: never_give_up_to(Job, 20))
        assert await database.run(lambda: highest_id_given(Job)) == 50
        assert await database.run(lambda: highest_id_given(Disk)) == 0

    async def third(database: Database) -> None:
        assert await database.run(add_job) == 51

    for work in (first, second, third):
        with_database(new_database, work)


def test_what_comes_after_a_raised_counter_is_still_one_transaction(
    new_database: Callable[[], Database],
) -> None:
    def fail() -> None:
        never_give_up_to(Job, 50)
        add_job()
        raise NotFoundError("no such thing")

    async def work(database: Database) -> None:
        with pytest.raises(NotFoundError):
            await database.run(fail)
        assert await database.run(Job.select().count) == 0

    with_database(new_database, work)


def test_ids_outlive_a_server_that_is_killed(mariadb: MariaDb, mariadb_name: str) -> None:
    def new_database() -> Database:
        return Database(Path("unused"), mariadb.url(mariadb_name))

    async def delete_all(database: Database) -> None:
        await database.run(add_job)
        await database.run(lambda: Job.delete().execute())

    async def add(database: Database) -> int:
        return await database.run(add_job)

    with_database(new_database, delete_all)
    mariadb.end(signal.SIGKILL)
    mariadb.start()
    assert with_database(new_database, add) == 2


def test_a_value_that_does_not_fit_is_refused_not_cut(mariadb: MariaDb, mariadb_name: str) -> None:
    async def work(database: Database) -> None:
        with pytest.raises(DataError):
            await database.run(lambda: add_disk("n" * 64))
        with pytest.raises(DataError):
            await database.run(lambda: add_job() and Job.update(vm_id=2**40).execute())
        assert await database.run(Job.select().count) == 0

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), work)


def test_a_connection_that_went_stale_is_not_noticed(mariadb: MariaDb, mariadb_name: str) -> None:
    async def work(database: Database) -> None:
        await database.run(add_job)
        mariadb.end()
        mariadb.start()
        assert await database.run(Job.select().count) == 1
        mine = mariadb.query(
            "SELECT id FROM information_schema.processlist WHERE db = %s", (mariadb_name,)
        )
        mariadb.query(f"KILL {mine[0][0]}")
        assert await database.run(add_job) == 2

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), work)


def test_a_server_that_is_away_is_unavailable_and_comes_back(
    mariadb: MariaDb, mariadb_name: str
) -> None:
    mariadb.query(f"CREATE USER oscloud@localhost IDENTIFIED BY '{PASSWORD}'")
    mariadb.query(f"GRANT ALL ON {mariadb_name}.* TO oscloud@localhost")
    url = mariadb.url(mariadb_name).replace("root@", f"oscloud:{PASSWORD}@")

    async def work(database: Database) -> None:
        await database.run(add_job)
        mariadb.end(signal.SIGKILL)
        try:
            with pytest.raises(UnavailableError) as away:
                await database.run(add_job)
            assert mariadb_name in away.value.message
            assert away.value.hint is not None
            assert PASSWORD not in f"{away.value.message}{away.value.hint}"
            waiting = asyncio.create_task(database.run_when_available(add_job))
            with pytest.raises(UnavailableError):
                await database.run(add_job)
            assert not waiting.done()
        finally:
            mariadb.start()
        await asyncio.wait_for(waiting, 20)
        assert await database.run(Job.select().count) == 2

    try:
        with_database(lambda: Database(Path("unused"), url), work)
    finally:
        mariadb.query("DROP USER oscloud@localhost")


def test_a_server_that_hangs_keeps_nobody_in_a_queue(
    mariadb: MariaDb, mariadb_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oscloudd.store.mariadb._ANSWER_SECONDS", 1)

    async def work(database: Database) -> None:
        await database.run(add_job)
        mariadb.send_signal(signal.SIGSTOP)
        try:
            # Each would wait for a second, and all of them for longer than this does.
            asked = [database.run(add_job) for _ in range(50)]
            answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
        finally:
            mariadb.send_signal(signal.SIGCONT)
        assert {type(answer) for answer in answers} == {UnavailableError}
        assert await database.run_when_available(Job.select().count) == 1

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), work)


def test_a_server_that_is_away_at_the_start_is_unavailable(tmp_path: Path) -> None:
    url = f"mysql://u:{PASSWORD}@localhost/oscloud?unix_socket={tmp_path}/none.sock"

    async def work(database: Database) -> None:
        raise AssertionError("it opened")

    with pytest.raises(UnavailableError) as away:
        with_database(lambda: Database(Path("unused"), url), work)
    assert "none.sock" in away.value.message
    assert PASSWORD not in f"{away.value.message}{away.value.hint}"


@pytest.mark.parametrize("database", ["missing", "closed to the user"])
def test_a_database_that_can_not_be_used_is_named(mariadb: MariaDb, database: str) -> None:
    mariadb.query(f"CREATE USER oscloud@localhost IDENTIFIED BY '{PASSWORD}'")
    name = "mysql" if database != "missing" else "missing"
    user = "root@" if database == "missing" else f"oscloud:{PASSWORD}@"

    async def work(database: Database) -> None:
        raise AssertionError("it opened")

    url = mariadb.url(name).replace("root@", user)
    try:
        with pytest.raises(UnavailableError) as refused:
            with_database(lambda: Database(Path("unused"), url), work)
    finally:
        mariadb.query("DROP USER oscloud@localhost")
    assert f"the database {name} at" in refused.value.message
    assert refused.value.hint is not None
    assert PASSWORD not in f"{refused.value.message}{refused.value.hint}"


def test_a_deadlock_is_tried_again(mariadb: MariaDb, mariadb_name: str) -> None:
    """Another client locks what we want next, and wants what we have."""
    other_has_it = threading.Event()
    attempts: list[int] = []

    def lock_the_other_way_round() -> None:
        with contextlib.closing(
            pymysql.connect(
                user="root", unix_socket=str(mariadb.socket_path), database=mariadb_name
            )
        ) as other:
            cursor = other.cursor()
            # Of two transactions the one that has changed less is sacrificed.
            cursor.executemany(
                "INSERT INTO meta VALUES (%s, '')", [(f"weight {n}",) for n in range(50)]
            )
            cursor.execute("UPDATE meta SET value = 'other' WHERE name = 'b'")
            other_has_it.set()
            cursor.execute("UPDATE meta SET value = 'other' WHERE name = 'a'")
            other.commit()

    def work() -> None:
        attempts.append(1)
        Meta.update(value="mine").where(Meta.name == "a").execute()
        if len(attempts) == 1:
            thread.start()
            assert other_has_it.wait(20)
        Meta.update(value="mine").where(Meta.name == "b").execute()

    thread = threading.Thread(target=lock_the_other_way_round)

    async def run(database: Database) -> None:
        for name in ("a", "b"):
            await database.run(lambda name=name: Meta.create(name=name, value=""))
        await database.run(work)
        assert len(attempts) == 2
        values = await database.run(
            lambda: [row.value for row in Meta.select().order_by(Meta.name)]
        )
        assert values[:2] == ["mine", "mine"]

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), run)
    thread.join(20)


def test_rows_another_program_has_locked_make_it_unavailable_for_a_while(
    mariadb: MariaDb, mariadb_name: str
) -> None:
    async def run(database: Database) -> None:
        await database.run(lambda: Meta.create(name="a", value=""))
        with contextlib.closing(
            pymysql.connect(
                user="root", unix_socket=str(mariadb.socket_path), database=mariadb_name
            )
        ) as other:
            other.cursor().execute("UPDATE meta SET value = 'other' WHERE name = 'a'")
            with pytest.raises(UnavailableError, match="Lock wait timeout"):
                await database.run(lambda: Meta.update(value="mine").execute())
            assert await database.run(Meta.select().count) > 0
        assert await database.run(lambda: Meta.update(value="mine").execute()) > 0

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), run)


@pytest.mark.parametrize("happened", [True, False])
def test_a_commit_that_was_never_answered_is_looked_up(
    mariadb: MariaDb, mariadb_name: str, monkeypatch: pytest.MonkeyPatch, happened: bool
) -> None:
    """The line breaks just before or just after the server has committed."""
    runs: list[int] = []

    def work() -> int:
        runs.append(1)
        return add_job()

    real_cursor = _Connection.cursor

    async def run(database: Database) -> None:
        await database.run(add_job)
        connection = database._backend.connection

        class Breaking:
            """A cursor whose connection ends at COMMIT."""

            def __init__(self, cursor: Any) -> None:
                self._cursor = cursor

            def execute(self, statement: str, values: Any = None) -> Any:
                if statement == "COMMIT":
                    monkeypatch.setattr(_Connection, "cursor", real_cursor)
                    if happened:
                        self._cursor.execute(statement)
                    connection.connection()._sock.shutdown(socket.SHUT_RDWR)
                return self._cursor.execute(statement, values)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._cursor, name)

        monkeypatch.setattr(_Connection, "cursor", lambda self: Breaking(real_cursor(self)))
        number = await database.run(work)
        rows = await database.run(lambda: [job.id for job in Job.select().order_by(Job.id)])
        assert len(rows) == 2
        assert rows[-1] == number
        assert len(runs) == (1 if happened else 2)

    with_database(lambda: Database(Path("unused"), mariadb.url(mariadb_name)), run)
