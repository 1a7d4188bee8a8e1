"""The firewall for guests: two nft tables of our own, replaced whole, nothing else touched.

What they say: a guest sends with its own addresses only, and plays neither gateway nor DHCP server
nor router; it reaches the world behind the host's address, and answers come back; networks don't
reach each other; on the host itself guests reach ping, DNS and DHCP at their gateway and can
answer, no more; all that by IPv4 and by IPv6.
"""

import json
import re
from collections.abc import Sequence

from oscloudd.host.commands import run
from oscloudd.host.network.ruleset import (
    FAMILIES,
    TABLE,
    GuestNetwork,
    GuestPort,
    build_removal,
    build_ruleset,
)


async def apply_ruleset(networks: Sequence[GuestNetwork], ports: Sequence[GuestPort]) -> None:
    """Make the firewall fit these, in one transaction; may be called at any time."""
    await run(["nft", "-f", "-"], input_text=build_ruleset(networks, ports))


async def check_ruleset() -> None:
    """Have nft and the kernel judge our tables, without any guest, and change nothing.

    Raises HostError where one of them lacks what the tables need.
    """
    await run(["nft", "--check", "-f", "-"], input_text=build_ruleset([], []))


async def remove_ruleset() -> None:
    """Take our tables away; nothing happens when there are none."""
    await run(["nft", "-f", "-"], input_text=build_removal())


async def find_missing_tables() -> list[str]:
    """Name those of our tables that are not there, each with its family."""
    # Asked for all: `nft` answers a missing table with an error that only its words tell apart.
    listed = json.loads(await run(["nft", "--json", "list", "tables"]))["nftables"]
    there = {
        (entry["table"]["family"], entry["table"]["name"]) for entry in listed if "table" in entry
    }
    return [f"{family} {TABLE}" for family in FAMILIES if (family, TABLE) not in there]


async def find_ruleset_bridges() -> set[str]:
    """Give the bridges our table speaks of; none when there is no such table."""
    if f"inet {TABLE}" in await find_missing_tables():
        return set()
    return parse_ruleset_bridges(await run(["nft", "list", "table", "inet", TABLE]))


def parse_ruleset_bridges(text: str) -> set[str]:
    """Read the names of interfaces in what `nft list table` prints of a table of ours."""
    return set(re.findall(r'"([\w-]+)"', text))
