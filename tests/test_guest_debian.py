"""debian_12, built by the daemon from Debian's packages, booted and logged into."""

from collections.abc import Iterator

import pytest
from guest_cloud import GuestCloud, open_cloud

pytestmark = [pytest.mark.guest, pytest.mark.debian]

IDENTITY = "hostname; cat /etc/machine-id /etc/shadow; ip -o address | grep -v ' lo '; ip route"


@pytest.fixture
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("debian_12") as cloud:
        yield cloud


def test_debian_knows_who_it_is_and_stays_so(cloud: GuestCloud) -> None:
    cloud.call("network_create", name="lab", subnet="10.73.0.0/24")
    shape = {"image": "debian_12", "mem_size": "1G", "disk_size": "10G", "cpus": 2}
    vm = cloud.create("my_debian", network=["default", "lab"], **shape)
    assert cloud.ssh(vm, "hostname") == "my-debian"
    assert cloud.ssh_by_password(vm, "123456", "hostname") == "my-debian"
    for nic, prefix in zip(vm["nics"], ("/16", "/24"), strict=True):
        at_nic = cloud.ssh({**vm, "ip": nic["ip"]}, "ip -4 -o address; ip -6 -o address")
        assert f"eth{nic['slot']}    inet {nic['ip']}{prefix}" in at_nic
        assert f"eth{nic['slot']}    inet6 {nic['ip6']}/64" in at_nic
    assert cloud.ssh(vm, "ip route").count("default") == 1
    gateway6 = cloud.call("network_info", network="default")["gateway6"]
    assert f"default via {gateway6} dev eth0" in cloud.ssh(vm, "ip -6 route")
    assert cloud.ssh(vm, "ip -6 route").count("default") == 1
    cloud.ssh(vm, f"ping -c 1 -W 20 {gateway6}")
    assert int(cloud.ssh(vm, "df -k --output=size / | tail -n 1")) > 9 * (1 << 20)
    assert "Powered by OS Cloud" in cloud.ssh(vm, "cat /etc/motd /run/motd.dynamic 2>/dev/null")
    before = cloud.ssh(vm, IDENTITY)
    cloud.call("vm_restart", vm=vm["id"])
    again = cloud.wait(vm)
    assert again["pid"] != vm["pid"]
    assert again["ssh_host_keys"] == vm["ssh_host_keys"]
    assert cloud.ssh(again, IDENTITY) == before
