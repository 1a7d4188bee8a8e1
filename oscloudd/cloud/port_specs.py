"""A forwarded port as users write it: `[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|udp]`. Pure."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.network.port_rules import EVERYWHERE

# Who reaches this host's network is not to reach a guest unless somebody said so.
_DEFAULT_ADDRESS = "127.0.0.1"
_HOST_SIDE = r"(?:([0-9.]+):)?([0-9]{1,5})"
_PROTOCOL = r"(?:/(tcp|udp))?"
_SPEC = re.compile(rf"{_HOST_SIDE}:([0-9]{{1,5}}){_PROTOCOL}", re.ASCII | re.IGNORECASE)
_NAME = re.compile(rf"{_HOST_SIDE}{_PROTOCOL}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class HostPort:
    """The host's side: two of them can't both be had where `overlaps` says so."""

    protocol: str
    address: IPv4Address
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}/{self.protocol}"

    def overlaps(self, other: "HostPort") -> bool:
        """Tell whether both would get packets to one port of one address."""
        if (self.protocol, self.port) != (other.protocol, other.port):
            return False
        return self.address == other.address or EVERYWHERE in (self.address, other.address)


@dataclass(frozen=True)
class PortSpec:
    """A port of the host and the guest's port it leads to."""

    host: HostPort
    guest_port: int

    def __str__(self) -> str:
        return f"{self.host.address}:{self.host.port}:{self.guest_port}/{self.host.protocol}"


@dataclass(frozen=True)
class PortName:
    """What names a forwarded port: its host's side, the address only where it is needed."""

    protocol: str
    address: IPv4Address | None
    port: int


def parse_spec(text: str, *, parameter: str) -> PortSpec:
    """Read what is to be forwarded; raises InvalidArgumentError naming `parameter`."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{parameter} {text!r:.60} names no port to forward",
            hint='write HOSTPORT:GUESTPORT, as in "8080:80", "0.0.0.0:8080:80" or "5353:53/udp"',
            parameter=parameter,
        )
    address = _parse_address(match[1] or _DEFAULT_ADDRESS, parameter)
    host_port, guest_port = (_parse_port(match[group], parameter) for group in (2, 3))
    return PortSpec(HostPort(_parse_protocol(match[4]), address, host_port), guest_port)


def parse_name(text: str, *, parameter: str) -> PortName:
    """Read which forwarded port is meant; raises InvalidArgumentError naming `parameter`."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{parameter} {text!r:.60} names no forwarded port",
            hint='write the host\'s port, as in "8080", "5353/udp" or "0.0.0.0:8080"',
            parameter=parameter,
        )
    address = _parse_address(match[1], parameter) if match[1] else None
    return PortName(_parse_protocol(match[3]), address, _parse_port(match[2], parameter))


def _parse_protocol(text: str | None) -> str:
    return (text or "tcp").lower()


def _parse_port(text: str, parameter: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise InvalidArgumentError(
            f"{parameter}: {text} is no port", hint="between 1 and 65535", parameter=parameter
        )
    return int(text)


def _parse_address(text: str, parameter: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"{parameter}: {text!r:.60} is no IPv4 address",
            hint="127.0.0.1 is for this host only, 0.0.0.0 for everybody",
            parameter=parameter,
        ) from error
