"""Other firewalls on this box that keep guests from the outside, told by their nft tables.

What one table accepts another may still drop: where others' does so for all that is forwarded, our
own rules can't help, and an administrator has to. Only looks.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from oscloudd.host.commands import run
from oscloudd.host.network.ruleset import TABLE

_BRIDGES = "oscbr"
# Each by what its table has: Docker's and ufw's chains in iptables-nft's own, firewalld's table.
_DOCKER = (
    "iptables -I DOCKER-USER -i oscbr+ -j ACCEPT; iptables -I DOCKER-USER -o oscbr+"
    " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
)
_UFW = "for each bridge: ufw route allow in on {bridge}; ufw allow in on {bridge}"
_FIREWALLD = (
    "for each bridge: firewall-cmd --permanent --zone=trusted --add-interface={bridge};"
    " then firewall-cmd --reload"
)
_OTHER = (
    'nft insert rule {table} {chain} iifname "oscbr*" accept; nft insert rule {table} {chain}'
    ' oifname "oscbr*" ct state established,related accept'
)


@dataclass(frozen=True)
class Obstacle:
    """A table that drops what guests send outwards: whose it is, and what to do about it."""

    family: str
    table: str
    owner: str
    fix: str

    def __str__(self) -> str:
        return f"{self.owner} (nft table {self.family} {self.table}) drops what guests send outside"


async def find_obstacles(bridge: str) -> list[Obstacle]:
    """Find the tables that drop what is forwarded and do not speak of our bridges.

    `bridge` is one of ours, for the words of the fix.
    """
    listed = json.loads(await run(["nft", "--json", "list", "chains"]))["nftables"]
    return [
        obstacle
        for obstacle in parse_obstacles(listed, bridge)
        if _BRIDGES not in await run(["nft", "list", "table", obstacle.family, obstacle.table])
    ]


def parse_obstacles(listed: Iterable[dict[str, Any]], bridge: str) -> list[Obstacle]:
    """Read what `nft --json list chains` prints: each table that may be in the way, once."""
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in listed:
        chain = entry.get("chain")
        if chain is not None and chain["family"] in ("ip", "inet") and chain["table"] != TABLE:
            tables.setdefault((chain["family"], chain["table"]), []).append(chain)
    obstacles = []
    for (family, table), chains in tables.items():
        droppers = [
            chain["name"]
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop"
        ]
        if table == "firewalld":  # its policy is to accept, and its last rule rejects
            fix = _FIREWALLD.format(bridge=bridge)
            obstacles.append(Obstacle(family, table, "firewalld", fix))
        elif droppers:
            names = {chain["name"] for chain in chains}
            owner, fix = _owner(names, f"{family} {table}", droppers[0], bridge)
            obstacles.append(Obstacle(family, table, owner, fix))
    return obstacles


def _owner(chains: set[str], table: str, dropper: str, bridge: str) -> tuple[str, str]:
    if "DOCKER-USER" in chains:
        return "Docker", _DOCKER
    if any(name.startswith("ufw-") for name in chains):
        return "ufw", _UFW.format(bridge=bridge)
    return f"chain {dropper}", _OTHER.format(table=table, chain=dropper)
