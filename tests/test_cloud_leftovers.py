"""The sweep itself, on a host of the test's own: a thread that has unshared its network."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from test_host_network_kernel import in_namespace, ip

from oscloudd.cloud import firewall, traces
from oscloudd.cloud import leftovers as module
from oscloudd.cloud.changes import Changes
from oscloudd.cloud.events import Events
from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.layers import forget_layers
from oscloudd.cloud.leftovers import Leftovers
from oscloudd.cloud.names import Names
from oscloudd.cloud.networks import Networks
from oscloudd.config import Config
from oscloudd.errors import UnavailableError
from oscloudd.host.network.bridges import Bridge, ensure_bridge
from oscloudd.host.network.firewall import apply_ruleset, find_ruleset_bridges
from oscloudd.host.network.neighbours import set_neighbour
from oscloudd.host.network.ruleset import GuestNetwork
from oscloudd.host.network.taps import open_tap
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Event, Layer, Network, Vm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

MAC = "52:54:00:00:00:01"


class Place:
    """A cloud without a daemon: vm 1 and disk 1 were deleted, vm 2 and disk 2 are there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = Config(
            state_dir=f"{root}/state", runtime_dir=f"{root}/run", log_dir=f"{root}/log"
        )
        self.database = Database(root / "state" / "oscloud.db")
        self.events = Events(self.database, Changes())
        self.firewall = Firewall(self.database, self.events)
        names = Names(self.config, self.database, self.events)
        networks = Networks(self.config, self.database, self.firewall, names)
        self.chains = LayerChains(self.config, self.database)
        self.leftovers = Leftovers(
            self.config, self.database, networks, self.firewall, self.events, self.chains
        )

    async def fill(self) -> None:
        def fill() -> None:
            Network.create(
                name="default", ip="10.0.0.0", mask=16, bridge_interface_idx=0, created_at=0.0
            )
            insert_vm(1)
            insert_vm(2)
            Vm.delete().where(Vm.id == 1).execute()
            Disk.delete().where(Disk.id == 1).execute()

        await self.database.open()
        await self.database.run(fill)

    async def warnings(self) -> list[str]:
        """Give the names of all warnings up to now."""
        rows = await self.database.run(lambda: list(Event.select(Event.name, Event.data).tuples()))
        assert all(json.loads(data)["message"] for _, data in rows)
        return [name for name, _ in rows]

    def make(self, path: str) -> Path:
        made = self.root / path
        made.mkdir(parents=True)
        return made


def insert_vm(number: int) -> None:
    disk = Disk.create(name=f"disk-{number}", size=1, created_at=0.0)
    Vm.create(
        name=f"vm-{number}", uuid=str(number), disk=disk, network=1, mem_size=1, cpus=1,
        ip=f"10.0.0.{number}", mac=f"52:54:00:00:00:0{number}", tap_interface_idx=number,
        qemu_serial_port=number,
        state="CREATING", wanted_state="RUNNING", owner_uid=0, created_at=0.0,
    )  # fmt: skip


def on_a_host_of_its_own(test: Callable[[Place], Awaitable[None]]) -> Callable[[Path], None]:
    # No functools.wraps: pytest is to see the parameter of this one.
    def wrapper(tmp_path: Path) -> None:
        async def scenario() -> None:
            place = Place(tmp_path)
            await place.fill()
            try:
                await test(place)
            finally:
                place.firewall.close()
                await place.database.close()

        in_namespace(lambda: asyncio.run(scenario()))()

    wrapper.__name__ = test.__name__
    return wrapper


@on_a_host_of_its_own
async def test_a_report_is_made_once_and_again_when_there_is_more(place: Place) -> None:
    place.make("state/disks/7")
    for _ in range(3):
        await place.leftovers.sweep()
    assert await place.warnings() == ["disk 7"]
    (place.make("log") / "vm-7.log").touch()
    (place.root / "log" / "oscloudd.log").touch()
    (place.root / "log" / "vm-7.txt").touch()
    await place.leftovers.sweep()
    assert await place.warnings() == ["disk 7", "vm 7"]
    shutil.rmtree(place.root / "state" / "disks" / "7")
    await place.leftovers.sweep()
    place.make("state/disks/7")
    await place.leftovers.sweep()
    assert await place.warnings() == ["disk 7", "vm 7", "disk 7"]


@on_a_host_of_its_own
async def test_nothing_is_nothing(place: Place) -> None:
    await place.leftovers.protect_foreign_ids()
    await place.leftovers.sweep()
    assert await place.leftovers.look() == []
    assert await place.warnings() == []
    assert await find_ruleset_bridges() == set()


@on_a_host_of_its_own
async def test_names_that_are_no_ids_are_told_of_and_kept(place: Place) -> None:
    names = ["0", "01", "-1", "٣", "1 ", "x", "lost+found", "1000000001", "9" * 30]
    kept = [place.make(f"state/disks/{name}") for name in names]
    await place.leftovers.protect_foreign_ids()
    await place.leftovers.sweep()
    assert all(path.exists() for path in kept)
    told = {part for stranger in await place.leftovers.look() for part in stranger.parts}
    assert told == {str(path) for path in kept}
    assert await place.warnings() == ["leftovers"] * len(names)
    await place.database.run(lambda: insert_vm(3))  # which no such name keeps from being made


@on_a_host_of_its_own
async def test_a_link_is_removed_and_what_it_leads_to_is_not(place: Place) -> None:
    elsewhere = place.make("elsewhere")
    (elsewhere / "file").touch()
    link = place.make("state/disks") / "1"
    link.symlink_to(elsewhere)
    await place.leftovers.sweep()
    assert not link.is_symlink()
    assert (elsewhere / "file").exists()


def test_what_can_not_be_removed_keeps_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        if "vms" in path.parts:
            raise PermissionError(13, "Operation not permitted", str(path))
        real(path)

    monkeypatch.setattr(traces.shutil, "rmtree", rmtree)

    @on_a_host_of_its_own
    async def scenario(place: Place) -> None:
        stuck, going = place.make("run/vms/1"), place.make("state/disks/1")
        place.make("state/disks/7")
        await place.leftovers.sweep()
        assert stuck.exists()
        assert not going.exists()
        assert await place.warnings() == ["disk 1", "disk 7"]
        left = await place.leftovers.look()
        assert [stranger.name for stranger in left] == ["disk 7", "vm 1"]
        assert (
            left[1].why
            == "is left of what was deleted from this database; the next sweep removes it"
        )

    scenario(tmp_path)


def test_what_could_not_be_told_is_told_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_a_host_of_its_own
    async def scenario(place: Place) -> None:
        async def fail(_name: str, _message: str) -> None:
            raise UnavailableError("the database does not answer")

        place.make("state/disks/7")
        with monkeypatch.context() as patch:
            patch.setattr(place.events, "warn", fail)
            await place.leftovers.sweep()
        assert await place.warnings() == []
        await place.leftovers.sweep()
        assert await place.warnings() == ["disk 7"]

    scenario(tmp_path)


def test_what_is_made_or_deleted_meanwhile_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_a_host_of_its_own
    async def scenario(place: Place) -> None:
        loop = asyncio.get_running_loop()
        real = module.list_traces

        def do(work: Callable[[], object]) -> None:
            asyncio.run_coroutine_threadsafe(place.database.run(work), loop).result(10)

        def list_while_others_work(config: Config) -> traces.Listing:
            do(lambda: insert_vm(3))  # its row is there before any file
            place.make("state/disks/3")
            listing = real(config)
            shutil.rmtree(going)  # its files are gone before its row
            do(lambda: Vm.delete().where(Vm.id == 2).execute())
            do(lambda: Disk.delete().where(Disk.id == 2).execute())
            do(lambda: insert_vm(4))
            place.make("state/disks/4")
            return listing

        going = place.make("state/disks/2")
        monkeypatch.setattr(module, "list_traces", list_while_others_work)
        await place.leftovers.sweep()
        assert await place.warnings() == []
        assert sorted(path.name for path in going.parent.iterdir()) == ["3", "4"]

    scenario(tmp_path)


@on_a_host_of_its_own
async def test_a_layer_that_somebody_reads_is_no_leftover_yet(place: Place) -> None:
    def forget() -> bool:
        forget_layers([1])
        return True

    async with asyncio.timeout(10):
        await place.database.run(lambda: Layer.create(size=1, created_at=0.0))
        layer = place.make("state/layers/1")
        async with place.chains.reading(None):
            removing = asyncio.ensure_future(place.chains.remove(1, forget))
            while await place.database.run(lambda: Layer.select().exists()):
                pass
            await place.leftovers.sweep()
            assert layer.exists()
            assert await place.leftovers.look() == []
        await removing
    assert not layer.exists()
    assert await place.warnings() == []
    place.make("state/layers/1")  # what could not be removed, say
    await place.leftovers.sweep()
    assert not layer.exists()
    assert await place.warnings() == ["layer 1"]


@on_a_host_of_its_own
async def test_neighbours_of_nobody_are_forgotten_on_our_bridges_only(place: Place) -> None:
    await ensure_bridge(Bridge("oscbr0", IPv4Address("10.0.0.1"), 16))
    ip("link add foreign type bridge")
    ip("link set foreign up")
    for name, address in (("oscbr0", "10.0.0.2"), ("oscbr0", "10.0.0.9"), ("foreign", "10.0.0.9")):
        set_neighbour(name, IPv4Address(address), MAC)
    await place.leftovers.sweep()
    assert {line.split()[0] for line in ip("neighbour show nud permanent").splitlines()} == {
        "10.0.0.2",
        "10.0.0.9",
    }
    assert "10.0.0.9" not in ip("neighbour show dev oscbr0")
    assert await place.warnings() == ["neighbours"]


def test_a_bridge_that_another_network_has_by_then_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_a_host_of_its_own
    async def scenario(place: Place) -> None:
        real = module.remove_traces

        async def make_a_network(traces: traces.Traces) -> list[str]:
            await place.database.run(
                lambda: Network.create(
                    name="lab", ip="10.5.0.0", mask=16, bridge_interface_idx=5, created_at=0.0
                )
            )
            return await real(traces)

        for number in (5, 6):
            await ensure_bridge(Bridge(f"oscbr{number}", IPv4Address(f"10.{number}.0.1"), 16))
        place.make("state/disks/1")  # what is removed first
        monkeypatch.setattr(module, "remove_traces", make_a_network)
        await place.leftovers.sweep()
        assert "oscbr5" in ip("link")
        assert "oscbr6" not in ip("link")
        assert await place.warnings() == ["disk 1", "bridges"]

    scenario(tmp_path)


def test_rules_of_a_network_that_is_being_made_are_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_a_host_of_its_own
    async def scenario(place: Place) -> None:
        async def find_after_it_came_up() -> set[str]:
            await place.database.run(
                lambda: Network.create(
                    name="lab", ip="10.5.0.0", mask=16, bridge_interface_idx=5, created_at=0.0
                )
            )
            await place.firewall.apply()
            return await find_ruleset_bridges()

        monkeypatch.setattr(firewall, "find_ruleset_bridges", find_after_it_came_up)
        await place.leftovers.sweep()
        assert await place.warnings() == []
        assert await find_ruleset_bridges() == {"oscbr0", "oscbr5"}

    scenario(tmp_path)


@on_a_host_of_its_own
async def test_nothing_in_the_network_is_touched_while_a_foreign_vm_runs(place: Place) -> None:
    await ensure_bridge(Bridge("oscbr0", IPv4Address("10.0.0.1"), 16))
    await apply_ruleset([GuestNetwork("oscbr5", IPv4Network("10.5.0.0/16"))], [])
    set_neighbour("oscbr0", IPv4Address("10.0.0.9"), MAC)
    with subprocess.Popen(["sleep", "1000"], cwd=place.make("run/vms/7")) as foreign:
        try:
            await place.leftovers.sweep()
            assert foreign.poll() is None
        finally:
            foreign.kill()
    assert "10.0.0.9" in ip("neighbour show dev oscbr0")
    assert await find_ruleset_bridges() == {"oscbr5"}
    assert await place.warnings() == ["vm 7"]
    await place.leftovers.sweep()
    assert "10.0.0.9" not in ip("neighbour show dev oscbr0")
    assert await find_ruleset_bridges() == {"oscbr0"}
    assert await place.warnings() == ["vm 7", "neighbours", "firewall", "vm 7"]


@on_a_host_of_its_own
async def test_taps_that_are_not_ours_are_told_of_and_kept(place: Place) -> None:
    await ensure_bridge(Bridge("oscbr0", IPv4Address("10.0.0.1"), 16))
    ip("tuntap add dev osctap2 mode tap")  # vm 2's
    ip("tuntap add dev osctap8 mode tap")
    ip("tuntap add dev tap0 mode tap")
    set_neighbour("oscbr0", IPv4Address("10.0.0.9"), MAC)  # somebody may be there
    held, ours = open_tap("osctap9", "oscbr0"), open_tap("osctap1", "oscbr0")
    outside = subprocess.Popen(["sleep", "1000"], pass_fds=[held])
    inside = subprocess.Popen(["sleep", "1000"], pass_fds=[ours], cwd=place.make("run/vms/1"))
    os.close(held)
    os.close(ours)
    try:
        await place.leftovers.sweep()
        inside.wait(10)  # reaped already: it is a child of this process
        assert "osctap1" not in ip("link show")
        assert outside.poll() is None
        assert "10.0.0.9" in ip("neighbour show dev oscbr0")
        strangers = {str(stranger).partition(")")[0] for stranger in await place.leftovers.look()}
        assert strangers == {"osctap8 (held by nobody", f"osctap9 (held by process {outside.pid}"}
        assert sorted(await place.warnings()) == ["osctap8", "osctap9", "vm 1"]
    finally:
        for process in (outside, inside):
            process.kill()
            process.wait()
