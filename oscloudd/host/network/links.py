"""What of our making there is in the host's network: bridges, taps, permanent neighbours.

Only looks. What a bridge of ours is, `bridges.py` says; who a tap belongs to, the kernel.
"""

import json
import os
import socket
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from oscloudd.errors import HostError
from oscloudd.host.commands import run
from oscloudd.host.network.bridges import ALIAS
from oscloudd.host.network.netlink import (
    find_attribute,
    list_messages,
    pack_attribute,
    pack_message,
)

_ATF_PERM = 0x04  # linux/if_arp.h
# linux/rtnetlink.h and if_link.h
_GET_LINK = 18
_NAME, _MASTER, _WANTED = 3, 10, 29
_LINK_BYTES = 16  # struct ifinfomsg
_INDEX = struct.Struct("=4xi")
_WITHOUT_COUNTERS = pack_attribute(_WANTED, (1 << 3).to_bytes(4, sys.byteorder))


@dataclass(frozen=True)
class Tap:
    """A tap; a persistent one stays when no process holds it."""

    name: str
    is_persistent: bool


@dataclass(frozen=True)
class Links:
    """The bridges of ours, by their alias, and all taps, anybody's."""

    bridges: tuple[str, ...]
    taps: tuple[Tap, ...]


async def list_links() -> Links:
    """List the bridges of ours and the taps of this network namespace."""
    return parse_links(json.loads(await run(["ip", "-json", "-details", "link", "show"]) or "[]"))


def parse_links(listed: list[dict[str, Any]]) -> Links:
    """Read what `ip -json -details link` prints."""
    bridges, taps = [], []
    for entry in listed:
        info = entry.get("linkinfo", {})
        if info.get("info_kind") == "bridge" and entry.get("ifalias") == ALIAS:
            bridges.append(entry["ifname"])
        if info.get("info_kind") == "tun" and info.get("info_data", {}).get("type") == "tap":
            taps.append(Tap(entry["ifname"], bool(info["info_data"].get("persist"))))
    return Links(tuple(bridges), tuple(taps))


async def list_permanent_neighbours(
    bridges: Collection[str],
) -> list[tuple[str, IPv4Address | IPv6Address]]:
    """List the permanent neighbours on these bridges, each with its bridge."""
    command = ["ip", "-json", "neighbour", "show", "nud", "permanent"]
    listed = json.loads(await run(command) or "[]")
    return [
        (entry["dev"], ip_address(entry["dst"]))
        for entry in listed
        if entry.get("dev") in bridges and "dst" in entry
    ]


def numbers_in_use(prefix: str) -> set[int]:
    """Give the numbers of all interfaces called `prefix` and a number, asking the kernel once."""
    rests = (
        name.removeprefix(prefix) for _, name in socket.if_nameindex() if name.startswith(prefix)
    )
    return {int(rest) for rest in rests if rest.isascii() and rest.isdigit()}


def list_masters(prefix: str) -> dict[str, str | None]:
    """Give the interfaces with names that begin with `prefix`, each with the bridge it is on.

    Asks the kernel once. Raises HostError.
    """
    # Not /sys/class/net: that shows the namespace it was mounted in.
    request = pack_message(_GET_LINK, 0, bytes(_LINK_BYTES) + _WITHOUT_COUNTERS)
    names: dict[int, str] = {}
    masters: dict[str, int | None] = {}
    try:
        for message in list_messages(socket.NETLINK_ROUTE, request):
            attributes = message.body[_LINK_BYTES:]
            name = (find_attribute(attributes, _NAME) or b"").rstrip(b"\0").decode()
            master = find_attribute(attributes, _MASTER)
            names[_INDEX.unpack_from(message.body)[0]] = name
            masters[name] = None if master is None else int.from_bytes(master, sys.byteorder)
    except OSError as error:
        raise HostError(f"network interfaces can't be listed: {error.strerror or error}") from error
    return {
        name: None if master is None else names.get(master, "")
        for name, master in masters.items()
        if name.startswith(prefix)
    }


def permanent_addresses(interface: str) -> set[str]:
    """Give the addresses of the permanent neighbours behind an interface, without running `ip`."""
    lines = Path("/proc/thread-self/net/arp").read_text(encoding="ascii").splitlines()[1:]
    entries = [line.split() for line in lines]  # address, kind, flags, hardware, mask, device
    return {
        entry[0] for entry in entries if entry[5] == interface and int(entry[2], 16) & _ATF_PERM
    }


def find_tap_holders(names: Collection[str]) -> dict[str, list[int]]:
    """Give the processes that hold these taps open; blocks for a look at every descriptor.

    One without a holder that can be seen has an empty list.
    """
    holders: dict[str, list[int]] = {name: [] for name in names}
    # A namespace belongs to a thread: ours is the calling one's.
    ours = _network_namespace("thread-self")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or _network_namespace(process.name) != ours:
            continue
        for name in _taps_of(process):
            if name in holders:
                holders[name].append(int(process.name))
    return holders


def _taps_of(process: Path) -> set[str]:
    try:
        descriptors = [entry.name for entry in (process / "fd").iterdir()]
    except OSError:  # it has ended
        return set()
    return {name for number in descriptors if (name := _tap_behind(process, number))}


def _tap_behind(process: Path, descriptor: str) -> str | None:
    try:
        # Not Path.readlink: this is asked of every descriptor on the box.
        if os.readlink(f"{process}/fd/{descriptor}") != "/dev/net/tun":  # noqa: PTH115
            return None
        text = (process / "fdinfo" / descriptor).read_text(encoding="utf-8")
    except OSError:  # it has been closed
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name == "iff"), None)


def _network_namespace(process: str) -> str:
    try:
        return str(Path(f"/proc/{process}/ns/net").readlink())
    except OSError:
        return ""
