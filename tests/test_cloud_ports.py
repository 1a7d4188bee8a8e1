"""Forwarded ports when the host fails, and how they are written."""

import asyncio
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from oscloudd.cloud import ports
from oscloudd.cloud.changes import Changes
from oscloudd.cloud.port_specs import HostPort, parse_name, parse_spec
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.vm_records import read_vm
from oscloudd.errors import HostError, InUseError
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Network, Port, Vm

# One that no program of this host is likely to have.
SPEC = parse_spec("127.0.0.1:47113:80", parameter="port")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("8080:80", "127.0.0.1:8080:80/tcp"),
        ("0.0.0.0:8080:80/UDP", "0.0.0.0:8080:80/udp"),
        ("00080:00080", "127.0.0.1:80:80/tcp"),
    ],
)
def test_a_port_is_read_and_written(text: str, shown: str) -> None:
    spec = parse_spec(text, parameter="port")
    assert str(spec) == shown
    assert parse_spec(shown, parameter="port") == spec
    name = parse_name(str(spec.host), parameter="port")
    assert HostPort(name.protocol, name.address or IPv4Address(0), name.port) == spec.host


@pytest.mark.parametrize(
    ("one", "other", "overlaps"),
    [
        ("1:1", "1:2", True),
        ("1:1", "0.0.0.0:1:1", True),
        ("0.0.0.0:1:1", "10.0.0.1:1:1", True),
        ("10.0.0.2:1:1", "10.0.0.1:1:1", False),
        ("1:1", "1:1/udp", False),
        ("1:1", "2:1", False),
    ],
)
def test_ports_overlap(one: str, other: str, *, overlaps: bool) -> None:
    hosts = [parse_spec(text, parameter="port").host for text in (one, other)]
    assert hosts[0].overlaps(hosts[1]) is hosts[1].overlaps(hosts[0]) is overlaps


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "oscloud.db")
    asyncio.run(database.open())
    asyncio.run(database.run(insert_vm))
    yield database
    asyncio.run(database.close())


def insert_vm() -> None:
    network = Network.create(
        name="default", ip="10.0.0.0", mask=16, bridge_interface_idx=0, created_at=0.0
    )
    disk = Disk.create(name="disk", size=1, created_at=0.0)
    Vm.create(
        name="web", uuid="1", disk=disk, network=network, mem_size=1, cpus=1, ip="10.0.0.2",
        mac="1", tap_interface_idx=0, qemu_serial_port=10002, state="RUNNING",
        wanted_state="RUNNING", owner_uid=0, created_at=0.0,
    )  # fmt: skip


def test_a_port_that_the_host_does_not_forward_is_not_kept(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = True
    applied: list[int] = []

    async def apply(forwards: list[Any], _bridges: list[str]) -> None:
        if fails:
            raise HostError("nft failed")
        applied.append(len(forwards))

    async def scenario() -> None:
        nonlocal fails
        noun = Ports(database, Changes())
        with pytest.raises(HostError, match="nft failed"):
            await noun.add("web", SPEC)
        assert await database.run(lambda: Port.select().count()) == 0
        assert noun.host_ports() == set()
        fails = False
        await noun.add("web", SPEC)
        assert noun.host_ports() == {47113}
        with pytest.raises(InUseError):
            await noun.add("web", SPEC)
        assert noun.host_ports() == {47113}
        await noun.close()

    monkeypatch.setattr(ports, "apply_forwards", apply)
    asyncio.run(scenario())
    assert applied == [1]


def test_what_was_added_since_a_vm_was_looked_at_goes_with_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = False
    applied: list[int] = []

    async def apply(forwards: list[Any], _bridges: list[str]) -> None:
        applied.append(len(forwards))
        if fails:
            raise HostError("nft failed")

    async def scenario() -> None:
        nonlocal fails
        noun = Ports(database, Changes())
        await noun.sync()
        seen = await database.run(lambda: read_vm("web"))
        await noun.forget(seen)
        assert applied == [0]  # a vm without any is no reason to write the rules
        await noun.add("web", SPEC)
        fails = True
        with pytest.raises(HostError, match="nft failed"):
            await noun.forget(seen)
        assert await database.run(lambda: Port.select().count()) == 0
        assert noun.host_ports() == set()
        fails = False
        # The kernel still leads to an address that is another's next.
        await noun.forget(seen)
        assert applied == [0, 1, 0, 0]
        await noun.close()
        another_daemons = Ports(database, Changes())
        await another_daemons.forget(seen)
        assert applied == [0, 1, 0, 0, 0]
        await another_daemons.close()

    monkeypatch.setattr(ports, "apply_forwards", apply)
    asyncio.run(scenario())
