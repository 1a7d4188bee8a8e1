"""Two networks with many real guests: names, and addresses that stay and are freed."""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud
from name_stand_in import answering

pytestmark = pytest.mark.guest

SHAPE = {"mem_size": "128M", "cpus": 1, "disk_size": "1G"}
SUBNETS = {"red": IPv4Network("10.61.0.0/24"), "blue": IPv4Network("10.62.0.0/24")}
EACH = 15
UPSTREAM = "198.51.100.53"
# What busybox's ping says first, of each name that it finds.
FOUND = re.compile(r"PING (\S+)\.oscloud \((\S+)\)")


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        cloud.call("template_warm", template="tiny", **SHAPE)
        yield cloud


def create_all(cloud: GuestCloud, network: str, names: list[str]) -> list[dict[str, Any]]:
    """Make warm clones, all at once, and give them in order when all are ready."""
    public = cloud.key.with_suffix(".pub").read_text().strip()
    for name in names:
        cloud.call(
            "vm_create", name=name, image="tiny", network=network, ssh_key=[public],
            warm="only", wait="none", **SHAPE,
        )  # fmt: skip
    return [cloud.wait({"id": name}) for name in names]


def ask(cloud: GuestCloud, vm: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Give the address that a guest finds for each name that it knows, and that answers it."""
    command = f"for name in {' '.join(names)}; do ping -4 -c 1 -W 60 $name.oscloud || true; done"
    shown = cloud.ssh(vm, command)
    assert shown.count(" 0% packet loss") == len(FOUND.findall(shown)), shown
    return dict(FOUND.findall(shown))


def addresses_of(vms: list[dict[str, Any]]) -> dict[str, str]:
    return {vm["name"]: vm["ip"] for vm in vms}


def test_two_networks_of_many_guests(cloud: GuestCloud) -> None:
    for name, subnet in SUBNETS.items():
        servers = [UPSTREAM] if name == "red" else []
        cloud.call("network_create", name=name, subnet=str(subnet), dns=servers)
    vms = {
        network: create_all(cloud, network, [f"{network}-{number}" for number in range(EACH)])
        for network in SUBNETS
    }
    names = [vm["name"] for members in vms.values() for vm in members]
    for network, members in vms.items():
        assert {vm["started"] for vm in members} == {"warm"}
        assert len({vm["ip"] for vm in members}) == EACH
        assert all(IPv4Address(vm["ip"]) in SUBNETS[network] for vm in members)
        info = cloud.call("network_info", network=network)
        assert dict(zip(info["vms"], info["addresses"], strict=True)) == addresses_of(members)
        assert info["addresses_free"] == 253 - EACH
        # Of all there are, a guest finds those of its own network.
        assert ask(cloud, members[0], names) == addresses_of(members)

    red, blue = vms["red"], vms["blue"]
    # Other names are the server's that the network names.
    with answering(cloud.namespace, UPSTREAM, UPSTREAM):
        shown = cloud.ssh(red[0], "ping -4 -c 1 -W 1 www.example.com || true")
    assert f"PING www.example.com ({UPSTREAM})" in shown
    again = [red[1], red[7], blue[EACH - 1]]
    for vm in again:
        cloud.call("vm_stop", vm=vm["name"], force=True)
    for vm in again:
        cloud.call("vm_start", vm=vm["name"], wait=False)
    assert addresses_of([cloud.wait(vm) for vm in again]) == addresses_of(again)
    for members in (red, blue):
        assert ask(cloud, members[0], names) == addresses_of(members)

    # What one leaves is free, for the next one and under its name only.
    cloud.call("vm_delete", vm="red-1", force=True)
    [new] = create_all(cloud, "red", ["new"])
    assert new["ip"] == red[1]["ip"]
    assert ask(cloud, red[0], ["new", "red-1"]) == {"new": new["ip"]}
    assert ask(cloud, new, ["red-2"]) == {"red-2": red[2]["ip"]}

    for name in [*names, "new"]:
        if name != "red-1":
            cloud.call("vm_delete", vm=name, force=True)
    for network in SUBNETS:
        assert cloud.call("network_info", network=network)["addresses_used"] == 0
        cloud.call("network_delete", network=network)
    assert "oscbr" not in cloud.run("ip", "link")
    assert not list((cloud.root / "run/names").iterdir())
