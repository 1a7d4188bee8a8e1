"""Giving out addresses: pure functions."""

from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest

from oscloudd.cloud.allocation import (
    MAX_GUESTS,
    address6_of,
    allocate_address,
    count_addresses,
)
from oscloudd.errors import ExhaustedError

LARGE = IPv4Network("192.168.0.0/16")


def test_a_network_has_no_more_vms_than_its_bridge_has_ports() -> None:
    taken = {str(LARGE.network_address + number) for number in range(2, 2 + MAX_GUESTS)}
    last = taken.pop()
    for wanted in (None, last):
        assert allocate_address(LARGE, taken, wanted, network="lab") == last
    taken.add(last)
    for wanted in (None, "192.168.200.1"):
        with pytest.raises(ExhaustedError, match="no more ports") as refused:
            allocate_address(LARGE, taken, wanted, network="lab")
        assert refused.value.details["resource"] == "bridge_port"


@pytest.mark.parametrize(
    ("subnet", "count"),
    [("10.0.0.0/30", 1), ("10.0.0.0/29", 5), ("10.0.0.0/24", 253), ("10.0.0.0/16", 1023)],
)
def test_how_many_guests_have_room(subnet: str, count: int) -> None:
    network = IPv4Network(subnet)
    assert count_addresses(network) == count
    if count < MAX_GUESTS:
        taken: set[str] = set()
        for _ in range(count):
            taken.add(allocate_address(network, taken, None, network="lab"))
        assert len(taken) == count
        with pytest.raises(ExhaustedError):
            allocate_address(network, taken, None, network="lab")


@pytest.mark.parametrize(
    ("subnet", "address", "address6"),
    [
        ("10.20.0.0/24", "10.20.0.1", "fd00:a::1"),
        ("10.20.0.0/24", "10.20.0.254", "fd00:a::fe"),
        ("192.168.0.0/16", "192.168.1.2", "fd00:a::102"),
        ("10.0.0.8/29", "10.0.0.10", "fd00:a::2"),
        ("10.0.0.0/8", "10.255.255.254", "fd00:a::ff:fffe"),
    ],
)
def test_the_other_address_has_the_same_number(subnet: str, address: str, address6: str) -> None:
    made = address6_of(IPv6Network("fd00:a::/64"), IPv4Network(subnet), IPv4Address(address))
    assert str(made) == address6
