"""Networks: a subnet, a bridge with its gateway address, and the way out through the host.

The first one, `default`, is made at first start. A bridge comes up with the first vm that needs
it, and what is up is put back in order whenever it is needed again.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Interface, IPv6Network

import msgspec

from oscloudd.cloud.allocation import address6_of, count_addresses, gateway_of
from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.missing import missing
from oscloudd.cloud.names import Names
from oscloudd.cloud.nic_records import NicRecord, read_owned_nics
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.config import Config
from oscloudd.errors import HostError, InvalidStateError
from oscloudd.host.network.bridges import Bridge, ensure_bridge, remove_bridge
from oscloudd.host.network.forwarding import ensure_forwarding, ensure_forwarding6, has_ipv6
from oscloudd.host.network.neighbours import delete_neighbour, set_neighbour
from oscloudd.host.network.resolvers import host_resolvers
from oscloudd.host.network.routes import find_free_subnet
from oscloudd.store.database import Database
from oscloudd.store.models import Network
from oscloudd.store.subnet6 import draw_subnet6
from oscloudd.units import is_possible_id, parse_key

_log = logging.getLogger(__name__)
DEFAULT_NETWORK = "default"


@dataclass(frozen=True)
class NetworkRecord:
    """A network as its row has it."""

    id: int
    name: str
    subnet: IPv4Network
    subnet6: IPv6Network | None
    bridge_index: int
    dns: tuple[str, ...]
    isolated: bool
    nat: bool
    created_at: float

    @property
    def bridge(self) -> str:
        """The bridge's interface name."""
        return f"oscbr{self.bridge_index}"

    @property
    def gateway(self) -> str:
        """The host's own address in it."""
        return str(gateway_of(self.subnet))

    @property
    def gateway6(self) -> str | None:
        """The host's own IPv6 address in it, if it has any."""
        if self.subnet6 is None:
            return None
        return str(address6_of(self.subnet6, self.subnet, gateway_of(self.subnet)))

    def address6(self, ip: str) -> str:
        """Give the IPv6 address beside `ip`, with its prefix length; "" where it has no prefix."""
        if self.subnet6 is None:
            return ""
        address = address6_of(self.subnet6, self.subnet, IPv4Address(ip))
        return f"{address}/{self.subnet6.prefixlen}"


class NetworkInfo(msgspec.Struct, frozen=True):
    """The answer of `network_info`."""

    id: int
    name: str
    subnet: str
    gateway: str
    subnet6: str | None  # a /64; a vm's address in it follows from its other one
    gateway6: str | None
    mask: int
    bridge: str
    isolated: bool
    nat: bool
    dns: list[str]  # what a new vm is told to ask
    upstream: list[str]  # whom its name server asks: those it was made with; none: as the host does
    addresses_used: int
    addresses_free: int
    vms: list[str]
    addresses: list[str]  # of `vms`, in their order
    rules: list[str]  # what the firewall says, in words
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


def read_networks() -> list[NetworkRecord]:
    """Read every network, inside a transaction."""
    return [_record(row) for row in Network.select().order_by(Network.id)]


def _record(row: Network) -> NetworkRecord:
    return NetworkRecord(
        id=row.id,
        name=row.name,
        subnet=IPv4Network(f"{row.ip}/{row.mask}"),
        subnet6=None if row.subnet6 is None else IPv6Network(row.subnet6),
        bridge_index=row.bridge_interface_idx,
        dns=tuple(row.dns.split()),
        isolated=row.isolated,
        nat=row.nat,
        created_at=row.created_at,
    )


def takes_ipv6(template: ReadyTemplate) -> bool:
    """Tell whether a new guest is told IPv6 addresses.

    It is told none that it or this box could not use: whoever finds it by name would try that
    first.
    """
    return template.declaration.guest.takes_ipv6 and has_ipv6()


class Networks:
    """All networks of this cloud and their bridges on this host."""

    def __init__(
        self, config: Config, database: Database, firewall: Firewall, names: Names
    ) -> None:
        self._names = names
        self._config = config
        self._database = database
        self._firewall = firewall
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
                subnet6=str(draw_subnet6()),
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
            await ensure_bridge(_bridge_of(network))
            if network.id not in self._known_up:
                await asyncio.to_thread(_ensure_forwarding)
                await self._firewall.apply()
                self._known_up.add(network.id)
            await self._names.serve(
                network.bridge, network.subnet, isolated=network.isolated, upstream=network.dns
            )
            self._checked[network.id] = now

    async def admit(self, nics: Sequence[NicRecord]) -> None:
        """Have cards' addresses known on the host, and allowed to come from their taps."""
        # The kernel asks for an address it does not know once a second only, and a booting guest
        # misses most of that; and an address that is fixed can't be taken over by another guest.
        for nic in nics:
            for address in nic.addresses:
                set_neighbour(nic.bridge, address, nic.mac)
        await self._firewall.admit(nics)

    async def expel(
        self, nics: Sequence[NicRecord], forget: Callable[[], None] | None = None
    ) -> None:
        """Forget what `admit` said of cards that go, and then, in a transaction, their rows."""
        for nic in nics:
            for address in nic.addresses:
                delete_neighbour(nic.bridge, address)
        await self._firewall.expel(nics, forget)

    async def take_down(self, forget: Callable[[], int]) -> NetworkRecord:
        """Remove the bridge and the rules of a network.

        `forget` takes its row away in a transaction, or refuses to; it gives the network's id.
        """

        def take_row() -> NetworkRecord:
            records = {network.id: network for network in read_networks()}
            return records[forget()]

        # A network that is made meanwhile gets another bridge: this one's name is still taken.
        async with self._host:
            network = await self._database.run(take_row)
            self._checked.pop(network.id, None)
            await self._names.end(network.bridge, network.subnet)
            await remove_bridge(network.bridge)
            if network.id in self._known_up:
                self._known_up.remove(network.id)
                await self._firewall.apply()
            return network

    async def remove_gone(self, bridges: Sequence[str]) -> Sequence[str]:
        """Remove those of these bridges that no network has; give which."""
        # None of them can come up meanwhile, for a network that has just been made.
        async with self._host:
            rows = Network.select(Network.bridge_interface_idx)
            indices = await self._database.run(lambda: [index for (index,) in rows.tuples()])
            gone = sorted(set(bridges) - {f"oscbr{index}" for index in indices})
            for bridge in gone:
                await remove_bridge(bridge)
            return gone

    def resolvers(self, network: NetworkRecord) -> tuple[str, ...]:
        """Give the name servers its guests are told: its own, or those it would ask."""
        if self._names.is_available:
            return (network.gateway,)
        if network.dns or network.isolated:
            return network.dns
        return tuple(str(address) for address in host_resolvers())

    def check_serves_dhcp(self) -> None:
        """Raise InvalidStateError where nobody would tell a guest its address."""
        if not self._names.is_available:
            raise InvalidStateError(
                "guests of this image ask for their address by DHCP, and dnsmasq is not installed",
                hint="apt-get install dnsmasq-base",
            )

    async def list(self) -> list[NetworkInfo]:
        """Describe every network."""
        return await self._database.run(
            lambda: [self._describe(network) for network in read_networks()]
        )

    async def info(self, key: int | str) -> NetworkInfo:
        """Describe one network; raises NotFoundError."""
        return await self._database.run(lambda: self._describe(read_network(key)))

    def _describe(self, network: NetworkRecord) -> NetworkInfo:
        nics = read_owned_nics(network.id)
        return NetworkInfo(
            id=network.id,
            name=network.name,
            subnet=str(network.subnet),
            gateway=network.gateway,
            subnet6=None if network.subnet6 is None else str(network.subnet6),
            gateway6=network.gateway6,
            mask=network.subnet.prefixlen,
            bridge=network.bridge,
            isolated=network.isolated,
            nat=network.nat,
            dns=list(self.resolvers(network)),
            upstream=list(network.dns),
            addresses_used=len(nics),
            addresses_free=count_addresses(network.subnet) - len(nics),
            vms=[nic.vm for nic in nics],
            addresses=[nic.ip for nic in nics],
            rules=_describe_rules(network),
            created_at=network.created_at,
        )


def _bridge_of(network: NetworkRecord) -> Bridge:
    interface6 = None
    if network.subnet6 is not None and has_ipv6():
        interface6 = IPv6Interface(f"{network.gateway6}/{network.subnet6.prefixlen}")
    gateway = gateway_of(network.subnet)
    return Bridge(network.bridge, gateway, network.subnet.prefixlen, interface6)


def _ensure_forwarding() -> None:
    ensure_forwarding()
    try:
        if has_ipv6():
            ensure_forwarding6()
    except HostError as error:  # all that matters works without
        _log.warning("guests reach the outside by IPv4 only: %s", error.message)


def _describe_rules(network: NetworkRecord) -> list[str]:
    if network.isolated:
        outside = "guests reach nothing outside, and nothing there reaches them"
    elif network.nat:
        outside = "guests reach the outside behind the host's address; only answers come back"
    else:
        outside = "guests reach the outside under their own addresses, and are reached at them"
    gateways = " and ".join(filter(None, (network.gateway, network.gateway6)))
    return [
        "a guest sends with its own MAC and addresses only",
        f"guests reach each other, and of the host ping, DNS and DHCP at {gateways}",
        "guests and those of other networks don't reach each other",
        outside,
    ]
