"""A network namespace with an uplink: `netns up NAME`, `netns down NAME`.

The uplink is a veth pair with a /30 of its own, a default route through it, and masquerading in an
nft table of its own on the host. What was made is written down in RECORDS, so that `down` undoes
exactly that and leaves a namespace somebody else made alone. Knows nothing of oscloudd.
"""

import argparse
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network
from pathlib import Path

from forwarding import (
    allow_through_firewalls,
    build_masquerade,
    disallow_through_firewalls,
    enable_forwarding,
    restore_forwarding,
)
from resolver import remove_resolver, write_resolver
from stages import CheckoutError, run, say

# A boot empties it, as it empties the host of namespaces.
RECORDS = Path("/run/oscloud-netns")

# RFC 6598: shared address space, which no private network uses for itself.
LINK_NETS = IPv4Network("100.64.0.0/10")

# The guests' own network; a route to it by way of the uplink would be in their way.
GUEST_NETS = IPv4Network("192.168.0.0/16")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}", re.ASCII)


@dataclass(frozen=True)
class Uplink:
    """What was made for one namespace; a field is what `down` has to know to undo it."""

    name: str
    link_net: str
    host_interface: str
    table: str
    resolver_made: bool
    forwarding_was_off: bool

    @property
    def host_address(self) -> str:
        """Our end of the link, the namespace's gateway."""
        return str(IPv4Network(self.link_net)[1])

    @property
    def guest_address(self) -> str:
        """The namespace's end."""
        return str(IPv4Network(self.link_net)[2])


def bring_up(name: str) -> None:
    """Make the namespace with its uplink, where it isn't there; may be called again."""
    with _records_locked():
        uplink = find_uplink(name)
        if uplink is not None and exists(name):
            say(f"Namespace {name}: already there, uplink {uplink.link_net}")
            return
        if uplink is not None:
            _remove(uplink)
        if exists(name):
            say(f"Namespace {name}: was made by somebody else and is used as it is")
            return
        uplink = _plan(name)
        _write_record(uplink)
        try:
            _make(uplink)
        except BaseException:
            _remove(uplink)
            raise
        say(f"Namespace {name}: made, uplink {uplink.link_net} by way of {uplink.host_interface}")


def take_down(name: str) -> None:
    """Undo `bring_up`; leave the namespace if it is not ours or if something runs in it."""
    with _records_locked():
        uplink = find_uplink(name)
        if uplink is None:
            if exists(name):
                say(f"Namespace {name}: was made by somebody else and stays")
            return
        if exists(name) and (pids := run(["ip", "netns", "pids", name]).split()):
            raise CheckoutError(
                f"namespace {name} is in use by process {', '.join(pids[:5])}", "stop it first"
            )
        _remove(uplink)
        say(f"Namespace {name}: removed")


def exists(name: str) -> bool:
    """Tell whether `ip netns exec` would find it."""
    return Path("/run/netns", name).exists()


def find_uplink(name: str) -> Uplink | None:
    """Give the record of a namespace we made, or None."""
    try:
        return Uplink(**json.loads((RECORDS / name).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CheckoutError(f"{RECORDS / name} can't be read: {error}", "remove it") from error


def _plan(name: str) -> Uplink:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    plain = re.sub("[^A-Za-z0-9_]", "_", name)
    return Uplink(
        name=name,
        link_net=str(find_free_link_net(_used_networks())),
        # IFNAMSIZ: 15 bytes.
        host_interface=f"osc{digest}",
        # nft's identifiers have no hyphen; the digest tells a-b from a_b.
        table=f"oscloud_uplink_{plain}" + ("" if plain == name else f"_{digest}"),
        resolver_made=not Path("/etc/netns", name).exists(),
        forwarding_was_off=enable_forwarding(),
    )


def find_free_link_net(used: list[IPv4Network]) -> IPv4Network:
    """Give the first /30 of LINK_NETS that overlaps none of `used`."""
    for net in LINK_NETS.subnets(new_prefix=30):
        if not any(net.overlaps(other) for other in [*used, GUEST_NETS]):
            return net
    raise CheckoutError(f"no free /30 in {LINK_NETS}", "see: ip route show table all")


def _used_networks() -> list[IPv4Network]:
    routes = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]))
    found = [route["dst"] for route in routes if route["dst"] != "default"]
    recorded = [find_uplink(record.name) for record in RECORDS.iterdir() if record.is_file()]
    found += [uplink.link_net for uplink in recorded if uplink]
    return [IPv4Network(net, strict=False) for net in found]


def _make(uplink: Uplink) -> None:
    name, host = uplink.name, uplink.host_interface
    run(["ip", "netns", "add", name])
    commands = f"""
        link add {host} type veth peer name uplink netns {name}
        address add {uplink.host_address}/30 dev {host}
        link set {host} alias "oscloud: uplink of namespace {name}" up
    """
    run(["ip", "-batch", "-"], input_text=commands)
    commands = f"""
        link set lo up
        address add {uplink.guest_address}/30 dev uplink
        link set uplink up
        route add default via {uplink.host_address}
    """
    run(["ip", "-netns", name, "-batch", "-"], input_text=commands)
    run(["nft", "-f", "-"], input_text=build_masquerade(uplink.table, uplink.link_net))
    allow_through_firewalls(host)
    if uplink.resolver_made:
        write_resolver(name)


def _remove(uplink: Uplink) -> None:
    """Undo everything that may have been made; what isn't there is no failure."""
    # The link first: a namespace takes its end with it at a time of the kernel's choosing.
    if Path("/sys/class/net", uplink.host_interface).exists():
        run(["ip", "link", "delete", uplink.host_interface])
    if exists(uplink.name):
        run(["ip", "netns", "delete", uplink.name])
    # `add` first: deleting a table that isn't there is an error.
    text = f"add table ip {uplink.table}\ndelete table ip {uplink.table}\n"
    run(["nft", "-f", "-"], input_text=text)
    disallow_through_firewalls(uplink.host_interface)
    if uplink.resolver_made:
        remove_resolver(uplink.name)
    (RECORDS / uplink.name).unlink(missing_ok=True)
    if uplink.forwarding_was_off:
        _hand_on_forwarding()


def _hand_on_forwarding() -> None:
    others = [found for path in RECORDS.iterdir() if (found := find_uplink(path.name))]
    if others:
        # Whoever goes last restores it.
        _write_record(Uplink(**{**asdict(others[0]), "forwarding_was_off": True}))
    else:
        restore_forwarding()


def _write_record(uplink: Uplink) -> None:
    (RECORDS / uplink.name).write_text(json.dumps(asdict(uplink)), encoding="utf-8")


@contextmanager
def _records_locked() -> Iterator[None]:
    RECORDS.mkdir(exist_ok=True)
    with RECORDS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_name(name: str) -> str:
    """Give `name` back if it can name a namespace of ours; raise CheckoutError otherwise."""
    if not _NAME.fullmatch(name):
        raise CheckoutError(
            f"{name!r:.60} can't name a namespace", "use up to 32 letters, digits, _ or -"
        )
    return name


def main() -> int:
    """Be the program `netns`."""
    parser = argparse.ArgumentParser(prog="netns", description=__doc__)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("name")
    chosen = parser.parse_args()
    (bring_up if chosen.action == "up" else take_down)(check_name(chosen.name))
    return 0
