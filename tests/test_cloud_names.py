"""Name servers through what a host does to them."""

import asyncio
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from oscloudd.cloud import names, networks
from oscloudd.cloud.events import Events
from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.names import Names
from oscloudd.cloud.networks import NetworkRecord, Networks
from oscloudd.config import Config, load_config
from oscloudd.errors import InvalidArgumentError, InvalidStateError, UnavailableError
from oscloudd.host.network import name_server
from oscloudd.host.network.dhcp import NamedGuest
from oscloudd.host.network.name_server import NameServer
from oscloudd.store.database import Database

SUBNET, OTHER_SUBNET = IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.0/24")
LIMIT_SECONDS = 90


class AwayEvents:
    """A history that can't be written to at first, for the database is away."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._tries = 0

    async def warn(self, _name: str, message: str) -> None:
        self._tries += 1
        if self._tries == 1:
            raise UnavailableError("the database is away")
        self.told.append(message)


class StubDatabase:
    """Two networks, with a vm in the first one."""

    async def run(self, read: object) -> list[Any]:
        if read is names.read_vms:
            nic = SimpleNamespace(bridge="oscbr0")
            return [SimpleNamespace(id=5, state="STOPPED", nics=(nic,), is_process_alive=bool)]
        return [("oscbr0", SUBNET, False, ()), ("oscbr1", OTHER_SUBNET, False, ())]


def test_an_address_that_a_dead_daemon_has_left_told_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def delete(server: NameServer, number: int, mac: str, address: str) -> None:
        told.append((server.bridge, str(server.gateway), number, mac, address))
        name_server.delete_guest(server, number, mac, address)

    noun = Names(
        Config(runtime_dir=str(tmp_path)),
        cast("Database", StubDatabase()),
        cast("Events", AwayEvents()),
    )
    noun.is_available = False
    for subnet, bridge, number in (
        (SUBNET, "oscbr0", 5),
        (SUBNET, "oscbr0", 6),
        (OTHER_SUBNET, "oscbr1", 5),
    ):
        server = noun.server(bridge, subnet)
        guest = NamedGuest(f"52:54:00:00:00:0{number}", f"10.0.0.{number}", None, "web")
        name_server.write_guest(server, number, guest)
    drafts = [tmp_path / "names/oscbr0" / kind / ".6" for kind in ("hosts", "addresses")]
    for draft in drafts:
        draft.write_text("half of")
    monkeypatch.setattr(names, "delete_guest", delete)
    for _ in range(2):
        asyncio.run(noun.prepare())
    assert told == [
        ("oscbr0", "10.0.0.1/24", 6, "52:54:00:00:00:06", "10.0.0.6"),
        ("oscbr1", "10.0.1.1/24", 5, "52:54:00:00:00:05", "10.0.0.5"),
    ]
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("names/*/*/*")}
    assert left == {"names/oscbr0/hosts/5", "names/oscbr0/addresses/5"}


def test_guests_are_told_their_own_name_server_or_whom_it_would_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "host_resolvers", lambda: (IPv4Address("192.0.2.53"),))
    config, database = Config(runtime_dir=str(tmp_path)), cast("Database", None)
    servers = Names(config, database, cast("Events", None))
    noun = Networks(config, database, cast("Firewall", None), servers)

    def told(*, isolated: bool, dns: tuple[str, ...]) -> tuple[str, ...]:
        return noun.resolvers(NetworkRecord(1, "lab", SUBNET, None, 1, dns, isolated, True, 0.0))

    servers.is_available = True
    noun.check_serves_dhcp()
    for isolated in (False, True):
        for dns in ((), ("9.9.9.9",)):
            assert told(isolated=isolated, dns=dns) == ("10.0.0.1",)
    servers.is_available = False
    assert told(isolated=False, dns=()) == ("192.0.2.53",)
    assert told(isolated=True, dns=()) == ()
    for isolated in (False, True):
        assert told(isolated=isolated, dns=("9.9.9.9",)) == ("9.9.9.9",)
    with pytest.raises(InvalidStateError, match="dnsmasq is not installed"):
        noun.check_serves_dhcp()


def test_a_name_server_is_not_configured_to_ask_itself(tmp_path: Path) -> None:
    path = tmp_path / "oscloud.toml"
    network = '[network]\nsubnet = "10.0.0.0/24"\ndns = ["9.9.9.9", "{}"]\n'
    path.write_text(network.format("10.0.0.1"))
    with pytest.raises(InvalidArgumentError, match=r"network\.dns 10\.0\.0\.1 is the gateway"):
        load_config(path)
    path.write_text(network.format("10.0.0.2"))
    assert load_config(path).network.dns == ["9.9.9.9", "10.0.0.2"]


def test_a_name_server_is_tried_again_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = AwayEvents()
    tries: list[NameServer] = []
    third = asyncio.Event()
    real_start = name_server.start_name_server

    async def start(server: NameServer) -> None:
        tries.append(server)
        if len(tries) == 3:
            third.set()
        await real_start(server)

    async def scenario() -> None:
        config = Config(runtime_dir=str(tmp_path))
        noun = Names(config, cast("Database", None), cast("Events", events))
        noun.is_available = True
        (tmp_path / "names").write_text("no directory")
        async with asyncio.timeout(LIMIT_SECONDS):
            await noun.serve("oscbr0", SUBNET, isolated=False, upstream=())
            await third.wait()
            await noun.end("oscbr0", SUBNET)

    monkeypatch.setattr(names, "start_name_server", start)
    monkeypatch.setattr(names, "_FIRST_PAUSE_SECONDS", 0.0)
    asyncio.run(scenario())
    assert "oscbr0" in events.told[0]
    assert str(tmp_path / "names") in events.told[0]
