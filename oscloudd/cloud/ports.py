"""Forwarded ports: rows, and the host's rules made like the rows, whatever happens to them.

What is forwarded is in the database; the rules follow it at each start, after each change, and when
somebody takes them away. The host's ports are held besides, as long as a daemon runs.
"""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv4Address, IPv4Network

import msgspec
from peewee import Expression

from oscloudd.cloud.changes import Changes
from oscloudd.cloud.events import EventKind, insert_event
from oscloudd.cloud.keeping import keep_as_it_was
from oscloudd.cloud.missing import missing
from oscloudd.cloud.nic_records import NicRecord
from oscloudd.cloud.port_specs import HostPort, PortName, PortSpec
from oscloudd.cloud.states import VmState
from oscloudd.cloud.vm_records import VmRecord, read_vm
from oscloudd.errors import CloudError, InUseError, InvalidArgumentError, InvalidStateError
from oscloudd.host.network.connections import end_connections_of, end_forwarded
from oscloudd.host.network.nft_events import TableEvents
from oscloudd.host.network.port_rules import EVERYWHERE, TABLE, Forward, apply_forwards
from oscloudd.host.ports import find_port_holder, hold_port
from oscloudd.store.database import Database
from oscloudd.store.models import Network, Port, Vm

_log = logging.getLogger(__name__)


class PortInfo(msgspec.Struct, frozen=True):
    """A forwarded port as it is shown; `name` is what `port_delete` takes."""

    name: str
    vm: str
    protocol: str
    host_address: str
    host_port: int
    guest_address: str
    guest_port: int


class Ports:
    """All forwarded ports of this cloud."""

    def __init__(self, database: Database, changes: Changes) -> None:
        self._database = database
        self._changes = changes
        # None for one that can't be held, or that somebody took while no daemon held it.
        self._held: dict[HostPort, socket.socket | None] = {}
        self._reserving = asyncio.Lock()
        self._applying = asyncio.Lock()
        self._rules = TableEvents(TABLE.split()[1])
        # Whether the kernel may forward what no row says: as an earlier daemon has left it.
        self._is_behind = True
        self._awaited: set[str] = set()

    def host_ports(self) -> set[int]:
        """Give the ports that no serial line may have."""
        # Asked by the database's thread too, while the loop's adds and removes some.
        return {held.port for held in tuple(self._held) if held.protocol == "tcp"}

    async def prepare(self) -> None:
        """Take the ports of the vms there are."""
        for info in await self.list():
            host = _host_port(info)
            try:
                self._held[host] = hold_port(host.protocol, host.address, host.port)
            except CloudError as error:
                _log.warning("port %s of vm %s: %s", host, info.vm, error.message)
                self._held[host] = None

    async def close(self) -> None:
        """Let go of the ports; what is forwarded stays so."""
        self._rules.close()
        for held in self._held.values():
            if held is not None:
                held.close()
        self._held.clear()

    async def sync(self) -> None:
        """Make the host's rules like the rows; may be called at any time."""
        async with self._applying:
            self._is_behind = True
            forwards, bridges = await self._database.run_when_available(_read_forwards)
            with self._rules.own_change():
                self._awaited = await apply_forwards(forwards, bridges)
            self._is_behind = False

    def awaits(self, bridge: str) -> bool:
        """Tell whether the rules were made before a bridge of theirs, and `sync` is due."""
        return bridge in self._awaited

    async def keep(self) -> None:
        """Put the rules back whenever somebody else has changed them, until cancelled."""
        await keep_as_it_was("the table of forwarded ports", self._rules, self._put_back)

    @asynccontextmanager
    async def reserving(self, specs: Sequence[PortSpec]) -> AsyncIterator[None]:
        """Hold these ports of the host for rows that are inserted inside; else they are let go.

        Raises InUseError with who has one, as far as that can be seen.
        """
        if not specs:
            yield
            return
        async with self._reserving:
            taken: list[HostPort] = []
            try:
                for spec in specs:
                    self._held[spec.host] = await self._hold(spec.host, taken)
                    taken.append(spec.host)
                yield
            except BaseException:
                self._let_go(taken)
                raise

    async def add(self, key: int | str, spec: PortSpec) -> PortInfo:
        """Forward a port of the host to a vm."""

        def insert() -> PortInfo:
            vm = read_vm(key)
            if vm.state == VmState.DELETING:
                raise InvalidStateError(f"vm {vm.name!r} is being removed", state=vm.state)
            insert_ports(vm.id, vm.name, [spec])
            return _read(Port.spec == str(spec))[0]

        async with self.reserving([spec]):
            info = await self._database.run(insert)
            self._changes.announce()
            try:
                await self.sync()
            except CloudError:
                await self._database.run(lambda: _delete(Port.spec == str(spec)))
                raise
        return info

    async def list(self, key: int | str | None = None) -> Sequence[PortInfo]:
        """Describe every forwarded port, or those of one vm, by the host's port."""

        def read() -> list[PortInfo]:
            return _read() if key is None else _read(Port.vm == read_vm(key).id)

        return await self._database.run(read)

    async def delete(self, name: PortName) -> PortInfo:
        """Forward a port no longer; raises NotFoundError."""

        [info] = await self._forget(lambda: Port.spec == str(_spec(_find(name))))
        return info

    async def forget(self, vm: VmRecord) -> None:
        """Forward nothing to a vm that is being removed; may be called again."""
        await self._forget(lambda: Port.vm == vm.id)
        await self.end_connections(vm.nics)

    async def end_connections(self, nics: Iterable[NicRecord]) -> None:
        """End what is open from or to cards that go: it is not for who has their addresses next."""
        for address in (address for nic in nics for address in nic.addresses):
            await _end_connections(partial(end_connections_of, address))

    async def _forget(self, choose: Callable[[], Expression]) -> Sequence[PortInfo]:
        """Remove what `choose` gives in a transaction, and let go of it; give what it was."""

        def delete() -> list[PortInfo]:
            condition = choose()
            infos = _read(condition)
            _delete(condition)
            return infos

        infos = await self._database.run(delete)
        if infos:
            self._changes.announce()
            # Before the rules go: a loss of what nobody wants any more is none.
            self._let_go([_host_port(info) for info in infos])
        if infos or self._is_behind:
            await self.sync()
        for info in infos:
            host, guest = _host_port(info), IPv4Address(info.guest_address)
            open_to = (host.protocol, host.address, host.port, guest, info.guest_port)
            await _end_connections(partial(end_forwarded, *open_to))
        return infos

    async def _hold(self, host: HostPort, taken: Collection[HostPort]) -> socket.socket | None:
        if any(host.overlaps(other) for other in taken):
            raise InvalidArgumentError(
                f"port {host} is given twice",
                hint="0.0.0.0 has the ports of every address",
                parameter="publish",
            )
        await self._database.run(lambda: _check_free(host))
        try:
            held = hold_port(host.protocol, host.address, host.port)
        except InUseError as error:
            holder = await find_port_holder(host.protocol, host.address, host.port)
            raise _in_use(host, holder) from error
        if held is None:  # not ours to bind: then only who listens is seen
            holder = await find_port_holder(host.protocol, host.address, host.port)
            if holder is not None:
                raise _in_use(host, holder)
        return held

    def _let_go(self, hosts: Sequence[HostPort]) -> None:
        for host in hosts:
            held = self._held.pop(host, None)
            if held is not None:
                held.close()

    async def _put_back(self) -> None:
        if self._held:
            _log.warning("the rules of forwarded ports were taken away: put back")
            await self.sync()


def insert_ports(vm_id: int, vm_name: str, specs: Sequence[PortSpec]) -> None:
    """Write down that ports are forwarded to a vm, inside a transaction."""
    for spec in specs:
        _check_free(spec.host)
        Port.create(
            vm=vm_id,
            spec=str(spec),
            protocol=spec.host.protocol,
            host_address=str(spec.host.address),
            host_port=spec.host.port,
            guest_port=spec.guest_port,
            created_at=time.time(),
        )
        _tell(vm_id, vm_name, str(spec), "added")


async def _end_connections(end: Callable[[], int]) -> None:
    """End connections; without, they go on until they end by themselves."""
    try:
        await asyncio.to_thread(end)
    except CloudError as error:
        _log.warning("%s", error.message)


def _in_use(host: HostPort, holder: str | None) -> InUseError:
    by = "" if holder is None else f" by {holder}"
    return InUseError(f"port {host} is in use{by}", hint="choose another port of the host")


def _check_free(host: HostPort) -> None:
    """Raise InUseError if a vm has this port of the host already, inside a transaction."""
    same = (Port.protocol == host.protocol) & (Port.host_port == host.port)
    for info in _read(same):
        if host.overlaps(_host_port(info)):
            raise InUseError(
                f"port {host} is forwarded to vm {info.vm!r} already, as {info.name}",
                hint=f"choose another port of the host, or: oscloudctl port-delete {info.name}",
            )
    is_local = host.address.is_loopback or host.address == EVERYWHERE
    serial = Vm.select(Vm.name).where(Vm.qemu_serial_port == host.port).tuples().first()
    if serial is not None and is_local and host.protocol == "tcp":
        raise InUseError(
            f"port {host} is the serial port of vm {serial[0]!r}",
            hint="choose another port of the host",
        )


def _read(condition: Expression | None = None) -> list[PortInfo]:
    """Read forwarded ports, inside a transaction."""
    query = (
        Port.select(
            Vm.name, Port.protocol, Port.host_address, Port.host_port, Vm.ip, Port.guest_port
        )
        .join(Vm)
        .order_by(Port.host_port, Port.host_address, Port.protocol)
    )
    rows = (query if condition is None else query.where(condition)).tuples()
    return [
        PortInfo(f"{address}:{port}/{protocol}", vm, protocol, address, port, guest, guest_port)
        for vm, protocol, address, port, guest, guest_port in rows
    ]


def _find(name: PortName) -> PortInfo:
    """Give the forwarded port that is meant, inside a transaction."""
    same = (Port.protocol == name.protocol) & (Port.host_port == name.port)
    found = [info for info in _read(same) if name.address in (None, _host_port(info).address)]
    if not found:
        raise missing("port", f"{name.port}/{name.protocol}")
    if len(found) > 1:
        raise InvalidArgumentError(
            f"port {name.port}/{name.protocol} is forwarded at several addresses",
            hint=f"name one of: {', '.join(info.name for info in found)}",
            parameter="port",
        )
    return found[0]


def _delete(condition: Expression) -> None:
    """Remove rows and say so, inside a transaction."""
    query = Port.select(Port.id, Port.vm, Vm.name, Port.spec).join(Vm).where(condition)
    for port_id, vm_id, vm_name, spec in list(query.tuples()):
        Port.delete().where(Port.id == port_id).execute()
        _tell(vm_id, vm_name, spec, "deleted")


def _tell(vm_id: int, vm_name: str, spec: str, change: str) -> None:
    insert_event(EventKind.PORT, vm_name, {"port": spec, "change": change}, vm_id=vm_id)


def _host_port(info: PortInfo) -> HostPort:
    return HostPort(info.protocol, IPv4Address(info.host_address), info.host_port)


def _spec(info: PortInfo) -> PortSpec:
    return PortSpec(_host_port(info), info.guest_port)


def _read_forwards() -> tuple[list[Forward], list[str]]:
    """Give what is to be forwarded, and the bridges there may be, inside a transaction."""
    networks = {
        network_id: (f"oscbr{index}", IPv4Network(f"{ip}/{mask}"))
        for network_id, index, ip, mask in Network.select(
            Network.id, Network.bridge_interface_idx, Network.ip, Network.mask
        ).tuples()
    }
    rows = Port.select(
        Port.protocol, Port.host_address, Port.host_port, Vm.ip, Port.guest_port, Vm.network
    ).join(Vm)
    forwards = [
        Forward(
            protocol, IPv4Address(address), port, IPv4Address(guest), guest_port, *networks[network]
        )
        for protocol, address, port, guest, guest_port, network in rows.tuples()
    ]
    return forwards, [bridge for bridge, _ in networks.values()]
