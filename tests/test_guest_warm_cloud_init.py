"""Guests with cloud-init that begin where a saved one stood, as those of our own templates do.

The image is like a vendor's. It boots twice: to be saved, and when a clone is restarted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from guest_cloud import BOOT_ID, GuestCloud, open_cloud
from test_guest_cloud_init import LIMIT_SECONDS, call
from vendor_image import ensure_vendor_image

pytestmark = pytest.mark.guest

SHAPE = {"mem_size": "512M", "disk_size": "3G"}
LARGER = "4G"
GIB_KILOBYTES = 1 << 20

# What is for good: each clone's own, or everyone's. What is new in each boot.
OWN = {
    "hostname": "hostname; cat /etc/hostname",
    "hosts": "cat /etc/hosts",
    "machine-id": "cat /etc/machine-id",
    "host keys": "cat /etc/ssh/ssh_host_*",
    "address": "ip -4 -o address show eth0 | sed 's/ *valid_lft.*//'",
    "address6": "ip -6 -o address show eth0 | sed 's/ nodad//; s/ *valid_lft.*//'",
    "mac": "cat /sys/class/net/eth0/address",
    "shadow": "grep ^root: /etc/shadow",
    "instance": "readlink /var/lib/cloud/instance; ls /var/lib/cloud/instances;"
    " cloud-init query instance_id",
    "bus": "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1"
    " org.freedesktop.DBus.Peer GetMachineId",
    "journals": "ls /var/log/journal",
    "kilobytes": "df -k --output=size / | tail -n 1",
}
SAME = {
    "keys": "cut -d ' ' -f 3 /root/.ssh/authorized_keys /home/debian/.ssh/authorized_keys",
    "route": "ip route | sed 's/ *$//'",
    "route6": "ip -6 route show default | sed 's/ pref .*//'",
    "resolvers": "grep ^nameserver /run/systemd/resolve/resolv.conf",
    "failed": "systemctl --failed --no-legend",
    "status": "cloud-init status",
    "passwords": "sshd -T | grep -i ^passwordauthentication",
    "greeting": "sh /etc/update-motd.d/99-os-cloud-welcome",
    "network": "networkctl --no-legend list eth0 | tr -s ' '",
}
PASSING = {
    "boot-id": f"cat {BOOT_ID}",
    "random": "head -c 64 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'",
    "seed": "sha256sum </var/lib/systemd/random-seed",
    "journal": "journalctl -q -b -o export -n 1 | grep -a -e ^_BOOT_ID -e ^_MACHINE_ID",
}


@dataclass
class Clones:
    """Two of one saved guest, the second larger, and what was seen of each when it had rested."""

    cloud: GuestCloud
    vms: list[dict[str, Any]]
    seen: list[dict[str, str]]


@pytest.fixture(scope="module")
def clones() -> Iterator[Clones]:
    image = ensure_vendor_image()
    with open_cloud() as cloud:
        cloud.control("template-import", str(image), "--name", "vendor")
        call(cloud, "template_warm", template="vendor", **SHAPE)
        given = {"image": "vendor", "warm": "only", **SHAPE}
        vms = [cloud.create("my_first", **given)]
        vms.append(cloud.create("second", **{**given, "disk_size": LARGER}))
        yield Clones(cloud, vms, [look_at_rest(cloud, vm) for vm in vms])


def look_at_rest(cloud: GuestCloud, vm: dict[str, Any]) -> dict[str, str]:
    cloud.ssh(vm, "while systemctl -q is-active oscloud-agent; do sleep 0.5; done")
    return look(cloud, vm)


def look(cloud: GuestCloud, vm: dict[str, Any]) -> dict[str, str]:
    commands = {**OWN, **SAME, **PASSING}
    script = "; ".join(f"echo =={name}; {command}" for name, command in commands.items())
    parts = (part.partition("\n") for part in cloud.ssh(vm, f"{script}; :").split("==")[1:])
    return {name: value.strip() for name, _, value in parts}


def tell_timings(vm: dict[str, Any]) -> None:
    """Print what each stage took, for docs/measurements.md."""
    print(f"\n{vm['started']}: {sum(vm['timings'].values()):.2f} s", vm["timings"])


def test_each_is_who_it_is_told(clones: Clones) -> None:
    for vm, seen in zip(clones.vms, clones.seen, strict=True):
        # ssh has checked the host key of each connection against vm_info's.
        assert vm["started"] == "warm"
        tell_timings(vm)
        name = vm["name"].replace("_", "-")
        assert seen["hostname"].split() == [name, name]
        assert f"127.0.1.1 {name} {name}" in seen["hosts"]
        assert f"inet {vm['ip']}/16 " in seen["address"]
        assert seen["address"].count("inet") == 1
        assert f"inet6 {vm['ip6']}/64 " in seen["address6"]
        assert seen["mac"] == vm["mac"]
        assert f"default via {vm['gateway']} dev eth0" in seen["route"]
        assert seen["route"].count("default") == seen["route6"].count("default") == 1
        assert seen["resolvers"] == f"nameserver {vm['gateway']}"
        directory = f"/var/lib/cloud/instances/{vm['uuid']}"
        assert seen["instance"].split() == [directory, vm["uuid"], vm["uuid"]]
        assert seen["machine-id"] in seen["bus"]
        assert seen["journals"] == seen["machine-id"]
        boot_id = seen["boot-id"].replace("-", "")
        expected = {f"_BOOT_ID={boot_id}", f"_MACHINE_ID={seen['machine-id']}"}
        assert set(seen["journal"].split()) == expected
        assert "nobody" not in str(seen)
        assert "192.0.2." not in str(seen)


def test_what_cloud_init_does_is_done(clones: Clones) -> None:
    for seen in clones.seen:
        assert seen["status"] == "status: done"
        assert seen["failed"] == ""
        assert seen["keys"].split() == ["test", "test"]
        assert seen["passwords"] == "passwordauthentication yes"
        assert seen["greeting"] == "Powered by OS Cloud"
        assert "configured" in seen["network"]
    sizes = [int(seen["kilobytes"]) / GIB_KILOBYTES for seen in clones.seen]
    assert sizes[0] > 2.7
    assert sizes[1] > 3.6


def test_two_have_nothing_in_common(clones: Clones) -> None:
    one, other = clones.seen
    assert not {name for name in (*OWN, *PASSING) if one[name] == other[name]}


def test_its_owner_may_log_in_by_password(clones: Clones) -> None:
    assert clones.cloud.ssh_by_password(clones.vms[1], "123456", "hostname") == "second"


def test_without_a_password_it_asks_for_none(clones: Clones) -> None:
    given = {"image": "vendor", "warm": "only", "password": "", **SHAPE}
    vm = clones.cloud.create("third", **given)
    shown = clones.cloud.ssh(vm, "sshd -T | grep -i ^passwordauthentication; passwd -S root")
    assert shown.split()[:4] == ["passwordauthentication", "no", "root", "L"]
    clones.cloud.call("vm_delete", vm=vm["id"], force=True)


def test_a_second_boot_changes_nothing(clones: Clones) -> None:
    vm, before = clones.vms[0], clones.seen[0]
    clones.cloud.call("vm_delete", vm=clones.vms[1]["id"], force=True)
    call(clones.cloud, "vm_restart", vm=vm["id"])
    again = call(clones.cloud, "vm_wait", vm=vm["id"], state="ready", timeout=LIMIT_SECONDS)
    assert again["started"] == "cold"
    after = look(clones.cloud, vm)
    changed = {name for name in (*OWN, *SAME) if after[name] != before[name]}
    assert not {name: (before[name], after[name]) for name in changed}
    assert not {name for name in PASSING if after[name] == before[name]}
    log = clones.cloud.ssh(vm, "cat /run/cloud-init/result.json /var/log/cloud-init.log")
    assert '"errors": []' in log
    assert clones.cloud.ssh(vm, "ls /etc/cloud/cloud.cfg.d").count("oscloud") == 0


def test_it_becomes_a_template_whose_vms_are_others(clones: Clones) -> None:
    cloud, vm, before = clones.cloud, clones.vms[0], clones.seen[0]
    cloud.ssh(vm, "echo kept >/root/kept")
    call(cloud, "vm_stop", vm=vm["id"])
    call(cloud, "vm_publish", vm=vm["id"], template="mine")
    public = cloud.key.with_suffix(".pub").read_text().replace(" test", " another's").strip()
    given = {"image": "mine", "ssh_key": [public], "password": "another", **SHAPE}
    copy = call(cloud, "vm_create", name="copy", wait="ready", **given)
    assert copy["started"] == "cold"
    tell_timings(copy)
    seen = look(cloud, copy)
    assert cloud.ssh(copy, "cat /root/kept") == "kept"
    assert seen["hostname"].split() == ["copy", "copy"]
    assert seen["status"] == "status: done"
    assert seen["keys"].split() == ["another's", "another's"]
    own = set(OWN) - {"kilobytes", "bus", "journals"}  # systemd reads its machine-id at next boot
    assert not {name for name in own if seen[name] == before[name]}
