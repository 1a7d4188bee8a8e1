"""The host's DNS resolvers, as far as guests can use them."""

from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

_RESOLV_CONF = Path("/etc/resolv.conf")
# Where systemd-resolved keeps the servers behind its own 127.0.0.53 (systemd-resolved(8)).
_RESOLVED_UPSTREAM = Path("/run/systemd/resolve/resolv.conf")


def host_resolvers(
    resolv_conf: Path = _RESOLV_CONF, upstream: Path = _RESOLVED_UPSTREAM
) -> tuple[IPv4Address, ...]:
    """Give the IPv4 resolvers a guest can ask, in the host's order.

    One on the host's loopback is out of a guest's reach: then systemd-resolved's own are taken.
    Empty when there is none; the guests then have names only if the config's `dns` gives them some.
    """
    found = parse_resolvers(_read(resolv_conf))
    if any(address.is_loopback for address in found):
        found = found + parse_resolvers(_read(upstream))
    usable = (address for address in found if not address.is_loopback)
    return tuple(dict.fromkeys(usable))


def parse_resolvers(text: str) -> tuple[IPv4Address, ...]:
    """Read the IPv4 `nameserver` lines of a resolv.conf(5)."""
    addresses = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            addresses.append(IPv4Address(words[1]))
        except AddressValueError:
            continue
    return tuple(addresses)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
