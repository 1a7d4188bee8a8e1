"""This host finding guests by name: its systemd-resolved asks the name servers of their networks.

Without systemd-resolved nothing is changed here: whoever else answers this host's questions is not
ours to configure.
"""

import shutil
from ipaddress import IPv4Address
from pathlib import Path

from oscloudd.host.activation import is_service
from oscloudd.host.commands import run
from oscloudd.host.network.name_server import DOMAIN
from oscloudd.host.processes import PATH

_PROGRAM = "resolvectl"
_RESOLVED = Path("/run/systemd/resolve/io.systemd.Resolve")


def can_find_guests() -> bool:
    """Tell whether there is a systemd-resolved that `lead_to_guests` may be used with."""
    # It names an interface by its number, which is another one's outside of a network namespace: a
    # daemon that is a service of the host's has the host's interfaces.
    return is_service() and _RESOLVED.exists() and shutil.which(_PROGRAM, path=PATH) is not None


async def lead_to_guests(bridge: str, gateway: IPv4Address) -> None:
    """Have this host ask `gateway` for guests' names, until the bridge goes; raises HostError."""
    for command in build_commands(bridge, gateway):
        await run(command)


def build_commands(bridge: str, gateway: IPv4Address) -> list[list[str]]:
    """Build the resolvectl(1) commands; the server comes last: it never gets other names."""
    return [
        [_PROGRAM, "default-route", bridge, "no"],
        [_PROGRAM, "domain", bridge, f"~{DOMAIN}"],
        [_PROGRAM, "dns", bridge, str(gateway)],
    ]
