"""A network's name server: one dnsmasq at its gateway, which outlives the daemon.

It reads the guests' names from a directory that the kernel tells it of (inotify): a name that
comes, changes or goes is a file, and costs no process. All else it asks the host's own resolvers.
"""

import functools
import pwd
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.activation import is_service
from oscloudd.host.commands import run
from oscloudd.host.network.interfaces import check_interface_name
from oscloudd.host.processes import PATH, ProcessIdentity, find_process

DOMAIN = "oscloud"
PROGRAM = "dnsmasq"
# Debian's dnsmasq-base makes it; dnsmasq itself would take the second.
_USERS = ("dnsmasq", "nobody")


@dataclass(frozen=True)
class NameServer:
    """Where a network's name server answers, and the directory that is its own."""

    bridge: str
    gateway: IPv4Address
    directory: Path
    isolated: bool = False  # asks nobody else

    @property
    def hosts(self) -> Path:
        """The directory of the names: one file a guest."""
        return self.directory / "hosts"

    @property
    def pid_file(self) -> Path:
        """Where dnsmasq writes its process number."""
        return self.directory / "pid"

    @property
    def unit(self) -> str:
        """Its service, where systemd runs."""
        return f"oscloud-names-{self.bridge}.service"


def is_installed() -> bool:
    """Tell whether there is a dnsmasq to start."""
    return shutil.which(PROGRAM, path=PATH) is not None


async def start_name_server(server: NameServer) -> None:
    """Start it; it has its port when this comes back. Raises HostError."""
    try:
        server.hosts.mkdir(parents=True, exist_ok=True)
        for directory in (server.directory.parent, server.directory, server.hosts):
            directory.chmod(0o755)  # no secret, and to be read without our rights
    except OSError as error:
        raise HostError(f"{server.hosts} can't be made: {error.strerror}") from error
    argv = build_name_server(server, _user())
    await run(build_names_service(argv, server) if is_service() else argv)


def find_name_server(server: NameServer) -> ProcessIdentity | None:
    """Give the name server that runs, whoever started it; None without one."""
    try:
        identity = find_process(int(server.pid_file.read_text(encoding="ascii")))
        if identity is None:
            return None
        command = Path(f"/proc/{identity.pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return identity if f"--pid-file={server.pid_file}".encode() in command else None


def write_name(
    server: NameServer, number: int, addresses: Iterable[IPv4Address | IPv6Address], name: str
) -> None:
    """Have a guest's addresses, of either family, found by a name, and by that one only."""
    server.hosts.mkdir(parents=True, exist_ok=True)
    path = server.hosts / str(number)
    text = "".join(f"{address} {name}.{DOMAIN} {name}\n" for address in addresses)
    if not path.exists() or path.read_text(encoding="ascii") != text:
        # dnsmasq leaves names that begin with a dot alone.
        draft = server.hosts / f".{number}"
        draft.write_text(text, encoding="ascii")
        draft.chmod(0o644)
        draft.rename(path)


def delete_name(server: NameServer, number: int) -> None:
    """Have a guest's address found no longer; nothing happens when it is not."""
    (server.hosts / str(number)).unlink(missing_ok=True)


def find_barrier(server: NameServer) -> Path | None:
    """Give the directory that keeps dnsmasq's user from the names; None where nothing does."""
    if is_service():  # it sees that directory and no other of ours
        return None
    for directory in reversed(server.hosts.parents):
        if directory.exists() and not directory.stat().st_mode & 0o001:
            return directory
    return None


def build_name_server(server: NameServer, user: str) -> list[str]:
    """Build dnsmasq's argument vector; it goes into the background by itself."""
    check_interface_name(server.bridge)
    return [
        PROGRAM,
        "--conf-file=/dev/null",
        f"--user={user}",
        f"--pid-file={server.pid_file}",
        f"--interface={server.bridge}",
        "--except-interface=lo",
        # On what the bridge has, now and later, so that others may have the port elsewhere.
        "--bind-dynamic",
        "--no-hosts",
        f"--hostsdir={server.hosts}",
        f"--local=/{DOMAIN}/",
        # A name without a dot is a guest's or nobody's.
        "--domain-needed",
        *(["--no-resolv"] if server.isolated else []),
    ]


def build_names_service(argv: list[str], server: NameServer) -> list[str]:
    """Build the systemd-run(1) command for it: the daemon itself may not bind its port."""
    top = server.directory.parent.parent
    capabilities = "CAP_NET_BIND_SERVICE CAP_NET_ADMIN CAP_SETUID CAP_SETGID"
    properties = (
        "Type=forking",
        f"PIDFile={server.pid_file}",
        "Slice=oscloud.slice",
        f"CapabilityBoundingSet={capabilities}",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        # Its user has no right to our directory, and is to see its own part only.
        f"TemporaryFileSystem={top}:mode=0755",
        f"BindPaths={server.directory}",
    )
    options = [f"--property={each}" for each in properties]
    return ["systemd-run", "--quiet", "--collect", f"--unit={server.unit}", *options, "--", *argv]


@functools.cache
def _user() -> str:
    for name in _USERS:
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return _USERS[-1]
