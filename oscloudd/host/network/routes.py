"""Where this box already has routes, and a subnet for guests that is clear of them."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from oscloudd.errors import ExhaustedError
from oscloudd.host.commands import run
from oscloudd.host.network.forwarding import has_ipv6
from oscloudd.host.network.links import list_links

# A route broader than the largest private range (RFC 1918: 10.0.0.0/8) is a default route, or a
# half of one such as the 0.0.0.0/1 and 128.0.0.0/1 of a VPN: everything overlaps it.
_SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class Route:
    """A route of the host and the interface it leads to ("" for one that leads nowhere)."""

    network: IPv4Network | IPv6Network
    interface: str


async def find_free_subnet(
    wanted: IPv4Network,
    taken: Collection[IPv4Network] = (),
    *,
    ignored_interfaces: Collection[str] = (),
) -> IPv4Network:
    """Give `wanted`, or the first private /16 that overlaps neither a route nor one of `taken`.

    Routes over our own bridges, known by their alias, and `ignored_interfaces` don't count. Whether
    the answer differs from `wanted` is for the caller to say aloud. Raises ExhaustedError.
    """
    foreign = await list_foreign_routes(ignored_interfaces)
    free = _find_free(_candidates(wanted), taken, foreign)
    if free is None:
        raise ExhaustedError(
            f"neither {wanted} nor any private /16 is free of routes of this box",
            hint="set [network] subnet in oscloud.toml to a range that is",
            resource="subnets",
        )
    return free


def find_next_subnet(taken: Collection[IPv4Network], routes: Collection[Route]) -> IPv4Network:
    """Give the first /24 from 10.20.0.0 on that is clear of all these; raises ExhaustedError."""
    free = _find_free(_next_candidates(), taken, routes)
    if free is None:
        raise ExhaustedError(
            "no /24 from 10.20.0.0 on is free of networks and routes of this box",
            hint="name a subnet",
            resource="subnets",
        )
    return free


async def list_foreign_routes(ignored_interfaces: Collection[str] = ()) -> list[Route]:
    """List the routes that lead elsewhere than to our own bridges, known by their alias."""
    ours = {*ignored_interfaces, *(await list_links()).bridges}
    return [route for route in await list_routes() if route.interface not in ours]


async def list_routes() -> list[Route]:
    """List the routes of the host by both families, all tables."""
    routes: list[Route] = []
    for family in ("-4", "-6") if has_ipv6() else ("-4",):
        shown = await run(["ip", "-json", family, "route", "show", "table", "all"])
        routes += parse_routes(json.loads(shown or "[]"))
    return routes


def parse_routes(listed: list[dict[str, Any]]) -> list[Route]:
    """Read what `ip -json route` prints."""
    return [
        Route(ip_network(entry["dst"], strict=False), entry.get("dev", ""))
        for entry in listed
        if entry.get("dst", "default") != "default"
    ]


def find_overlap(subnet: IPv4Network | IPv6Network, routes: Iterable[Route]) -> Route | None:
    """Give the first route that `subnet` would get in the way of, or None."""
    for route in routes:
        if route.network.prefixlen >= _SHORTEST_PREFIX and overlaps(route.network, subnet):
            return route
    return None


def overlaps(one: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network) -> bool:
    """Tell whether two networks have addresses in common."""
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return isinstance(other, IPv6Network) and one.overlaps(other)


def _find_free(
    candidates: Iterable[IPv4Network],
    taken: Collection[IPv4Network],
    routes: Collection[Route],
) -> IPv4Network | None:
    for candidate in candidates:
        is_taken = any(candidate.overlaps(other) for other in taken)
        if not is_taken and find_overlap(candidate, routes) is None:
            return candidate
    return None


def _next_candidates() -> Iterator[IPv4Network]:
    for second in range(20, 256):
        yield from IPv4Network(f"10.{second}.0.0/16").subnets(new_prefix=24)


def _candidates(wanted: IPv4Network) -> Iterator[IPv4Network]:
    """Give `wanted`, then 192.168.0.0/16, 172.16.0.0/16 to 172.31, 10.0.0.0/16 to 10.255."""
    yield wanted
    yield IPv4Network("192.168.0.0/16")
    yield from IPv4Network("172.16.0.0/12").subnets(new_prefix=16)
    yield from IPv4Network("10.0.0.0/8").subnets(new_prefix=16)
