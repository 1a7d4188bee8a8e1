"""A vm as the database has it, and as users are shown it.

Everything is read in one query and handed out as immutable records: a peewee model used outside
its transaction would ask the database again, from the wrong thread.
"""

import time
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import msgspec
from peewee import fn

from oscloudd.cloud.missing import missing
from oscloudd.cloud.nic_records import (
    FIRST_SLOT,
    NicRecord,
    read_all_other_nics,
    read_other_nics,
)
from oscloudd.cloud.states import VmState
from oscloudd.host.processes import ProcessIdentity, is_same_process
from oscloudd.store.models import Disk, Network, Port, Vm, database_proxy
from oscloudd.units import is_possible_id, parse_key


class NicTraffic(msgspec.Struct, frozen=True):
    """What a running guest has received and sent by a card since that was plugged in."""

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int


class NicInfo(msgspec.Struct, frozen=True):
    """A network card as it is shown; only `vm_info` counts, and only while the vm runs."""

    slot: int
    network: str
    ip: str
    ip6: str | None
    mac: str
    tap: str
    rx_bytes: int | None = None
    rx_packets: int | None = None
    tx_bytes: int | None = None
    tx_packets: int | None = None


class VmInfo(msgspec.Struct, frozen=True):
    """The answer of `vm_info`: sizes in bytes, times in seconds since 1970.

    `network`, `ip`, `ip6`, `gateway`, `mac` and `nic` are its first card's; `ip6` is null where its
    guest is told none. `bandwidth` is each card's, in bits a second, null for no limit. `nic` is in
    that answer only, and null for a vm that does not run.
    """

    id: int
    name: str
    state: str
    wanted_state: str
    reason: str
    os: str
    network: str
    ip: str
    ip6: str | None
    gateway: str
    mac: str
    mem_size: int
    disk_size: int
    disk: int
    cpus: int
    accelerator: str
    started: str
    ready: bool
    pid: int | None
    uptime_seconds: float | None
    serial_port: int
    autostart: str
    restart: str
    protect: bool
    created_at: float
    owner_uid: int
    uuid: str
    ssh_host_keys: list[str]
    timings: dict[str, float]
    ports: list[str]
    bandwidth: int | None
    nics: list[NicInfo]
    nic: NicTraffic | msgspec.UnsetType | None = msgspec.UNSET


class VmRecord(msgspec.Struct, frozen=True):
    """One vm with what belongs to it."""

    id: int
    name: str
    uuid: str
    disk_id: int
    disk_size: int
    template: str
    warm_image: str | None
    is_disk_kept: int  # 0 or 1, as SQLite has it; so are all that say whether
    layer_id: int | None
    network_id: int
    network: str
    network_ip: str
    network_mask: int
    network_subnet6: str | None
    bridge_index: int
    mem_size: int
    cpus: int
    ip: str
    dual_stack: int
    mac: str
    tap_index: int
    serial_port: int
    state: str
    wanted_state: str
    reason: str
    ready: int
    started: str
    started_at: float | None
    accelerator: str
    pid: int | None
    start_ticks: int | None
    boot_id: str | None
    host_keys: str
    identified: int
    owner_uid: int
    autostart: str
    restart: str
    protect: int
    timings: str
    created_at: float
    ports: str | None  # forwarded ones, with commas between
    bandwidth: int  # bits a second, 0 for any
    other_nics: tuple[NicRecord, ...] = ()

    @property
    def nics(self) -> tuple[NicRecord, ...]:
        """All its network cards, by slot."""
        first = NicRecord(
            id=None,
            slot=FIRST_SLOT,
            network_id=self.network_id,
            network=self.network,
            network_ip=self.network_ip,
            network_mask=self.network_mask,
            network_subnet6=self.network_subnet6,
            bridge_index=self.bridge_index,
            ip=self.ip,
            mac=self.mac,
            tap_index=self.tap_index,
            dual_stack=self.dual_stack,
        )
        return (first, *self.other_nics)

    @property
    def tap(self) -> str:
        """The name of its first card's network interface on the host."""
        return f"osctap{self.tap_index}"

    @property
    def bridge(self) -> str:
        """The bridge the tap is a port of."""
        return f"oscbr{self.bridge_index}"

    @property
    def process(self) -> ProcessIdentity | None:
        """Which qemu it ran as when last heard of."""
        if self.pid is None or self.start_ticks is None or self.boot_id is None:
            return None
        return ProcessIdentity(self.pid, self.start_ticks, self.boot_id)

    def is_process_alive(self) -> bool:
        """Tell whether that very qemu still runs; False where none is written down."""
        return self.process is not None and is_same_process(self.process)


_COLUMNS = (
    Vm.id,
    Vm.name,
    Vm.uuid,
    Disk.id,
    Disk.size,
    Disk.template_name,
    Disk.warm_image,
    Disk.is_kept,
    Disk.layer_id,
    Network.id,
    Network.name,
    Network.ip,
    Network.mask,
    Network.subnet6,
    Network.bridge_interface_idx,
    Vm.mem_size,
    Vm.cpus,
    Vm.ip,
    Vm.dual_stack,
    Vm.mac,
    Vm.tap_interface_idx,
    Vm.qemu_serial_port,
    Vm.state,
    Vm.wanted_state,
    Vm.reason,
    Vm.ready,
    Vm.started,
    Vm.started_at,
    Vm.accelerator,
    Vm.qemu_pid,
    Vm.qemu_start_ticks,
    Vm.qemu_boot_id,
    Vm.host_keys,
    Vm.identified,
    Vm.owner_uid,
    Vm.autostart,
    Vm.restart,
    Vm.protect,
    Vm.timings,
    Vm.created_at,
    Port.select(fn.GROUP_CONCAT(Port.spec)).where(Port.vm == Vm.id),
    Vm.bandwidth,
)


@cache
def _statement(key: Literal["id", "name"] | None) -> str:
    # peewee takes ten times as long to write this query as SQLite takes to answer it for one vm,
    # and 9 ms to convert a thousand rows; so it writes it once, and rows are used as they come.
    query = Vm.select(*_COLUMNS).join(Disk).switch(Vm).join(Network).order_by(Vm.id)
    if key is not None:
        query = query.where(getattr(Vm, key) == "")
    return str(query.sql()[0])


def read_vms() -> list[VmRecord]:
    """Read every vm, inside a transaction."""
    others = read_all_other_nics()
    return [
        _record(row, tuple(others.get(row[0], ())))
        for row in database_proxy.execute_sql(_statement(None))
    ]


def find_vm(vm_id: int) -> VmRecord | None:
    """Read the vm of this id, inside a transaction."""
    row = database_proxy.execute_sql(_statement("id"), (vm_id,)).fetchone()
    return None if row is None else _record(row, read_other_nics(vm_id))


def read_vm(key: int | str) -> VmRecord:
    """Read a vm by id or name, inside a transaction; raises NotFoundError."""
    key = parse_key(key)
    statement = _statement("id" if isinstance(key, int) else "name")
    in_range = isinstance(key, str) or is_possible_id(key)
    row = database_proxy.execute_sql(statement, (key,)).fetchone() if in_range else None
    if row is None:
        raise missing("vm", key)
    return _record(row, read_other_nics(row[0]))


def _record(row: Iterable[Any], other_nics: tuple[NicRecord, ...]) -> VmRecord:
    return VmRecord(*(*row, other_nics))


def describe(vm: VmRecord) -> VmInfo:
    """Give what users are shown."""
    running = vm.started_at is not None and vm.pid is not None
    cards = vm.nics
    nics = [NicInfo(nic.slot, nic.network, nic.ip, nic.ip6, nic.mac, nic.tap) for nic in cards]
    return VmInfo(
        id=vm.id,
        name=vm.name,
        state=vm.state,
        wanted_state=vm.wanted_state,
        reason=vm.reason,
        os=vm.template,
        network=vm.network,
        ip=vm.ip,
        ip6=nics[0].ip6,
        gateway=cards[0].gateway,
        mac=vm.mac,
        mem_size=vm.mem_size,
        disk_size=vm.disk_size,
        disk=vm.disk_id,
        cpus=vm.cpus,
        accelerator=vm.accelerator,
        started=vm.started,
        ready=bool(vm.ready) and vm.state == VmState.RUNNING,
        pid=vm.pid,
        uptime_seconds=max(0.0, time.time() - vm.started_at) if running and vm.started_at else None,
        serial_port=vm.serial_port,
        autostart=vm.autostart,
        restart=vm.restart,
        protect=bool(vm.protect),
        created_at=vm.created_at,
        owner_uid=vm.owner_uid,
        uuid=vm.uuid,
        ssh_host_keys=vm.host_keys.splitlines(),
        timings=msgspec.json.decode(vm.timings, type=dict[str, float]),
        ports=sorted(vm.ports.split(",")) if vm.ports else [],
        bandwidth=vm.bandwidth or None,
        nics=nics,
    )
