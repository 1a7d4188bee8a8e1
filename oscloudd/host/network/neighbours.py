"""The host's neighbour table: which hardware address a guest's address has.

The daemon knows it before the guest does, so the first packet need not ask.
"""

import errno
import fcntl
import socket
import struct
from ipaddress import IPv4Address

from oscloudd.errors import HostError
from oscloudd.host.network.interfaces import (
    SIOCDARP,
    SIOCSARP,
    check_interface_name,
    open_control_socket,
    parse_mac,
)

# struct arpreq of linux/if_arp.h: protocol address, hardware address, flags, netmask, device.
_REQUEST = struct.Struct("=HH4s8xH14si16x16s")
_ARPHRD_ETHER = 1
_ATF_COM = 0x02
_ATF_PERM = 0x04


def set_neighbour(interface: str, address: IPv4Address, mac: str) -> None:
    """Say for good that `address` behind `interface` has the hardware address `mac`."""
    request = _build_request(interface, address, parse_mac(mac), _ATF_COM | _ATF_PERM)
    try:
        with open_control_socket() as control:
            fcntl.ioctl(control, SIOCSARP, request)
    except OSError as error:
        raise HostError(
            f"neighbour {address} of {interface} can't be set: {error.strerror}"
        ) from error


def delete_neighbour(interface: str, address: IPv4Address) -> None:
    """Forget what `set_neighbour` said; nothing happens when there is nothing to forget."""
    try:
        with open_control_socket() as control:
            fcntl.ioctl(control, SIOCDARP, _build_request(interface, address, bytes(6), 0))
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise HostError(
                f"neighbour {address} of {interface} can't be deleted: {error.strerror}"
            ) from error


def _build_request(interface: str, address: IPv4Address, mac: bytes, flags: int) -> bytes:
    name = check_interface_name(interface)
    return _REQUEST.pack(socket.AF_INET, 0, address.packed, _ARPHRD_ETHER, mac, flags, name)
