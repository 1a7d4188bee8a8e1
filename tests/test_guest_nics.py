"""Real guests with several network cards: told of them at first boot, or plugged in later."""

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud

pytestmark = pytest.mark.guest

PINGS = "ping -c 3 -W 20"
IN_LAB = "10.71.0.9"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        cloud.call("network_create", name="lab", subnet="10.71.0.0/24")
        cloud.call("network_create", name="more", subnet="10.72.0.0/24")
        yield cloud


@pytest.fixture(scope="module")
def web(cloud: GuestCloud) -> dict[str, Any]:
    return cloud.create("web", network=["default", f"lab,ip={IN_LAB}"])


def cards_seen(cloud: GuestCloud, vm: dict[str, Any]) -> dict[str, str]:
    """Give the MACs of the cards that a guest itself has, by interface."""
    shown = cloud.ssh(vm, "cd /sys/class/net; grep . eth*/address")
    return dict(line.split("/address:") for line in shown.splitlines())  # type: ignore[misc]


def macs_of(vm: dict[str, Any]) -> list[str]:
    return [nic["mac"] for nic in vm["nics"]]


def answers(cloud: GuestCloud, vm: dict[str, Any]) -> list[bool]:
    """Tell at which of its addresses the host reaches a guest."""
    return [
        cloud.ssh({**vm, "ip": nic["ip"]}, "hostname", check=False) == vm["name"]
        for nic in vm["nics"]
    ]


def reaches(cloud: GuestCloud, vm: dict[str, Any], target: str, *, source: str) -> bool:
    """Tell whether a guest's pings from an address of its own are answered."""
    shown = cloud.ssh(vm, f"ping -c 2 -W 3 -I {source} {target}", check=False)
    return " 0% packet loss" in shown


def test_a_guest_is_told_of_every_card(cloud: GuestCloud, web: dict[str, Any]) -> None:
    assert web["started"] == "cold"
    assert list(cards_seen(cloud, web).values()) == macs_of(web)
    assert answers(cloud, web) == [True, True]
    [route] = re.findall("default .*", cloud.ssh(web, "ip route"))
    assert route.split() == ["default", "via", web["gateway"], "dev", "eth0"]
    # Its name leads to the addresses that it has where the question comes from.
    other = cloud.create("other", network="lab")
    third = cloud.create("third")
    for asker, nic in ((third, web["nics"][0]), (other, web["nics"][1])):
        for family, address in (("-4", nic["ip"]), ("-6", nic["ip6"])):
            shown = cloud.ssh(asker, f"{PINGS} {family} web.oscloud")
            assert f"web.oscloud ({address})" in shown
    counted = cloud.info(web)["nics"]
    assert all(nic["rx_bytes"] > 0 and nic["tx_packets"] > 0 for nic in counted)
    for vm in (other, third):
        cloud.call("vm_delete", vm=vm["id"], force=True)


def test_no_card_sends_with_another_address(cloud: GuestCloud, web: dict[str, Any]) -> None:
    gateway = "10.71.0.1"
    assert reaches(cloud, web, gateway, source=IN_LAB)
    cloud.ssh(web, "ip address add 10.71.0.99/24 dev eth1")
    assert not reaches(cloud, web, gateway, source="10.71.0.99")
    cloud.ssh(web, "ip address del 10.71.0.99/24 dev eth1")
    assert reaches(cloud, web, gateway, source=IN_LAB)
    own = cards_seen(cloud, web)
    cloud.ssh(web, f"ip link set eth1 address {own['eth0']}")
    assert not reaches(cloud, web, gateway, source=IN_LAB)
    cloud.ssh(web, f"ip link set eth1 address {own['eth1']}")
    assert reaches(cloud, web, gateway, source=IN_LAB)


def test_a_card_is_plugged_into_a_running_guest_and_out_again(
    cloud: GuestCloud, web: dict[str, Any]
) -> None:
    added = cloud.call("nic_add", vm="web", network="more")
    cloud.until(lambda: len(cards_seen(cloud, web)) == 3, "the card in the guest")
    assert sorted(cards_seen(cloud, web).values()) == sorted(macs_of(added))
    address = added["nics"][2]["ip"]
    cloud.ssh(web, f"ip link set eth2 up; ip address add {address}/24 dev eth2")
    assert reaches(cloud, web, "10.72.0.1", source=address)
    assert answers(cloud, added) == [True, True, True]

    cloud.end(signal.SIGKILL)
    cloud.start()
    cloud.wait(web)
    assert answers(cloud, added) == [True, True, True]
    left = cloud.call("nic_delete", vm="web", nic="more")
    assert list(cards_seen(cloud, web).values()) == macs_of(left) == macs_of(web)
    assert added["nics"][2]["tap"] not in cloud.run("ip", "link")
    # Its slot and its tap are free for the next.
    again = cloud.call("nic_add", vm="web", network="more")
    assert again["nics"][2]["tap"] == added["nics"][2]["tap"]
    assert len(cards_seen(cloud, web)) == 3
    cloud.call("nic_delete", vm="web", nic=2)


def test_cards_stay_through_restart_and_suspension(cloud: GuestCloud, web: dict[str, Any]) -> None:
    before = cloud.ssh(web, "cat /proc/sys/kernel/random/boot_id")
    cloud.call("vm_suspend", vm="web")
    cloud.call("vm_resume", vm="web")
    assert answers(cloud, web) == [True, True]
    assert cloud.ssh(web, "cat /proc/sys/kernel/random/boot_id") == before

    # One that was plugged in while the guest ran is there for its memory, too.
    added = cloud.call("nic_add", vm="web", network="more")
    assert len(cards_seen(cloud, web)) == 3
    cloud.call("vm_suspend", vm="web")
    cloud.call("vm_resume", vm="web")
    assert list(cards_seen(cloud, web).values()) == macs_of(added)
    cloud.call("nic_delete", vm="web", nic="more")
    assert list(cards_seen(cloud, web).values()) == macs_of(web)

    cloud.call("vm_restart", vm="web")
    cloud.wait(web)
    assert answers(cloud, web) == [True, True]
    assert list(cards_seen(cloud, web).values()) == macs_of(web)


def test_a_clone_is_told_of_its_own_cards(cloud: GuestCloud, web: dict[str, Any]) -> None:
    clone = cloud.call("vm_clone", vm="web", name="copy")
    assert [nic["network"] for nic in clone["nics"]] == ["default", "lab"]
    assert not {*macs_of(clone)} & {*macs_of(web)}
    assert list(cards_seen(cloud, clone).values()) == macs_of(clone)
    assert answers(cloud, clone) == [True, True]
    assert answers(cloud, web) == [True, True]
    assert reaches(cloud, clone, IN_LAB, source=clone["nics"][1]["ip"])
