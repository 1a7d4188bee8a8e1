"""The firewall for guests: one nft table of our own, replaced whole, nothing else touched.

What it says: guests reach the world behind the host's address, answers come back; networks don't
reach each other; on the host itself guests reach ping, DNS and DHCP and can answer, no more.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.commands import run
from oscloudd.host.network.interfaces import check_interface_name

TABLE = "inet oscloud"
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


@dataclass(frozen=True)
class GuestNetwork:
    """What the firewall has to know of a network."""

    bridge: str
    subnet: IPv4Network


async def apply_ruleset(networks: Sequence[GuestNetwork]) -> None:
    """Make the firewall fit these networks, in one transaction; may be called at any time."""
    await run(["nft", "-f", "-"], input_text=build_ruleset(networks))


async def remove_ruleset() -> None:
    """Take our table away; nothing happens when there is none."""
    await run(["nft", "-f", "-"], input_text=_REMOVAL)


async def find_ruleset_bridges() -> set[str] | None:
    """Give the bridges our table speaks of; None when there is no such table."""
    family, name = TABLE.split()
    # Asked for all: `nft` answers a missing table with an error that only its words tell apart.
    listed = json.loads(await run(["nft", "--json", "list", "tables", family]))["nftables"]
    if not any(entry.get("table", {}).get("name") == name for entry in listed):
        return None
    return parse_ruleset_bridges(await run(["nft", "list", "table", family, name]))


def parse_ruleset_bridges(text: str) -> set[str]:
    """Read the names of interfaces in what `nft list table` prints of a table of ours."""
    return set(re.findall(r'"([^"]+)"', text))


def ensure_forwarding() -> None:
    """Let this box pass packets on between its interfaces (net.ipv4.ip_forward)."""
    try:
        if _FORWARDING.read_text(encoding="ascii").strip() != "1":
            _FORWARDING.write_text("1", encoding="ascii")
    except OSError as error:
        raise HostError(
            f"{_FORWARDING} can't be set to 1: {error.strerror}",
            hint="guests need it to reach beyond this box: sysctl net.ipv4.ip_forward=1",
        ) from error


# Deleting a table that isn't there fails, adding one that is doesn't: so add, then delete.
_REMOVAL = f"add table {TABLE}\ndelete table {TABLE}\n"


def build_ruleset(networks: Sequence[GuestNetwork]) -> str:
    """Give the text for `nft -f` that replaces our table by the one for these networks."""
    networks = sorted(networks, key=lambda network: network.bridge)
    for network in networks:
        check_interface_name(network.bridge)
    bridges = [network.bridge for network in networks]
    chains = [
        _chain("postrouting", "nat", "srcnat", [_masquerade(network) for network in networks]),
        _chain("forward", "filter", "filter", _forward_rules(networks, bridges)),
        _chain("input", "filter", "filter", _input_rules(bridges)),
    ]
    return f"{_REMOVAL}table {TABLE} {{\n{''.join(chains)}}}\n"


def _masquerade(network: GuestNetwork) -> str:
    return (
        f'oifname != "{network.bridge}" ip saddr {network.subnet}'
        f" ip daddr != {network.subnet} masquerade"
    )


def _forward_rules(networks: Sequence[GuestNetwork], bridges: list[str]) -> list[str]:
    # Forwarded ports: whoever may send there may reach the guest behind it.
    rules = [f"oifname {_names(bridges)} ct status dnat accept"] if bridges else []
    for network in networks:
        bridge = f'"{network.bridge}"'
        # With br_netfilter loaded, frames between two ports of one bridge pass here too.
        rules.append(f"iifname {bridge} oifname {bridge} accept")
        rules.append(f"iifname {bridge} oifname {_names(bridges)} drop")
        rules.append(f"iifname {bridge} ip saddr {network.subnet} accept")
        rules.append(f"iifname {bridge} drop")
        rules.append(f"oifname {bridge} ct state established,related accept")
        rules.append(f"oifname {bridge} drop")
    return rules


def _input_rules(bridges: list[str]) -> list[str]:
    if not bridges:
        return []
    guests = f"iifname {_names(bridges)}"
    return [
        f"{guests} ct state established,related accept",
        f"{guests} icmp type echo-request accept",
        f"{guests} udp dport {{ 53, 67 }} accept",
        f"{guests} tcp dport 53 accept",
        f"{guests} drop",
    ]


def _names(bridges: list[str]) -> str:
    return "{ " + ", ".join(f'"{bridge}"' for bridge in bridges) + " }"


def _chain(hook: str, chain_type: str, priority: str, rules: list[str]) -> str:
    head = f"type {chain_type} hook {hook} priority {priority}; policy accept;"
    body = "".join(f"\t\t{rule}\n" for rule in [head, *rules])
    return f"\tchain {hook} {{\n{body}\t}}\n"
