"""Giving out what only one can have: names, addresses, MACs, taps, serial ports, bridges.

Pure. Called inside the transaction that inserts the row; the UNIQUE constraints are the judge. An
IPv6 address is nobody's to give out: it follows from the IPv4 one.
"""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import count

from oscloudd.errors import ExhaustedError, InUseError, InvalidArgumentError

# The original's ports: 10002, 10004, …
FIRST_SERIAL_PORT = 10002
_SERIAL_PORT_STEP = 2
# A network's vms share a bridge, which has so many ports: linux/if_bridge.h BR_MAX_PORTS less one.
MAX_GUESTS = 1023
# Below the range the kernel takes ephemeral ports from (ip_local_port_range, 32768).
_LAST_SERIAL_PORT = 32766


def first_free_index(taken: Collection[int]) -> int:
    """Give the smallest number from 0 on that is not taken."""
    return next(number for number in count() if number not in taken)


def first_free_serial_port(taken: Collection[int]) -> int:
    """Give the smallest even port from 10002 on that is not taken; raises ExhaustedError."""
    for port in range(FIRST_SERIAL_PORT, _LAST_SERIAL_PORT + 1, _SERIAL_PORT_STEP):
        if port not in taken:
            return port
    raise ExhaustedError("no serial port is left", resource="serial_port")


def gateway_of(subnet: IPv4Network) -> IPv4Address:
    """Give the address of the bridge: the first of the subnet."""
    return subnet.network_address + 1


def address6_of(subnet6: IPv6Network, subnet: IPv4Network, address: IPv4Address) -> IPv6Address:
    """Give the IPv6 address beside an IPv4 one: the host of the same number in the other subnet."""
    return subnet6.network_address + (int(address) - int(subnet.network_address))


def count_addresses(subnet: IPv4Network) -> int:
    """Give how many guests have room beside the gateway."""
    return min(subnet.num_addresses - 3, MAX_GUESTS)


def allocate_address(
    subnet: IPv4Network, taken: Collection[str], wanted: str | None, *, network: str
) -> str:
    """Give the address asked for, or the first free one after the gateway.

    Raises InvalidArgumentError, InUseError or ExhaustedError.
    """
    if len(taken) >= MAX_GUESTS:
        raise ExhaustedError(
            f"network {network!r} has {len(taken)} vms: a bridge has no more ports",
            hint="use another network, or make one: oscloudctl network-create",
            resource="bridge_port",
        )
    if wanted is not None:
        return _check_wanted(subnet, taken, wanted, network)
    for number in range(2, subnet.num_addresses - 1):
        address = str(subnet.network_address + number)
        if address not in taken:
            return address
    raise ExhaustedError(
        f"network {network!r} has no address left: {subnet} has {count_addresses(subnet)} for vms",
        hint="delete a vm, or use another network",
        resource="address",
    )


def _check_wanted(subnet: IPv4Network, taken: Collection[str], wanted: str, network: str) -> str:
    try:
        address = IPv4Address(wanted)
    except ValueError as error:
        raise InvalidArgumentError(
            f"ip {wanted!r:.60} is not an IPv4 address", parameter="ip"
        ) from error
    reserved = (subnet.network_address, subnet.broadcast_address, gateway_of(subnet))
    if address not in subnet or address in reserved:
        raise InvalidArgumentError(
            f"ip {wanted} can't be a guest's in network {network!r}",
            hint=f"between {subnet.network_address + 2} and {subnet.broadcast_address - 1}",
            parameter="ip",
        )
    if wanted in taken:
        raise InUseError(
            f"ip {wanted} belongs to another vm", hint="leave ip out to get a free one"
        )
    return str(address)


def mac_of(uuid_hex: str) -> str:
    """Give a MAC in qemu's own range 52:54:00 (locally administered), the rest from a uuid."""
    return "52:54:00:" + ":".join(uuid_hex[at : at + 2] for at in (0, 2, 4))
