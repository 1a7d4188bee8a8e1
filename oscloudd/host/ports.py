"""Ports of this host: taking one so that nobody else does, and seeing who has it."""

import errno
import re
import socket
from ipaddress import IPv4Address

from oscloudd.errors import CloudError, HostError, InUseError, InvalidArgumentError
from oscloudd.host.commands import run

_TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_HOLDER = re.compile(r'users:\(\("([^"]*)",pid=([0-9]+)')


def hold_port(protocol: str, address: IPv4Address, port: int) -> socket.socket:
    """Bind a port that nobody is served at: no other program can, for as long as it is open.

    Raises InUseError, InvalidArgumentError for an address that is not this host's, or HostError.
    """
    # Without SO_REUSEADDR nobody can bind it besides, whatever they set.
    held = socket.socket(socket.AF_INET, _TYPES[protocol] | socket.SOCK_CLOEXEC)
    try:
        held.bind((str(address), port))
    except OSError as error:
        held.close()
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


async def find_port_holder(protocol: str, port: int) -> str | None:
    """Give the program that has a port open, as "nginx (process 812)"; None if it can't be seen."""
    try:
        listed = await run(
            ["ss", "-Hlnp", f"--{protocol}", "sport", "=", f":{port}"], timeout_seconds=5
        )
    except CloudError:
        return None
    found = _HOLDER.search(listed)
    return None if found is None else f"{found[1]} (process {found[2]})"
