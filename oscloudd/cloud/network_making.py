"""Networks that people make and delete.

Making one is a row, and deleting one takes the row away first: its bridge comes up with the first
vm in it, and what is left of it when a daemon dies in between is swept out with the leftovers.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

import msgspec

from oscloudd.cloud.allocation import first_free_index, gateway_of
from oscloudd.cloud.changes import Changes
from oscloudd.cloud.events import EventKind, insert_event
from oscloudd.cloud.networks import (
    DEFAULT_NETWORK,
    NetworkInfo,
    NetworkRecord,
    Networks,
    read_network,
    read_networks,
)
from oscloudd.cloud.nic_records import read_owned_nics
from oscloudd.errors import AlreadyExistsError, InUseError, InvalidArgumentError
from oscloudd.host.network.links import numbers_in_use
from oscloudd.host.network.routes import (
    Route,
    find_next_subnet,
    find_overlap,
    list_foreign_routes,
    overlaps,
)
from oscloudd.store.database import Database
from oscloudd.store.models import Network

# So many vms are named in the error.
_NAMED_VMS = 10


@dataclass(frozen=True)
class NetworkRequest:
    """What is asked for, checked as far as it can be without looking at anything."""

    name: str
    subnet: IPv4Network | None  # None is the next free /24
    subnet6: IPv6Network | None  # None is none
    isolated: bool
    nat: bool
    dns: tuple[str, ...]


class NetworkDeleted(msgspec.Struct, frozen=True):
    """The answer of `network_delete`."""

    id: int
    name: str


class NetworkMaker:
    """Makes and deletes networks."""

    def __init__(self, database: Database, networks: Networks, changes: Changes) -> None:
        self._database = database
        self._networks = networks
        self._changes = changes

    async def create(self, request: NetworkRequest) -> NetworkInfo:
        """Make a network; raises InUseError where its subnet overlaps another or a route."""
        routes = await list_foreign_routes()
        await self._database.run(lambda: _insert(request, routes))
        self._changes.announce()
        return await self._networks.info(request.name)

    async def delete(self, key: int | str) -> NetworkDeleted:
        """Delete a network that no vm is in, its bridge and its rules; raises InUseError."""
        gone = await self._networks.take_down(lambda: _delete(key))
        self._changes.announce()
        return NetworkDeleted(gone.id, gone.name)


def _insert(request: NetworkRequest, routes: list[Route]) -> None:
    networks = read_networks()
    indices = numbers_in_use("oscbr") | {network.bridge_index for network in networks}
    if request.name in {network.name for network in networks}:
        raise AlreadyExistsError(
            f"network {request.name!r} already exists",
            hint="choose another name, or delete it: oscloudctl network-delete " + request.name,
            object="network",
            name=request.name,
        )
    if request.subnet is not None:
        _check_is_free("subnet", request.subnet, networks, routes)
    if request.subnet6 is not None:
        _check_is_free("subnet6", request.subnet6, networks, routes)
    taken = [network.subnet for network in networks]
    subnet = request.subnet or find_next_subnet(taken, routes)
    _check_asks_others(request.dns, [subnet, *taken])
    Network.create(
        name=request.name,
        ip=str(subnet.network_address),
        mask=subnet.prefixlen,
        bridge_interface_idx=first_free_index(indices),
        subnet6=None if request.subnet6 is None else str(request.subnet6),
        dns=" ".join(request.dns),
        isolated=request.isolated,
        nat=request.nat,
        created_at=time.time(),
    )
    insert_event(EventKind.NETWORK, request.name, {"message": f"made: {subnet}"})


def _check_asks_others(dns: Iterable[str], subnets: Iterable[IPv4Network]) -> None:
    """Raise InvalidArgumentError where our own name servers would ask each other in a circle."""
    gateways = {str(gateway_of(subnet)) for subnet in subnets}
    for server in dns:
        if server in gateways:
            raise InvalidArgumentError(
                f"dns {server} is the gateway of a network of ours, whose name server asks others",
                hint="name the server that is to be asked, or none: then the host's own are asked",
                parameter="dns",
            )


def _check_is_free(
    parameter: str,
    subnet: IPv4Network | IPv6Network,
    networks: Iterable[NetworkRecord],
    routes: Iterable[Route],
) -> None:
    for network in networks:
        for other in (network.subnet, network.subnet6):
            if other is not None and overlaps(subnet, other):
                raise InUseError(
                    f"{parameter} {subnet} overlaps network {network.name!r}, which has {other}",
                    hint=f"leave {parameter} out to get a free one",
                    parameter=parameter,
                )
    route = find_overlap(subnet, routes)
    if route is not None:
        where = f" to {route.interface}" if route.interface else ""
        raise InUseError(
            f"{parameter} {subnet} overlaps a route of this host, {route.network}{where}",
            hint=f"leave {parameter} out to get a free one; ip route show table all",
            parameter=parameter,
        )


def _delete(key: int | str) -> int:
    """Take a network's row away, inside a transaction; give its id."""
    network = read_network(key)
    if network.name == DEFAULT_NETWORK:
        raise InvalidArgumentError(
            f"network {DEFAULT_NETWORK!r} can't be deleted",
            hint="a vm is in it where no other network is named",
            parameter="network",
        )
    names = [nic.vm for nic in read_owned_nics(network.id)]
    if names:
        more = f" and {len(names) - _NAMED_VMS} more" if len(names) > _NAMED_VMS else ""
        raise InUseError(
            f"network {network.name!r} is in use by {', '.join(names[:_NAMED_VMS])}{more}",
            hint="delete these vms, or these cards of theirs, first: oscloudctl nic-delete",
            vms=names,
        )
    Network.delete().where(Network.id == network.id).execute()
    insert_event(EventKind.NETWORK, network.name, {"message": f"deleted: {network.subnet}"})
    return network.id
