"""Networks: a subnet, a bridge with its gateway address, and the way out through the host.

The first one, `default`, is made at first start. A bridge comes up with the first vm that needs
it, and what is up is put back in order whenever it is needed again.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from ipaddress import IPv4Network

import msgspec
from peewee import fn

from oscloudd.cloud.allocation import gateway_of
from oscloudd.cloud.missing import missing
from oscloudd.cloud.names import Names
from oscloudd.config import Config
from oscloudd.host.network.bridges import Bridge, ensure_bridge
from oscloudd.host.network.firewall import (
    GuestNetwork,
    apply_ruleset,
    ensure_forwarding,
    find_ruleset_bridges,
)
from oscloudd.host.network.resolvers import host_resolvers
from oscloudd.host.network.routes import find_free_subnet
from oscloudd.store.database import Database
from oscloudd.store.models import Network, Vm
from oscloudd.units import is_possible_id, parse_key

_log = logging.getLogger(__name__)
DEFAULT_NETWORK = "default"


@dataclass(frozen=True)
class NetworkRecord:
    """A network as its row has it."""

    id: int
    name: str
    subnet: IPv4Network
    bridge_index: int
    dns: tuple[str, ...]
    created_at: float

    @property
    def bridge(self) -> str:
        """The bridge's interface name."""
        return f"oscbr{self.bridge_index}"

    @property
    def gateway(self) -> str:
        """The host's own address in it."""
        return str(gateway_of(self.subnet))


class NetworkInfo(msgspec.Struct, frozen=True):
    """The answer of `network_info`."""

    id: int
    name: str
    subnet: str
    gateway: str
    mask: int
    bridge: str
    dns: list[str]
    addresses_used: int
    vms: list[str]
    created_at: float


def read_network(key: int | str) -> NetworkRecord:
    """Read a network by id or name, inside a transaction; raises NotFoundError."""
    key = parse_key(key)
    condition = Network.id == key if isinstance(key, int) else Network.name == key
    known = isinstance(key, str) or is_possible_id(key)
    row = Network.get_or_none(condition) if known else None
    if row is None:
        raise missing("network", key)
    return _record(row)


def _record(row: Network) -> NetworkRecord:
    return NetworkRecord(
        id=row.id,
        name=row.name,
        subnet=IPv4Network(f"{row.ip}/{row.mask}"),
        bridge_index=row.bridge_interface_idx,
        dns=tuple(row.dns.split()),
        created_at=row.created_at,
    )


def _read_guest_networks() -> list[GuestNetwork]:
    records = [_record(row) for row in Network.select()]
    return [GuestNetwork(record.bridge, record.subnet) for record in records]


class Networks:
    """All networks of this cloud and their bridges on this host."""

    def __init__(self, config: Config, database: Database, names: Names) -> None:
        self._config = config
        self._names = names
        self._database = database
        self._host = asyncio.Lock()
        self._known_up: set[int] = set()
        self._checked: dict[int, float] = {}

    async def ensure_default(self) -> None:
        """Make the network `default` unless there is one, on a subnet the host does not use yet."""

        def exists() -> bool:
            return bool(Network.select().where(Network.name == DEFAULT_NETWORK).exists())

        if await self._database.run(exists):
            return
        wanted = self._config.network.subnet_network()
        subnet = await find_free_subnet(wanted)
        if subnet != wanted:
            _log.warning("%s overlaps a route of this host: network default is %s", wanted, subnet)

        def insert() -> None:
            Network.create(
                name=DEFAULT_NETWORK,
                ip=str(subnet.network_address),
                mask=subnet.prefixlen,
                bridge_interface_idx=0,
                dns=" ".join(self._config.network.dns),
                created_at=time.time(),
            )

        await self._database.run(insert)

    async def ensure_up(
        self, network: NetworkRecord, *, checked_within_seconds: float = 0.0
    ) -> None:
        """Bring up the network's bridge and the firewall of all networks; may be called again.

        One that was looked at within so many seconds is not looked at again.
        """
        async with self._host:
            now = time.monotonic()
            if now - self._checked.get(network.id, -math.inf) < checked_within_seconds:
                return
            gateway = gateway_of(network.subnet)
            bridge = Bridge(network.bridge, gateway, network.subnet.prefixlen)
            await ensure_bridge(bridge)
            if network.id not in self._known_up:
                await asyncio.to_thread(ensure_forwarding)
                await apply_ruleset(await self._database.run(_read_guest_networks))
                self._known_up.add(network.id)
            if not network.dns:
                await self._names.serve(network.bridge, network.subnet)
            self._checked[network.id] = now

    async def forget_gone(self) -> list[str]:
        """Take networks that have no row out of the firewall, and give their bridges."""
        async with self._host:
            there = await find_ruleset_bridges()
            networks = await self._database.run(_read_guest_networks)
            gone = (there or set()) - {network.bridge for network in networks}
            if gone:
                await apply_ruleset(networks)
            return sorted(gone)

    def resolvers(self, network: NetworkRecord) -> tuple[str, ...]:
        """Give the name servers its guests are told."""
        if network.dns or self._names.is_available:
            return network.dns or (network.gateway,)
        return tuple(str(address) for address in host_resolvers())

    async def list(self) -> list[NetworkInfo]:
        """Describe every network."""
        return await self._database.run(
            lambda: [self._describe(_record(row)) for row in Network.select().order_by(Network.id)]
        )

    async def info(self, key: int | str) -> NetworkInfo:
        """Describe one network; raises NotFoundError."""
        return await self._database.run(lambda: self._describe(read_network(key)))

    def _describe(self, network: NetworkRecord) -> NetworkInfo:
        names = Vm.select(Vm.name).where(Vm.network == network.id).order_by(Vm.id).tuples()
        used = Vm.select(fn.COUNT(Vm.id)).where(Vm.network == network.id).scalar()
        return NetworkInfo(
            id=network.id,
            name=network.name,
            subnet=str(network.subnet),
            gateway=network.gateway,
            mask=network.subnet.prefixlen,
            bridge=network.bridge,
            dns=list(self.resolvers(network)),
            addresses_used=int(used),
            vms=[name for (name,) in names],
            created_at=network.created_at,
        )
