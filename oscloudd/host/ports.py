"""Ports of this host: taking one so that nobody else does, and seeing who has it."""

import errno
import re
import socket
from ipaddress import IPv4Address

from oscloudd.errors import HostError, InUseError, InvalidArgumentError
from oscloudd.host.commands import run

_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_PROCESS = re.compile(r'users:\(\("([^"]*)",pid=([0-9]+)')
_EVERYWHERE = {"0.0.0.0", "*", "[::]"}


def hold_port(protocol: str, address: IPv4Address, port: int) -> socket.socket | None:
    """Bind a port that nobody is served at: no other program can, for as long as it is open.

    None for a port below 1024 where that takes a capability which systemd's unit does not give.
    Raises InUseError, InvalidArgumentError for an address that is not this host's, or HostError.
    """
    # Without SO_REUSEADDR nobody can bind it besides, whatever they set.
    held = socket.socket(socket.AF_INET, _TYPES[protocol] | socket.SOCK_CLOEXEC)
    try:
        held.bind((str(address), port))
    except OSError as error:
        held.close()
        if error.errno == errno.EACCES:
            return None
        if error.errno == errno.EADDRINUSE:
            raise InUseError(f"port {port}/{protocol} of {address} is in use") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidArgumentError(
                f"{address} is no address of this host",
                hint="127.0.0.1 is for this host only, 0.0.0.0 for everybody",
                parameter="port",
            ) from error
        why = error.strerror or error
        raise HostError(f"port {port}/{protocol} of {address} can't be bound: {why}") from error
    return held


async def find_port_holder(protocol: str, address: IPv4Address, port: int) -> str | None:
    """Give the program that listens at a port, as "nginx (process 812)"; None without one."""
    command = ["ss", "-Hlnp", f"--{protocol}", "sport", "=", f":{port}"]
    for line in (await run(command, timeout_seconds=5)).splitlines():
        local = line.split()[3].rpartition(":")[0].partition("%")[0]
        if {local, str(address)} & _EVERYWHERE or local == str(address):
            found = _PROCESS.search(line)
            return "another program" if found is None else f"{found[1]} (process {found[2]})"
    return None
