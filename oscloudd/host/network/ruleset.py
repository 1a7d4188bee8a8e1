"""The firewall's text: two tables whose rules are the same however many guests there are.

Pure. The rules are in `tables.nft`; what differs from host to host are the elements of their sets,
up to eight for each network and for each guest. Taps and bridges are told by their names, `osctap…`
and `oscbr…`, which only guests' have.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.network.interfaces import check_interface_name, parse_mac

TABLE = "oscloud"
FAMILIES = ("bridge", "inet")
BRIDGE_PREFIX = "oscbr"
TAP_PREFIX = "osctap"
_NAME_BYTES = 16  # linux/if.h IFNAMSIZ
_TABLES = Path(__file__).with_name("tables.nft")


@dataclass(frozen=True)
class GuestNetwork:
    """What the firewall has to know of a network.

    With `isolated` its guests reach nothing behind the host. Without `nat` they go out under their
    own addresses, and may be reached at them from there.
    """

    bridge: str
    subnet: IPv4Network
    isolated: bool = False
    nat: bool = True
    subnet6: IPv6Network | None = None

    @property
    def subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """What it has of both families; in each the host has the first address."""
        return (self.subnet,) if self.subnet6 is None else (self.subnet, self.subnet6)


@dataclass(frozen=True)
class GuestPort:
    """A guest's tap and the only addresses that may come from it, its link-local one beside."""

    tap: str
    mac: str
    address: IPv4Address
    address6: IPv6Address | None = None

    @property
    def link_local(self) -> IPv6Address:
        """The IPv6 address that a guest makes of its MAC by itself (RFC 4291, appendix A)."""
        raw = parse_mac(self.mac)
        interface = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
        return IPv6Address(b"\xfe\x80" + bytes(6) + interface)


@dataclass(frozen=True)
class Element:
    """One element of a set of the table for frames: as `nft` reads it, and as the kernel has it."""

    set_name: str
    text: str
    key: bytes


def build_elements(port: GuestPort) -> list[Element]:
    """Give what the sets of the table for frames have to say of one guest."""
    tap = _check(port.tap, TAP_PREFIX).ljust(_NAME_BYTES, b"\0")
    mac, address = parse_mac(port.mac), port.address
    with_mac = f'"{port.tap}" . {port.mac}'
    # Each part of a key fills whole words of four bytes.
    key = tap + mac + bytes(2)
    elements = [
        Element("macs", with_mac, key),
        Element("addresses", f"{with_mac} . {address}", key + address.packed),
        Element("clients", f'"{port.tap}" . 0x{mac.hex()}', key),
        Element("options6", f'"{port.tap}" . 0x{mac.hex()}', key),
    ]
    for address6 in (port.link_local, port.address6):
        if address6 is not None:
            elements += [
                Element("addresses6", f"{with_mac} . {address6}", key + address6.packed),
                Element("targets6", f"{with_mac} . {int(address6):#x}", key + address6.packed),
            ]
    return elements


def build_ruleset(networks: Iterable[GuestNetwork], ports: Iterable[GuestPort]) -> str:
    """Give the text for `nft -f` that replaces our tables by those for these guests."""
    networks = sorted(networks, key=lambda network: network.bridge)
    for network in networks:
        _check(network.bridge, BRIDGE_PREFIX)
    sets: dict[str, list[str]] = {}
    for port in sorted(ports, key=lambda port: port.tap):
        for element in build_elements(port):
            sets.setdefault(element.set_name, []).append(element.text)
    for network in networks:
        for name, text in _network_elements(network):
            sets.setdefault(name, []).append(text)
    return build_removal() + "".join(_fill(line, sets) for line in _read_tables())


def build_removal() -> str:
    """Give the text for `nft -f` that takes our tables away, whether they are there or not."""
    # Deleting a table that isn't there fails, adding one that is doesn't: so add, then delete.
    return "".join(
        f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in FAMILIES
    )


def _network_elements(network: GuestNetwork) -> list[tuple[str, str]]:
    bridge = f'"{network.bridge}"'
    elements = [("within", f"{bridge} . {bridge}")]
    if network.isolated:
        elements.append(("isolated", bridge))
    elif not network.nat:
        elements.append(("routed", bridge))
    for subnet in network.subnets:
        family = "6" if subnet.version == 6 else ""
        elements.append((f"gateways{family}", f"{bridge} . {subnet.network_address + 1}"))
        elements.append((f"subnets{family}", f"{bridge} . {subnet}"))
        if network.nat and not network.isolated:
            elements.append((f"masked{family}", str(subnet)))
    return elements


@cache
def _read_tables() -> list[str]:
    return _TABLES.read_text(encoding="ascii").splitlines(keepends=True)


def _fill(line: str, sets: dict[str, list[str]]) -> str:
    """Put a set's elements into the line that declares it."""
    words = line.split()
    if words[:1] != ["set"] or words[1] not in sets:
        return line
    elements = ", ".join(sets[words[1]])
    return line.replace(" }\n", f" elements = {{ {elements} }}; }}\n")


def _check(name: str, prefix: str) -> bytes:
    encoded = check_interface_name(name)
    if not name.startswith(prefix):
        raise InvalidArgumentError(f"{name} is not called {prefix}…, and has no rules")
    return encoded
