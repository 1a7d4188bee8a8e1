"""Addresses by DHCP: for guests that have theirs already, and for images that know no other way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_cloud import GuestCloud, keep_template, open_cloud

pytestmark = pytest.mark.guest

SHAPE = {"mem_size": "128M", "cpus": 1, "disk_size": "1G"}
DECLARATION = """
description = "tiny's kernel and disk, and an init that asks for its address"
os = "busybox"
[source]
kind = "build"
[boot]
kernel = "vmlinuz"
initrd = "initrd.img"
cmdline = "console=ttyS0 quiet"
[guest]
identity = "dhcp"
"""
# A cpio after another one overrides what is in that.
BUILD = """#!/bin/sh
set -eu
cp {tiny}/vmlinuz {tiny}/disk.qcow2 "$1"
{{ cat {tiny}/initrd.img; cd {files}; find . | cpio --quiet -o -H newc; }} >"$1/initrd.img"
"""
INIT = """#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do $bb insmod "/modules/$module"; done </modules/order
$bb mkdir -p /proc /sbin && $bb mount -t proc proc /proc
$bb udhcpc -i eth0 -f -s /told &
while :; do $bb nc -l -p 80 -e $bb hostname; done
"""
TOLD = """#!/bin/busybox sh
[ "$1" = bound ] || exec /bin/busybox ip link set eth0 up
/bin/busybox ip address add "$ip/$mask" dev eth0
/bin/busybox hostname "$hostname"
"""
READ = (
    "import socket, sys; print(socket.create_connection((sys.argv[1], 80), 60).recv(99).decode())"
)


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    tiny = keep_template("tiny")
    with open_cloud("tiny") as cloud:
        declare_asking(cloud.root / "declared/asking", tiny)
        cloud.build("asking")
        yield cloud


def declare_asking(directory: Path, tiny: Path) -> None:
    files = directory / "initramfs"
    files.mkdir(parents=True)
    programs = {directory / "build": BUILD.format(tiny=tiny, files=files)}
    programs |= {files / "init": INIT, files / "told": TOLD}
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)
    (directory / "template.toml").write_text(DECLARATION)


def ask_dhcp(cloud: GuestCloud, vm: dict[str, Any], card: str = "eth0") -> dict[str, str]:
    """Give what DHCP tells a card of a guest, by the variables of udhcpc's script."""
    script = "printf '#!/bin/sh\\n[ $1 = deconfig ] || env\\n' >/tmp/script; chmod +x /tmp/script"
    shown = cloud.ssh(vm, f"{script}; udhcpc -i {card} -n -q -t 10 -s /tmp/script")
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def test_a_guest_that_asks_is_told_its_own_address(cloud: GuestCloud) -> None:
    cloud.call("network_create", name="green", subnet="10.63.0.0/29", dns=["9.9.9.9"])
    first, second = [cloud.create(name, network="green", **SHAPE) for name in ("first", "second")]
    for vm in (first, second, first):
        told = ask_dhcp(cloud, vm)
        assert told["ip"] == vm["ip"]
        assert told["hostname"] == vm["name"]
        assert (told["mask"], told["domain"]) == ("29", "oscloud")
        assert told["router"] == told["dns"] == told["serverid"] == "10.63.0.1"
    both = cloud.create("both", network=["default", "green"], **SHAPE)
    told = ask_dhcp(cloud, both, "eth1")
    assert told["ip"] == both["nics"][1]["ip"]
    # It takes a change to who is told what, after that, and goes on with the same process.
    servers = list((cloud.root / "run/names").glob("*/pid"))
    before = [path.read_text() for path in servers]
    cloud.call("vm_delete", vm="first", force=True)
    heir = cloud.create("heir", network="green", **SHAPE)
    assert heir["ip"] == first["ip"]
    assert heir["mac"] != first["mac"]
    told = ask_dhcp(cloud, heir)
    assert (told["ip"], told["hostname"]) == (heir["ip"], "heir")
    assert [path.read_text() for path in servers] == before


def test_an_image_without_cloud_init_gets_its_address_by_dhcp(cloud: GuestCloud) -> None:
    vm = cloud.create("asks", image="asking", **SHAPE)
    assert (vm["state"], vm["ready"], vm["ssh_host_keys"]) == ("RUNNING", True, [])

    def name() -> str:
        return cloud.run("python3", "-I", "-c", READ, vm["ip"]).strip()

    assert name() == "asks"
    cloud.call("vm_restart", vm="asks", force=True)
    assert cloud.info(vm)["ip"] == vm["ip"]
    assert name() == "asks"
