"""Putting guests back on their bridge, whatever else is being done to their vms."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from oscloudd.cloud import bridge_keeping
from oscloudd.cloud.bridge_keeping import BridgeKeeper
from oscloudd.errors import CloudError, HostError, OperationTimeoutError

LIMIT_SECONDS = 90


class StubCloud:
    """Vms 1 to 3 on two bridges, all cut off; what is done for them."""

    def __init__(self) -> None:
        self.vms = {number: _vm(number, bridge=number % 2) for number in (1, 2, 3)}
        self.masters: dict[str, str | None] = {f"osctap{number}": None for number in self.vms}
        self.locks = {number: asyncio.Lock() for number in self.vms}
        self.failing: set[int] = set()
        self.brought_up: list[int] = []
        self.warned: list[str] = []
        self.syncs: list[Exception | None] = []
        self.meanwhile: Callable[[], None] = lambda: None

    async def look(self, _work: object) -> list[Any]:
        vms = list(self.vms.values())
        self.meanwhile()
        return vms

    async def find_vm(self, vm_id: int) -> Any:
        return self.vms.get(vm_id)

    def find_qemu(self, vm_id: int) -> object | None:
        return object() if vm_id in self.locks else None

    async def bring_up(self, network_ids: Iterable[int]) -> None:
        self.brought_up += network_ids

    async def take_up(self, vm: Any, *, checked_within_seconds: float) -> None:
        assert checked_within_seconds > 0
        assert self.locks[vm.id].locked()
        if vm.id in self.failing:
            raise HostError(f"vm {vm.id} can't be connected")
        self.masters[vm.nics[0].tap] = vm.nics[0].bridge

    async def sync(self) -> None:
        error = self.syncs.pop() if self.syncs else None
        if error is not None:
            raise error

    async def warn(self, bridge: str, _message: str) -> None:
        self.warned.append(bridge)

    def keeper(self) -> BridgeKeeper:
        def stub(**methods: object) -> Any:
            return SimpleNamespace(**methods)

        return BridgeKeeper(
            stub(look=self.look, find=self.find_vm),
            stub(find=self.find_qemu),
            stub(lock=self.locks.__getitem__),
            stub(bring_up=self.bring_up, take_up=self.take_up),
            stub(sync=self.sync),
            stub(warn=self.warn),
        )

    def connected(self) -> set[str]:
        return {tap for tap, master in self.masters.items() if master is not None}


def _vm(number: int, *, bridge: int) -> Any:
    nic = SimpleNamespace(tap=f"osctap{number}", bridge=f"oscbr{bridge}", network_id=bridge)
    return SimpleNamespace(id=number, state="RUNNING", nics=(nic,))


def check(
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[StubCloud, Callable[[], Awaitable[CloudError | None]]], Awaitable[None]],
) -> None:
    """Run a scenario with what puts everything back once and gives the error."""

    async def run() -> None:
        cloud = StubCloud()
        monkeypatch.setattr(bridge_keeping, "list_masters", lambda _prefix: dict(cloud.masters))
        keeper = cloud.keeper()

        async def put_back() -> CloudError | None:
            try:
                await cast("Any", keeper)._put_back()
            except CloudError as error:
                return error
            return None

        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await scenario(cloud, put_back)
        finally:
            keeper.close()

    asyncio.run(run())


def test_each_bridge_is_looked_at_once_and_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cloud: StubCloud, put_back: Callable[[], Awaitable[object]]) -> None:
        assert await put_back() is None
        assert await put_back() is None
        assert sorted(cloud.brought_up) == [0, 1]
        assert cloud.connected() == {"osctap1", "osctap2", "osctap3"}
        assert cloud.warned == ["oscbr0", "oscbr1"]

    check(monkeypatch, scenario)


def test_one_vm_that_fails_keeps_no_other_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(cloud: StubCloud, put_back: Callable[[], Awaitable[object]]) -> None:
        cloud.failing, cloud.syncs = {1}, [None, HostError("no nft")]
        assert str(await put_back()) == "no nft"
        assert cloud.connected() == {"osctap2", "osctap3"}
        assert str(await put_back()) == "vm 1 can't be connected"
        assert not cloud.syncs
        cloud.failing, cloud.syncs = set(), [None, HostError("no nft")]
        assert str(await put_back()) == "no nft"
        assert cloud.connected() == {"osctap1", "osctap2", "osctap3"}
        # Nobody is cut off by now, but the ports are still to be seen to.
        assert await put_back() is None
        assert not cloud.syncs

    check(monkeypatch, scenario)


def test_a_vm_is_taken_as_it_is_when_its_turn_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_keeping, "_TURN_SECONDS", 0.0)

    async def scenario(cloud: StubCloud, put_back: Callable[[], Awaitable[object]]) -> None:
        def lose() -> None:
            cloud.vms.pop(1, None)
            cloud.vms[2].state = "DELETING"

        cloud.meanwhile = lose
        async with cloud.locks[3]:
            assert isinstance(await put_back(), OperationTimeoutError)
            assert cloud.connected() == set()
        assert await put_back() is None
        assert cloud.connected() == {"osctap3"}

    check(monkeypatch, scenario)
