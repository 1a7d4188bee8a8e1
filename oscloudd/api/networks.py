"""What parameters say of networks and of cards in them, turned into what the cloud is asked for."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from oscloudd.api.params import NetworkCreateParams
from oscloudd.cloud.network_making import NetworkRequest
from oscloudd.cloud.taken import MOST_NICS, NicRequest
from oscloudd.errors import InvalidArgumentError
from oscloudd.store.subnet6 import draw_subnet6
from oscloudd.units import check_name

# RFC 1918 and, for carriers, RFC 6598.
_PRIVATE = tuple(
    map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)
# RFC 4193.
_PRIVATE6 = IPv6Network("fc00::/7")
_PREFIX6 = 64
_SHORTEST_PREFIX, _LONGEST_PREFIX = 8, 30
# resolv.conf(5) takes three; some guests ask more.
_MAX_DNS = 8


def build_network(params: NetworkCreateParams) -> NetworkRequest:
    """Check what can be checked without looking at anything; raises InvalidArgumentError."""
    if params.isolated and not params.nat:
        raise InvalidArgumentError(
            "an isolated network has no way out, with nat or without",
            hint="choose isolated, or no nat",
            parameter="nat",
        )
    if len(params.dns) > _MAX_DNS:
        raise InvalidArgumentError(f"dns has more than {_MAX_DNS} addresses", parameter="dns")
    return NetworkRequest(
        name=check_name(params.name),
        subnet=None if params.subnet is None else _parse_subnet(params.subnet),
        subnet6=_parse_subnet6(params.subnet6),
        isolated=params.isolated,
        nat=params.nat,
        dns=tuple(_parse_server(text) for text in params.dns),
    )


def build_nics(networks: int | str | list[int | str], ip: str | None) -> list[NicRequest]:
    """Give the cards a vm is to have, the first one first; raises InvalidArgumentError."""
    given = networks if isinstance(networks, list) else [networks]
    if not 1 <= len(given) <= MOST_NICS:
        raise InvalidArgumentError(
            f"network has {len(given)} entries: a vm has one card at least and {MOST_NICS} at most",
            parameter="network",
        )
    first, *others = map(_parse_nic, given)
    if ip is not None and first.ip is not None:
        raise InvalidArgumentError(
            "the first card is given two addresses",
            hint="leave out ip, or the one with its network",
            parameter="ip",
        )
    return [replace(first, ip=first.ip if ip is None else ip), *others]


def _parse_nic(value: int | str) -> NicRequest:
    if isinstance(value, int):
        return NicRequest(value)
    # No name has a comma.
    name, option, address = value.partition(",ip=")
    return NicRequest(name, address if option else None)


def _parse_subnet(text: str) -> IPv4Network:
    try:
        if "/" not in text:
            raise ValueError("it has no prefix length")
        subnet = IPv4Network(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"subnet {text!r:.60} is not an IPv4 network: {str(error)[:100]}",
            hint='write it as "10.20.0.0/24"',
            parameter="subnet",
        ) from error
    if not _SHORTEST_PREFIX <= subnet.prefixlen <= _LONGEST_PREFIX:
        raise InvalidArgumentError(
            f"subnet {subnet} has a prefix of /{subnet.prefixlen}",
            hint=f"use one between /{_SHORTEST_PREFIX} and /{_LONGEST_PREFIX}",
            parameter="subnet",
        )
    if not any(subnet.subnet_of(private) for private in _PRIVATE):
        raise InvalidArgumentError(
            f"subnet {subnet} is not private: its addresses are others'",
            hint=f"choose one within {', '.join(map(str, _PRIVATE))}",
            parameter="subnet",
        )
    return subnet


def _parse_subnet6(text: str | None) -> IPv6Network | None:
    if text is None:
        return draw_subnet6()
    if text == "none":
        return None
    try:
        subnet = IPv6Network(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"subnet6 {text!r:.60} is not an IPv6 network: {str(error)[:100]}",
            hint='write it as "fd00:1:2:3::/64", leave it out to have one drawn, or say "none"',
            parameter="subnet6",
        ) from error
    if subnet.prefixlen != _PREFIX6 or not subnet.subnet_of(_PRIVATE6):
        raise InvalidArgumentError(
            f"subnet6 {subnet} is not a /{_PREFIX6} within {_PRIVATE6}",
            hint="leave it out to have one drawn",
            parameter="subnet6",
        )
    return subnet


def _parse_server(text: str) -> str:
    try:
        address = IPv4Address(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"dns {text!r:.60} is not an IPv4 address", parameter="dns"
        ) from error
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise InvalidArgumentError(
            f"dns {text} is out of a guest's reach",
            hint="name a server, or none: then the host's own are asked",
            parameter="dns",
        )
    return str(address)
