"""Looking at vms and talking to them: lists, names, logs, consoles, the monitor."""

import asyncio
from typing import Any, Literal

import msgspec
from peewee import IntegrityError

from oscloudd.cloud.jobs import Order
from oscloudd.cloud.keeper import Keeper
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.rates import Rates
from oscloudd.cloud.states import DOWN_STATES, VmState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import NicInfo, VmInfo, VmRecord, describe, read_vm, read_vms
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import AlreadyExistsError, InvalidStateError
from oscloudd.guest.readiness import Sign, wait_sign
from oscloudd.host.network.counters import read_guest_traffic
from oscloudd.machine.console import Attachment
from oscloudd.machine.console_log import read_log_tail
from oscloudd.store.database import Database
from oscloudd.store.models import Vm
from oscloudd.units import check_name


class VmLog(msgspec.Struct, frozen=True):
    """The answer of `vm_log`."""

    text: str


class Vms:
    """What can be asked of vms without changing whether they run."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        supervisor: Supervisor,
        operations: Operations,
        keeper: Keeper,
        rates: Rates,
    ) -> None:
        self._rates = rates
        self._config = config
        self._database = database
        self._states = states
        self._supervisor = supervisor
        self._operations = operations
        self._keeper = keeper

    async def list(self) -> list[VmInfo]:
        """Describe every vm, by id."""
        return [describe(vm) for vm in await self._database.run(read_vms)]

    async def info(self, key: int | str) -> VmInfo:
        """Describe one vm with what its network card has seen; raises NotFoundError."""
        vm = await self._read(key)
        seen = None if vm.pid is None else read_guest_traffic(vm.tap)
        return msgspec.structs.replace(describe(vm), nic=seen and NicInfo(*seen))

    async def rename(self, key: int | str, name: str, order: Order) -> VmInfo:
        """Give a vm another name; its guest keeps its hostname until it is told otherwise."""
        check_name(name)

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            if vm.name == name:
                return None
            Vm.update(name=name).where(Vm.id == vm.id).execute()
            return {}

        vm_id = (await self._read(key)).id
        try:
            begun = await self._operations.begin("vm_rename", vm_id, order, decide)
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"vm {name!r} already exists", hint="choose another name", object="vm", name=name
            ) from error
        if begun is not None:
            await asyncio.shield(begun[1])
        return describe(await self._read(vm_id))

    async def set(
        self,
        key: int | str,
        *,
        autostart: str | None = None,
        restart: str | None = None,
        bandwidth: int | None = None,
    ) -> VmInfo:
        """Change when a vm starts by itself and how fast it may send and receive, in bits a second.

        None leaves a setting as it is; a bandwidth of 0 takes the limit away.
        """
        given = {"autostart": autostart, "restart": restart, "bandwidth": bandwidth}
        columns = {name: value for name, value in given.items() if value is not None}

        def change() -> VmRecord:
            vm = read_vm(key)
            if columns:
                Vm.update(**columns).where(Vm.id == vm.id).execute()
            return read_vm(vm.id)

        vm = await self._database.run(change)
        if bandwidth is not None:
            await self._rates.sync()
        self._states.changes.announce()
        self._keeper.consider(vm.id)
        return describe(vm)

    async def wait(self, key: int | str, state: str, timeout_seconds: float) -> VmInfo:
        """Wait until a vm is in `state`, or can be logged into with "ready"."""
        vm_id = (await self._read(key)).id

        async def look() -> VmInfo | None:
            info = describe(await self._read(vm_id))
            if info.ready if state == "ready" else info.state == state:
                return info
            if state == "ready" and info.state in DOWN_STATES:
                raise InvalidStateError(
                    f"vm {info.name!r} can't become ready: it is {info.state}",
                    hint=f"start it: oscloudctl vm-start {info.name}",
                    state=info.state,
                )
            return None

        what = f"vm {key!r} becoming {state}"
        return await self._states.changes.wait_until(
            look, timeout_seconds=timeout_seconds, what=what
        )

    async def wait_sign(self, key: int | str, sign: Sign, timeout_seconds: float) -> VmInfo:
        """Wait until a vm's guest shows a sign of its own; raises InvalidStateError when it is off.

        The timeout's error says what was seen last.
        """
        vm = await self._read(key)

        async def look() -> VmState | None:
            state = VmState((await self._read(vm.id)).state)
            return state if state in DOWN_STATES else None

        shown = asyncio.ensure_future(wait_sign(vm.ip, sign, timeout_seconds=timeout_seconds))
        # Longer than the sign's own wait, whose error tells more.
        limit = 2 * timeout_seconds + 1
        down = asyncio.ensure_future(
            self._states.changes.wait_until(look, timeout_seconds=limit, what="its end")
        )
        try:
            await asyncio.wait({shown, down}, return_when=asyncio.FIRST_COMPLETED)
            if not down.done():
                shown.result()
                return describe(await self._read(vm.id))
            raise InvalidStateError(
                f"the guest of vm {vm.name!r} can't answer: it is {down.result()}",
                hint=f"start it: oscloudctl vm-start {vm.name}",
                state=down.result(),
            )
        finally:
            for waiting in (shown, down):
                waiting.cancel()
            await asyncio.gather(shown, down, return_exceptions=True)

    async def log(self, key: int | str, source: Literal["console", "qemu"], lines: int) -> VmLog:
        """Give the last lines the guest printed on its console, or qemu itself in its log."""
        vm = await self._read(key)
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        path = paths.console_log if source == "console" else paths.qemu_log
        tail = await asyncio.to_thread(read_log_tail, path)
        kept = tail.decode("utf-8", "replace").splitlines(keepends=True)[-lines:]
        return VmLog("".join(kept))

    async def console(self, key: int | str) -> Attachment:
        """Attach to a vm's serial line, its last output first; the caller closes it."""
        vm = await self._read(key)
        return (await self._supervisor.get_judged(vm)).console.attach(with_history=True)

    async def qemu_command(self, key: int | str, command: str, arguments: dict[str, Any]) -> Any:
        """Run one QMP command; raises HostError with qemu's own words."""
        vm = await self._read(key)
        if vm.state == VmState.CREATING:
            raise InvalidStateError(f"vm {vm.name!r} is still being made", state=vm.state)
        qemu = await self._supervisor.get_judged(vm)
        return await qemu.monitor.execute(command, arguments)

    async def _read(self, key: int | str) -> VmRecord:
        return await self._database.run(lambda: read_vm(key))
