"""A network's name server: one dnsmasq at its gateway, which outlives the daemon.

It reads the guests' names from a directory that the kernel tells it of (inotify): a name that
comes, changes or goes is a file, and costs no process. All else it asks the servers that its
network names, else the host's own resolvers.
Guests that ask for their address by DHCP are told it: `dhcp`.
"""

import functools
import pwd
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path

from oscloudd.errors import HostError, NotFoundError
from oscloudd.host.activation import is_service
from oscloudd.host.commands import run
from oscloudd.host.network.dhcp import (
    NamedGuest,
    build_address,
    build_dhcp_options,
    parse_address,
    release_address,
)
from oscloudd.host.network.interfaces import check_interface_name
from oscloudd.host.processes import PATH, ProcessIdentity, find_process, open_process

DOMAIN = "oscloud"
PROGRAM = "dnsmasq"
# Debian's dnsmasq-base makes it; dnsmasq itself would take the second.
_USERS = ("dnsmasq", "nobody")


@dataclass(frozen=True)
class NameServer:
    """Where a network's name server answers, and the directory that is its own."""

    bridge: str
    gateway: IPv4Interface
    directory: Path
    isolated: bool = False  # asks nobody else, unless it is told whom
    upstream: tuple[str, ...] = ()  # whom it asks in the place of the host's resolvers

    @property
    def hosts(self) -> Path:
        """The directory of the names: one file a guest."""
        return self.directory / "hosts"

    @property
    def addresses(self) -> Path:
        """The directory of what DHCP tells: one file a guest."""
        return self.directory / "addresses"

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
        for directory in (server.hosts, server.addresses):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o755)  # no secret, and to be read without our rights
        for directory in (server.directory.parent, server.directory):
            directory.chmod(0o755)
    except OSError as error:
        raise HostError(f"{server.hosts} can't be made: {error.strerror}") from error
    argv = build_name_server(server, _user())
    await run(build_names_service(argv, server) if is_service() else argv)


def find_name_server(server: NameServer) -> ProcessIdentity | None:
    """Give the name server that runs, whoever started it; None without one."""
    identity, command = _find(server)
    return identity if f"--pid-file={server.pid_file}" in command else None


def is_outdated(server: NameServer) -> bool:
    """Tell whether one runs that has other options, as an older version of this program gave it."""
    # systemd writes the program's path in the place of its name.
    _, *options = build_name_server(server, _user())
    _, command = _find(server)
    return f"--pid-file={server.pid_file}" in command and not set(options) <= set(command)


def _find(server: NameServer) -> tuple[ProcessIdentity | None, list[str]]:
    try:
        identity = find_process(int(server.pid_file.read_text(encoding="ascii")))
        if identity is None:
            return None, []
        command = Path(f"/proc/{identity.pid}/cmdline").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None, []
    return identity, command.split("\0")


def write_guest(server: NameServer, number: int, guest: NamedGuest) -> None:
    """Have a guest's addresses found by its name, and by that one only, and told by DHCP."""
    name = guest.name
    lines = (f"{address} {name}.{DOMAIN} {name}\n" for address in guest.addresses)
    _write(server.hosts / str(number), "".join(lines))
    if _write(server.addresses / str(number), build_address(guest)):
        _reload(server)


def delete_guest(server: NameServer, number: int, mac: str, address: str) -> None:
    """Have a guest neither found nor told anything; nothing happens when it is not known."""
    (server.hosts / str(number)).unlink(missing_ok=True)
    (server.addresses / str(number)).unlink(missing_ok=True)
    if _reload(server):
        with suppress(OSError):  # the bridge has gone, and its guests with it
            release_address(server.gateway, server.bridge, mac, address)


def find_told(server: NameServer, number: int) -> tuple[str, str] | None:
    """Give the MAC of a guest's card and the address that it is told, as they are written down."""
    try:
        return parse_address((server.addresses / str(number)).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> bool:
    """Have a file say `text`; tells whether it said something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="ascii") == text:
        return False
    # dnsmasq leaves names that begin with a dot alone.
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="ascii")
    draft.chmod(0o644)
    draft.rename(path)
    return True


def _reload(server: NameServer) -> bool:
    """Have dnsmasq read again who has which address; tells whether there is one."""
    identity = find_name_server(server)
    if identity is None:
        return False
    with suppress(NotFoundError):
        process = open_process(identity)
        process.send_signal(signal.SIGHUP)
        process.close()
        return True
    return False


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
        *(["--no-resolv"] if server.isolated or server.upstream else []),
        *(f"--server={address}" for address in server.upstream),
        f"--domain={DOMAIN}",
        *build_dhcp_options(server.gateway, server.addresses),
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
        # What guests can have it do is bounded: 150 questions at once, a process for each of 20
        # TCP connections, and a cache of 150 names (dnsmasq's own defaults).
        "MemoryMax=64M",
        "TasksMax=32",
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
