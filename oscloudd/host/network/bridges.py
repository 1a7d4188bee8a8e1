"""Bridges: one for each network of guests, with the gateway's addresses on it.

A bridge of ours carries the alias `oscloud`; one without it is somebody else's and is neither used,
changed nor removed.
"""

import json
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface
from typing import Any

from oscloudd.errors import AlreadyExistsError, HostError
from oscloudd.host.commands import run
from oscloudd.host.network.interfaces import check_interface_name

ALIAS = "oscloud"


@dataclass(frozen=True)
class Bridge:
    """A network's bridge: its name and the gateway's addresses on it."""

    name: str
    address: IPv4Address
    prefix_length: int
    interface6: IPv6Interface | None = None

    @property
    def interface(self) -> IPv4Interface:
        """The address with its prefix length."""
        return IPv4Interface(f"{self.address}/{self.prefix_length}")

    @property
    def mac(self) -> str:
        """The bridge's own hardware address, made from its IPv4 address.

        A bridge without one takes the lowest of its ports', so it would change under the guests.
        """
        return ":".join(f"{octet:02x}" for octet in (0x02, 0x05, *self.address.packed))


async def ensure_bridge(bridge: Bridge) -> None:
    """Make the bridge, or bring ours of that name to what is asked; guests on it don't notice.

    Raises AlreadyExistsError when the name belongs to an interface that is not ours.
    """
    check_interface_name(bridge.name)
    present = await _find_interface(bridge.name)
    if present is None:
        await _create(bridge)
        return
    _refuse_foreign(bridge.name, present)
    commands = build_changes(bridge, present)
    if commands:
        await _batch(commands)


async def remove_bridge(name: str) -> None:
    """Remove a bridge of ours; nothing happens when there is none. Raises as `ensure_bridge`."""
    check_interface_name(name)
    present = await _find_interface(name)
    if present is not None:
        _refuse_foreign(name, present)
        await _batch([f"link delete dev {name}"])


def build_creation(bridge: Bridge) -> list[str]:
    """Give the lines for `ip -batch` that make the bridge."""
    name = bridge.name
    lines = [
        f"link add name {name} address {bridge.mac} type bridge stp_state 0 forward_delay 0"
        # A guest that asks who listens could have neighbours' multicasts kept from each other.
        " mcast_snooping 0",
        f"link set dev {name} alias {ALIAS}",
        f"address add {bridge.interface} dev {name}",
        f"link set dev {name} up",
    ]
    if bridge.interface6 is not None:
        lines.append(_build_address6(bridge.interface6, name))
    return lines


def build_changes(bridge: Bridge, present: dict[str, Any]) -> list[str]:
    """Give the lines for `ip -batch` that turn what `ip -json address` shows into the bridge."""
    # What the kernel makes of the hardware address stays.
    addresses = {
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in present.get("addr_info", [])
        if entry.get("family") == "inet" or entry.get("scope") == "global"
    }
    wanted = {str(bridge.interface): f"address add {bridge.interface} dev {bridge.name}"}
    if bridge.interface6 is not None:
        wanted[str(bridge.interface6)] = _build_address6(bridge.interface6, bridge.name)
    lines = [f"address delete {old} dev {bridge.name}" for old in sorted(addresses - wanted.keys())]
    lines += [line for address, line in wanted.items() if address not in addresses]
    if present.get("address") != bridge.mac:
        lines.append(f"link set dev {bridge.name} address {bridge.mac}")
    if "UP" not in present.get("flags", []):
        lines.append(f"link set dev {bridge.name} up")
    return lines


def _build_address6(interface: IPv6Interface, name: str) -> str:
    # Nobody else may have it, and until it is known that nobody has it can't be used.
    return f"address add {interface} dev {name} nodad"


async def _create(bridge: Bridge) -> None:
    try:
        await _batch(build_creation(bridge))
    except HostError:
        half = await _find_interface(bridge.name)
        # Without the alias it may be one that somebody else made meanwhile.
        if half is not None and half.get("ifalias") == ALIAS:
            await _batch([f"link delete dev {bridge.name}"])
        raise


async def _batch(lines: list[str]) -> None:
    await run(["ip", "-batch", "-"], input_text="".join(f"{line}\n" for line in lines))


async def _find_interface(name: str) -> dict[str, Any] | None:
    # Asked for all: `ip` answers a missing name with an error that only its words tell apart.
    listed = json.loads(await run(["ip", "-json", "-details", "address", "show"]))
    for interface in listed:
        if interface.get("ifname") == name:
            return dict(interface)
    return None


def _refuse_foreign(name: str, present: dict[str, Any]) -> None:
    kind = present.get("linkinfo", {}).get("info_kind", "device")
    if kind != "bridge" or present.get("ifalias") != ALIAS:
        raise AlreadyExistsError(
            f"there is a network interface {name} already, a {kind} that is not ours",
            hint=f"rename or remove it; a bridge of ours has the alias {ALIAS!r}"
            f" (ip -details link show {name})",
        )
