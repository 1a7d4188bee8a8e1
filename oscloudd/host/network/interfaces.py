"""The kernel's ioctl calls on network interfaces: names, indices, flags.

Knows the byte layouts; what is done with an interface is `taps.py`'s.
"""

import fcntl
import socket
import struct

from oscloudd.errors import InvalidArgumentError

# linux/if.h IFNAMSIZ, the closing zero included.
_NAME_BYTES = 16

# linux/sockios.h and linux/if.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def check_interface_name(name: str) -> bytes:
    """Give the bytes of an interface's name; raise InvalidArgumentError where the kernel would."""
    encoded = name.encode("utf-8", "replace")
    good = 0 < len(encoded) < _NAME_BYTES and name.isascii() and name.isprintable()
    if not good or name in (".", "..") or set(name) & set('/: "%{}'):
        raise InvalidArgumentError(
            f"{name!r:.60} can't name a network interface",
            hint="use 1 to 15 letters, digits, - or _",
        )
    return encoded


def parse_mac(mac: str) -> bytes:
    """Give the six bytes of a hardware address; raises InvalidArgumentError."""
    try:
        raw = bytes.fromhex(mac.replace(":", ""))
    except ValueError:
        raw = b""
    if len(raw) != 6:
        raise InvalidArgumentError(f"{mac!r:.40} is not a hardware address")
    return raw


def find_index(name: str) -> int | None:
    """Give an interface's number, or None without one."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def open_control_socket() -> socket.socket:
    """Give a socket that ioctl calls on interfaces go through; it sends nothing."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def set_up(control: socket.socket, name: str) -> None:
    """Set the interface's "up" flag."""
    layout = struct.Struct("16sH22x")
    encoded = check_interface_name(name)
    answer = fcntl.ioctl(control, SIOCGIFFLAGS, layout.pack(encoded, 0))
    flags = layout.unpack(answer)[1]
    fcntl.ioctl(control, SIOCSIFFLAGS, layout.pack(encoded, flags | IFF_UP))
