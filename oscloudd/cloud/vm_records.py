"""A vm as the database has it, and as users are shown it.

Everything is read in one query and handed out as immutable records: a peewee model used outside
its transaction would ask the database again, from the wrong thread.
"""

import time
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

import msgspec

from oscloudd.cloud.allocation import gateway_of
from oscloudd.cloud.states import VmState
from oscloudd.errors import NotFoundError
from oscloudd.host.processes import ProcessIdentity
from oscloudd.store.models import Disk, Network, Vm
from oscloudd.units import is_possible_id, parse_key


class VmInfo(msgspec.Struct, frozen=True):
    """The answer of `vm_info`: sizes in bytes, times in seconds since 1970."""

    id: int
    name: str
    state: str
    wanted_state: str
    reason: str
    os: str
    network: str
    ip: str
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
    created_at: float
    owner_uid: int
    uuid: str
    ssh_host_keys: list[str]


@dataclass(frozen=True)
class VmRecord:
    """One vm with what belongs to it."""

    id: int
    name: str
    uuid: str
    disk_id: int
    disk_size: int
    template: str
    network_id: int
    network: str
    network_ip: str
    network_mask: int
    bridge_index: int
    mem_size: int
    cpus: int
    ip: str
    mac: str
    tap_index: int
    serial_port: int
    state: str
    wanted_state: str
    reason: str
    ready: bool
    started: str
    started_at: float | None
    accelerator: str
    pid: int | None
    start_ticks: int | None
    boot_id: str | None
    host_keys: str
    identified: bool
    owner_uid: int
    autostart: str
    restart: str
    created_at: float

    @property
    def tap(self) -> str:
        """The name of its network interface on the host."""
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


_COLUMNS = (
    Vm.id,
    Vm.name,
    Vm.uuid,
    Disk.id,
    Disk.size,
    Disk.template_name,
    Network.id,
    Network.name,
    Network.ip,
    Network.mask,
    Network.bridge_interface_idx,
    Vm.mem_size,
    Vm.cpus,
    Vm.ip,
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
    Vm.created_at,
)


def _query() -> Any:
    return Vm.select(*_COLUMNS).join(Disk).switch(Vm).join(Network).order_by(Vm.id)


def read_vms() -> list[VmRecord]:
    """Read every vm, inside a transaction."""
    return [VmRecord(*row) for row in _query().tuples()]


def find_vm(vm_id: int) -> VmRecord | None:
    """Read the vm of this id, inside a transaction."""
    row = _query().where(Vm.id == vm_id).tuples().first()
    return None if row is None else VmRecord(*row)


def read_vm(key: int | str) -> VmRecord:
    """Read a vm by id or name, inside a transaction; raises NotFoundError."""
    key = parse_key(key)
    condition = Vm.id == key if isinstance(key, int) else Vm.name == key
    in_range = isinstance(key, str) or is_possible_id(key)
    row = _query().where(condition).tuples().first() if in_range else None
    if row is None:
        raise NotFoundError(
            f"vm {str(key)[:80]!r} not found",
            hint="see: oscloudctl vm-list",
            object="vm",
            name=str(key)[:80],
        )
    return VmRecord(*row)


def describe(vm: VmRecord) -> VmInfo:
    """Give what users are shown."""
    running = vm.started_at is not None and vm.pid is not None
    subnet = IPv4Network(f"{vm.network_ip}/{vm.network_mask}")
    return VmInfo(
        id=vm.id,
        name=vm.name,
        state=vm.state,
        wanted_state=vm.wanted_state,
        reason=vm.reason,
        os=vm.template,
        network=vm.network,
        ip=vm.ip,
        gateway=str(gateway_of(subnet)),
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
        created_at=vm.created_at,
        owner_uid=vm.owner_uid,
        uuid=vm.uuid,
        ssh_host_keys=vm.host_keys.splitlines(),
    )
