"""Taps: the host's end of a guest's network card.

A tap lives as long as its descriptor: qemu gets it by inheritance, and whatever way qemu ends, the
tap ends with it. Made by ioctl calls, in half a millisecond; one run of `ip` takes 3.5.
"""

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from oscloudd.errors import AlreadyExistsError, HostError, NotFoundError
from oscloudd.host.network.bridge_ports import join_bridge
from oscloudd.host.network.interfaces import (
    check_interface_name,
    open_control_socket,
    set_up,
)

_DEVICE = "/dev/net/tun"

# linux/if_tun.h. IFF_TUN_EXCL refuses an interface that is there already, whoever made it.
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000


def open_tap(name: str, bridge: str | None) -> int:
    """Make the tap `name`, a port of `bridge` (or of none) and up, and give its descriptor.

    The caller closes the descriptor; the tap is gone when the last copy of it is. Raises
    AlreadyExistsError when the name is taken, NotFoundError when there is no such bridge.
    """
    encoded = check_interface_name(name)
    tap_fd = _open_device()
    try:
        _create(tap_fd, name, encoded)
        # The host is no neighbour of the guest on this port: the bridge has the address.
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1", encoding="ascii")
        _connect(name, bridge)
    except BaseException:
        os.close(tap_fd)
        raise
    return tap_fd


def join_tap(name: str, bridge: str) -> None:
    """Make a tap that is there a port of `bridge`, and of no other; may be called again.

    Raises NotFoundError or HostError.
    """
    _connect(name, bridge)


def _open_device() -> int:
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENODEV)
        raise HostError(
            f"{_DEVICE} can't be opened: {error.strerror}",
            hint="modprobe tun" if missing else "oscloudd has to run as root",
        ) from error


def _create(tap_fd: int, name: str, encoded: bytes) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    try:
        fcntl.ioctl(tap_fd, _TUNSETIFF, struct.pack("16sH22x", encoded, flags))
    except OSError as error:
        # An interface that is no tap at all is answered EINVAL, a foreign tap EBUSY.
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.EEXIST):
            raise AlreadyExistsError(
                f"there is a network interface {name} already",
                hint=f"see what it is with: ip -details link show {name}",
            ) from error
        raise HostError(f"tap {name} can't be made: {error.strerror}") from error


def _connect(name: str, bridge: str | None) -> None:
    with open_control_socket() as control:
        try:
            if bridge is not None:
                join_bridge(name, bridge)
            set_up(control, name)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise NotFoundError(f"there is no bridge {bridge} for tap {name}") from error
            if error.errno == errno.EXFULL:
                # 1023 ports: linux/if_bridge.h BR_MAX_PORTS.
                raise HostError(f"bridge {bridge} has no port left for tap {name}") from error
            why = error.strerror or error
            raise HostError(f"tap {name} can't join bridge {bridge}: {why}") from error
