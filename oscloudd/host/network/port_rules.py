"""Forwarded ports in the kernel: one nft table of our own, `ip oscloud_ports`, replaced whole.

Rewrites destinations only; whether a rewritten packet may pass to a guest is `firewall.py`'s. A
packet to a port of this host never reaches a socket here, so that nothing of ours need run.
"""

import errno
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from oscloudd.errors import HostError
from oscloudd.host.commands import run
from oscloudd.host.network.interfaces import check_interface_name, find_index
from oscloudd.host.network.netlink import (
    ACKNOWLEDGE,
    exchange,
    pack_attribute,
    pack_message,
    pack_nested,
)

TABLE = "ip oscloud_ports"
EVERYWHERE = IPv4Address("0.0.0.0")

# Deleting a table that isn't there fails, adding one that is doesn't: so add, then delete.
_REMOVAL = f"add table {TABLE}\ndelete table {TABLE}\n"

# linux/rtnetlink.h, linux/if_link.h, linux/ip.h
_RTM_SETLINK = 19
_IFLA_AF_SPEC = 26
_IFLA_INET_CONF = 1
_IPV4_DEVCONF_ROUTE_LOCALNET = 26


@dataclass(frozen=True)
class Forward:
    """A port of the host, at one address or everywhere, and the guest's that it leads to."""

    protocol: str
    host_address: IPv4Address
    host_port: int
    guest_address: IPv4Address
    guest_port: int
    bridge: str
    subnet: IPv4Network

    @property
    def is_on_loopback(self) -> bool:
        """Whether this host's own programs reach it by a loopback address."""
        return self.host_address.is_loopback or self.host_address == EVERYWHERE


async def apply_forwards(forwards: Sequence[Forward], bridges: Collection[str]) -> set[str]:
    """Make these the forwarded ports, of all that lead behind `bridges`; may be called again.

    Gives those bridges that are not there: once they are, loopback leads to them after another
    call only.
    """
    local = {forward.bridge for forward in forwards if forward.is_on_loopback}
    # Behind the drop of the table only: see `build_forwards`.
    for bridge in sorted(set(bridges) - local):
        set_route_localnet(bridge, on=False)
    await run(["nft", "-f", "-"], input_text=build_forwards(forwards))
    return {bridge for bridge in sorted(local) if not set_route_localnet(bridge, on=True)}


def build_forwards(forwards: Sequence[Forward]) -> str:
    """Give the text for `nft -f` that replaces our table by the one for these; none without any.

    The number of rules is the same for any number of ports. A connection from the host's loopback
    or from a neighbour of the guest has to come back through here, so it gets the host's address.
    """
    if not forwards:
        return _REMOVAL
    for forward in forwards:
        check_interface_name(forward.bridge)
    single = [forward for forward in forwards if forward.host_address != EVERYWHERE]
    everywhere = [forward for forward in forwards if forward.host_address == EVERYWHERE]
    key = "inet_proto . inet_service : ipv4_addr . inet_service"
    bridges = {f'"{forward.bridge}"' for forward in forwards}
    guests = {f'"{forward.bridge}" . {forward.subnet}' for forward in forwards}
    at_one = (f"{forward.host_address} . {_element(forward)}" for forward in single)
    rewrites = (
        "dnat ip to ip daddr . meta l4proto . th dport map @at_one_address",
        "fib daddr type local dnat ip to meta l4proto . th dport map @everywhere",
    )
    parts = [
        _set("map at_one_address", f"ipv4_addr . {key}", at_one),
        _set("map everywhere", key, map(_element, everywhere)),
        _set("set bridges", "ifname", bridges),
        _set("set guests", "ifname . ipv4_addr; flags interval", guests),
        # Rewriting comes before the kernel's own refusal of such an address from elsewhere, which
        # `route_localnet` takes away from the bridges besides.
        _chain("filter", "prerouting", "raw", 'iifname != "lo" ip daddr 127.0.0.0/8 drop'),
        _chain("nat", "prerouting", "dstnat", *rewrites),
        _chain("nat", "output", "-100", *rewrites),
        _chain(
            "nat",
            "postrouting",
            "srcnat",
            "ct status dnat oifname @bridges ip saddr 127.0.0.0/8 masquerade",
            "ct status dnat oifname . ip saddr @guests masquerade",
        ),
    ]
    return f"{_REMOVAL}table {TABLE} {{\n{''.join(parts)}}}\n"


def _element(forward: Forward) -> str:
    key = f"{forward.protocol} . {forward.host_port}"
    return f"{key} : {forward.guest_address} . {forward.guest_port}"


def _set(name: str, kind: str, elements: Iterable[str]) -> str:
    listed = ",\n\t\t\t".join(sorted(elements))
    body = f"\t\telements = {{\n\t\t\t{listed}\n\t\t}}\n" if listed else ""
    return f"\t{name} {{\n\t\ttype {kind}\n{body}\t}}\n"


def _chain(kind: str, hook: str, priority: str, *rules: str) -> str:
    head = f"type {kind} hook {hook} priority {priority}; policy accept;"
    body = "".join(f"\t\t{rule}\n" for rule in (head, *rules))
    return f"\tchain {kind}_{hook} {{\n{body}\t}}\n"


def set_route_localnet(interface: str, *, on: bool) -> bool:
    """Let packets with loopback addresses pass by an interface, or not; False without one.

    By netlink: systemd's ProtectKernelTunables= has the file of it read-only.
    """
    index = find_index(interface)
    if index is None:
        return False
    value = pack_attribute(_IPV4_DEVCONF_ROUTE_LOCALNET, struct.pack("=I", on))
    inet = pack_nested(socket.AF_INET, pack_nested(_IFLA_INET_CONF, value))
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + pack_nested(_IFLA_AF_SPEC, inet)
    try:
        exchange(socket.NETLINK_ROUTE, pack_message(_RTM_SETLINK, ACKNOWLEDGE, body))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        why = error.strerror
        raise HostError(f"route_localnet of {interface} can't be set: {why}") from error
    return True
