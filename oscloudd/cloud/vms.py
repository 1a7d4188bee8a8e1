"""Looking at vms and talking to them: lists, names, logs, consoles, the monitor."""

import asyncio
from functools import partial
from typing import Any, Literal

import msgspec
from peewee import IntegrityError

from oscloudd.cloud.jobs import Order
from oscloudd.cloud.keeper import Keeper
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.nic_changes import NicChanges
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.rates import Rates
from oscloudd.cloud.states import DOWN_STATES, OFF_STATES, VmState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.taken import NicRequest
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_power import refuse
from oscloudd.cloud.vm_records import NicTraffic, VmInfo, VmRecord, describe, read_vm, read_vms
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import AlreadyExistsError, InvalidArgumentError, InvalidStateError
from oscloudd.guest.readiness import Sign, wait_sign
from oscloudd.host.network.counters import read_guest_traffic
from oscloudd.machine.console import Attachment
from oscloudd.machine.console_log import read_log_tail
from oscloudd.store.database import Database
from oscloudd.store.models import Vm
from oscloudd.units import check_name, format_size


class VmLog(msgspec.Struct, frozen=True):
    """The answer of `vm_log`."""

    text: str


class VmSettings(msgspec.Struct, frozen=True):
    """What is to be different about a vm; None leaves it as it is, sizes are bytes."""

    name: str | None = None
    cpus: int | None = None
    mem_size: int | None = None
    autostart: str | None = None
    restart: str | None = None
    protect: bool | None = None
    bandwidth: int | None = None  # bits a second, 0 for any
    network: tuple[NicRequest, ...] | None = None  # all its cards, the first one first


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
        templates: Templates,
        nics: NicChanges,
    ) -> None:
        self._rates = rates
        self._config = config
        self._database = database
        self._states = states
        self._supervisor = supervisor
        self._operations = operations
        self._keeper = keeper
        self._templates = templates
        self._nics = nics

    async def list(self) -> list[VmInfo]:
        """Describe every vm, by id."""
        return [describe(vm) for vm in await self._database.run(read_vms)]

    async def info(self, key: int | str) -> VmInfo:
        """Describe one vm with what its network cards have seen; raises NotFoundError."""
        vm = await self._read(key)
        info = describe(vm)
        if vm.pid is None:
            return msgspec.structs.replace(info, nic=None)
        seen = [read_guest_traffic(nic.tap) for nic in info.nics]
        nics = [
            msgspec.structs.replace(nic, **traffic._asdict()) if traffic else nic
            for nic, traffic in zip(info.nics, seen, strict=True)
        ]
        return msgspec.structs.replace(info, nics=nics, nic=seen[0] and NicTraffic(*seen[0]))

    async def rename(self, key: int | str, name: str, order: Order) -> VmInfo:
        """Give a vm another name; its guest keeps its hostname until it is told otherwise."""
        return await self.set(key, VmSettings(name=name), order)

    async def set(self, key: int | str, settings: VmSettings, order: Order) -> VmInfo:
        """Change what a vm is or does by itself, all of it or nothing.

        Processors, memory and networks only while it is off.
        """
        given = msgspec.structs.asdict(settings)
        network = given.pop("network")
        columns = {column: value for column, value in given.items() if value is not None}
        vm_id = (await self._read(key)).id

        def decide(vm: VmRecord) -> dict[str, Any] | None:
            self._check_can_set(vm, settings)
            if columns:
                Vm.update(**columns).where(Vm.id == vm.id).execute()
            return None if settings.name in (None, vm.name) else {}

        if settings.name is None and network is None:
            await self._database.run(lambda: decide(read_vm(vm_id)))
        else:
            await self._set_held(vm_id, settings, order, decide)
        if settings.bandwidth is not None:
            await self._rates.sync()
        self._states.changes.announce()
        self._keeper.consider(vm_id)
        return describe(await self._read(vm_id))

    async def _set_held(
        self, vm_id: int, settings: VmSettings, order: Order, decide: Decide
    ) -> None:
        """Change its name or its networks, too, with nothing else done to it meanwhile."""
        name, transact = settings.name, None
        if name is not None:
            check_name(name)
        if settings.network is not None:
            transact = partial(self._nics.exchange, vm_id, settings.network)
        try:
            begun = await self._operations.begin(
                "vm_rename", vm_id, order, decide, transact=transact
            )
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"vm {name!r} already exists", hint="choose another name", object="vm", name=name
            ) from error
        if begun is not None:
            await asyncio.shield(begun[1])

    def _check_can_set(self, vm: VmRecord, settings: VmSettings) -> None:
        """Refuse a change of the machine that could not be, inside a transaction."""
        if settings.network is not None:
            meanwhile = f", or while it runs: oscloudctl nic-add {vm.name} NETWORK, nic-delete"
            _check_is_off(vm, "given other networks", meanwhile)
        if settings.cpus is not None or settings.mem_size is not None:
            _check_is_off(vm, "given other processors or memory")
        if settings.mem_size is None:
            return
        least = self._templates.get_ready(vm.template).declaration.min_mem_bytes
        if settings.mem_size < least:
            raise InvalidArgumentError(
                f"mem_size {settings.mem_size} is too small for {vm.template}",
                hint=f"give it at least {format_size(least)}",
                parameter="mem_size",
            )
        if settings.mem_size > vm.mem_size:
            check_memory(settings.mem_size, self._config.limits.overcommit, vm.id)

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


def _check_is_off(vm: VmRecord, verb: str, meanwhile: str = "") -> None:
    """Refuse what can't be done to a vm but while it is off; `meanwhile` adds to the hint."""
    if vm.state in OFF_STATES:
        return
    if vm.state == VmState.SUSPENDED:
        refuse(vm, verb, f"resume it and stop it first: oscloudctl vm-resume {vm.name}")
    refuse(vm, verb, f"stop it first: oscloudctl vm-stop {vm.name}{meanwhile}")
