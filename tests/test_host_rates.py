"""Limits of bandwidth: how they are written, that they hold, both ways."""

import asyncio
import json
import subprocess
import sys

import pytest
from test_host_firewall import Guest, new_guests
from test_host_network_kernel import BRIDGE, in_namespace, ip

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.network.bridges import ensure_bridge
from oscloudd.host.network.rates import apply_rates, build_rates
from oscloudd.units import parse_rate

TAP = "osctap0"
PACKETS = 1000
# A thousand packets of a thousand bytes, as fast as they go.
FLOOD = f"""
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
    for _ in range({PACKETS}):
        flood.sendto(bytes(1000), (sys.argv[1], 9))
"""


@pytest.mark.parametrize(
    ("value", "rate"), [("100M", 100_000_000), ("64k", 64_000), (" 1G ", 10**9), (64000, 64000)]
)
def test_a_rate_is_read(value: int | str, rate: int) -> None:
    assert parse_rate(value, parameter="bandwidth") == rate


@pytest.mark.parametrize("value", ["", "M", "1.5M", "-1M", "63K", "1001G", "1T", 0, True, "٨M"])
def test_what_is_no_rate_is_refused(value: int | str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"bandwidth .* is no rate"):
        parse_rate(value, parameter="bandwidth")


def test_limits_are_written_for_nft() -> None:
    assert build_rates({}) == "add table netdev oscloud_rates\ndelete table netdev oscloud_rates\n"
    text = build_rates({"osctap7": 100_000_000, "osctap0": 64_000})
    assert text.index("osctap0_ingress") < text.index("osctap0_egress") < text.index("osctap7")
    assert "limit rate over 8000 bytes/second burst 262144 bytes drop" in text
    assert "limit rate over 12500000 bytes/second burst 1250000 bytes drop" in text


def received(interface: str, guest: Guest | None = None) -> int:
    command = ["ip", "-json", "-statistics", "link", "show", interface]
    if guest is not None:
        command = ["nsenter", "--net", "--target", str(guest.process.pid), *command]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(shown)[0]["stats64"]["rx"]["packets"])


@in_namespace
def test_what_is_beyond_a_limit_does_not_pass_either_way() -> None:
    asyncio.run(ensure_bridge(BRIDGE))
    with new_guests(1) as (guest,):
        guest.connect(TAP, "192.168.0.2", "192.168.0.1")
        ip(f"link set {TAP} master {BRIDGE.name}")
        flood = [sys.executable, "-I", "-c", FLOOD]

        def count() -> tuple[int, int]:
            before = received(BRIDGE.name), received("eth0", guest)
            guest.run(*flood, "192.168.0.1")
            subprocess.run([*flood, "192.168.0.2"], check=True)
            return received(BRIDGE.name) - before[0], received("eth0", guest) - before[1]

        assert min(count()) >= PACKETS
        asyncio.run(apply_rates({TAP: 64_000}))
        # What fits into a burst of 256 KiB, and hardly more for as long as this may take.
        seen = count()
        assert 200 < min(seen) <= max(seen) < 400
        asyncio.run(apply_rates({}))
        assert min(count()) >= PACKETS
