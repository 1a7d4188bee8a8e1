"""How a host passes on what a namespace sends: the sysctl, masquerading, and other firewalls.

Rules of ours in somebody else's chain carry the uplink's interface name, by which they are found
again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages import run

_IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")

# Each of these means that somebody besides us may have come to rely on forwarding.
_FORWARDING_KINDS = ("bridge", "veth", "wireguard", "tun")


def enable_forwarding() -> bool:
    """Let the host forward; tell whether it did not before."""
    if _IP_FORWARD.read_text(encoding="ascii").strip() != "0":
        return False
    _IP_FORWARD.write_text("1", encoding="ascii")
    return True


def restore_forwarding() -> None:
    """Switch forwarding off again, unless the host has interfaces of others that may need it."""
    for kind in _FORWARDING_KINDS:
        if run(["ip", "-brief", "link", "show", "type", kind]).strip():
            return
    _IP_FORWARD.write_text("0", encoding="ascii")


def build_masquerade(table: str, link_net: str) -> str:
    """Give the nft text that replaces our table as a whole."""
    return f"""
        add table ip {table}
        delete table ip {table}
        table ip {table} {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {link_net} ip daddr != {link_net} masquerade
            }}
        }}
    """


def allow_through_firewalls(interface: str) -> None:
    """Accept the uplink's packets in each chain of others that drops what it doesn't know.

    An accept in a table of ours would not help: every base chain has to let a packet pass (nft(8)).
    """
    for family, table, name in _dropping_chains():
        for direction in ("iifname", "oifname"):
            run(["nft", "insert", "rule", family, table, name, direction, interface, "accept"])


def disallow_through_firewalls(interface: str) -> None:
    """Take back what `allow_through_firewalls` added."""
    for rule in _objects("rule"):
        if rule.get("table", "").startswith("oscloud") or interface not in json.dumps(rule):
            continue
        run(["nft", "delete", "rule", rule["family"], rule["table"], rule["chain"],
             "handle", str(rule["handle"])])  # fmt: skip


def _dropping_chains() -> Iterator[tuple[str, str, str]]:
    for chain in _objects("chain"):
        dropping = chain.get("hook") == "forward" and chain.get("policy") == "drop"
        if dropping and chain["family"] in ("ip", "inet"):
            yield chain["family"], chain["table"], chain["name"]


def _objects(kind: str) -> Iterator[dict[str, Any]]:
    listed = json.loads(run(["nft", "--json", "--handle", "list", "ruleset"]))
    for item in listed["nftables"]:
        if kind in item:
            yield item[kind]
