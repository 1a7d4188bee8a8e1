"""Admission by memory: what is promised counts, and two at once are not given the same."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from oscloudd.cloud import memory
from oscloudd.cloud.memory import check_memory, committed_bytes
from oscloudd.cloud.states import DOWN_STATES, VmState
from oscloudd.errors import CloudError, ExhaustedError
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Network, Vm

GIB = 1 << 30


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database with one network, on a host of 8 GiB of which 6 are available."""
    monkeypatch.setattr(memory, "memory_total_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(memory, "memory_available_bytes", lambda: 6 * GIB)
    database = Database(tmp_path / "oscloud.db")
    asyncio.run(database.open())
    insert_network = {
        "name": "default", "ip": "10.0.0.0", "mask": 16,
        "bridge_interface_idx": 0, "created_at": 0.0,
    }  # fmt: skip
    asyncio.run(database.run(lambda: Network.create(**insert_network)))
    yield database
    asyncio.run(database.close())


def insert_vm(number: int, mem_size: int, state: VmState) -> int:
    disk = Disk.create(name=f"disk-{number}", size=1, created_at=0.0)
    vm = Vm.create(
        name=f"vm-{number}", uuid=str(number), disk=disk, network=1, mem_size=mem_size, cpus=1,
        ip=f"10.0.0.{number}", mac=str(number), tap_interface_idx=number, qemu_serial_port=number,
        state=state, wanted_state="RUNNING", owner_uid=0, created_at=0.0,
    )  # fmt: skip
    return int(vm.id)


def run(database: Database, *vms: tuple[int, VmState]) -> None:
    def insert() -> None:
        for number, (mem_size, state) in enumerate(vms, start=1):
            insert_vm(number, mem_size, state)

    asyncio.run(database.run(insert))


@pytest.mark.parametrize("state", VmState)
def test_what_runs_or_is_about_to_counts(database: Database, state: VmState) -> None:
    run(database, (3 * GIB, state), (GIB, VmState.RUNNING))
    counts = state not in (*DOWN_STATES, VmState.DELETING)
    assert asyncio.run(database.run(committed_bytes)) == (4 if counts else 1) * GIB
    assert asyncio.run(database.run(lambda: committed_bytes(except_vm=1))) == GIB


def test_an_empty_cloud_has_promised_nothing(database: Database) -> None:
    assert asyncio.run(database.run(committed_bytes)) == 0
    asyncio.run(database.run(lambda: check_memory(6 * GIB, 1.0)))


def test_together_they_may_have_the_hosts_memory(database: Database) -> None:
    run(database, (5 * GIB, VmState.RUNNING))
    asyncio.run(database.run(lambda: check_memory(3 * GIB, 1.0)))
    with pytest.raises(ExhaustedError) as refused:
        asyncio.run(database.run(lambda: check_memory(3 * GIB + 1, 1.0)))
    assert refused.value.message == (
        "3.0G of memory can't be given to a vm: vms have 5G of the 8G they may have together"
        " (1 times the host's 8G)"
    )
    assert refused.value.details == {
        "resource": "memory", "wanted": 3 * GIB + 1, "committed": 5 * GIB, "total": 8 * GIB,
        "available": 6 * GIB, "overcommit": 1.0,
    }  # fmt: skip
    assert refused.value.hint is not None
    assert "overcommit" in refused.value.hint


def test_overcommit_is_a_ratio_either_way(database: Database) -> None:
    run(database, (8 * GIB, VmState.RUNNING), (3 * GIB, VmState.PAUSED))
    asyncio.run(database.run(lambda: check_memory(GIB, 1.5)))
    with pytest.raises(ExhaustedError, match=r"11G of the 12G .* \(1\.5 times the host's 8G\)"):
        asyncio.run(database.run(lambda: check_memory(GIB + 1, 1.5)))
    with pytest.raises(ExhaustedError):
        asyncio.run(database.run(lambda: check_memory(2 * GIB, 0.5, except_vm=1)))
    asyncio.run(database.run(lambda: check_memory(GIB, 0.5, except_vm=1)))


def test_one_alone_may_not_want_more_than_is_available(database: Database) -> None:
    asyncio.run(database.run(lambda: check_memory(6 * GIB, 1.0)))
    with pytest.raises(ExhaustedError, match=r"7G of memory .* the host has 6G of 8G available"):
        asyncio.run(database.run(lambda: check_memory(7 * GIB, 1.0)))
    asyncio.run(database.run(lambda: check_memory(9 * GIB, 1.5)))


def test_two_at_once_are_not_given_the_same(database: Database) -> None:
    def begin(number: int) -> None:
        check_memory(3 * GIB, 1.0)
        insert_vm(number, 3 * GIB, VmState.CREATING)

    async def attempt(number: int) -> bool:
        try:
            await database.run(lambda: begin(number))
        except CloudError:
            return False
        return True

    async def scenario() -> list[bool]:
        return await asyncio.gather(*(attempt(number) for number in range(1, 9)))

    assert sorted(asyncio.run(scenario())) == [False] * 6 + [True] * 2
