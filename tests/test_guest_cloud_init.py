"""Guests with cloud-init, as vendors have them: imported, booted by their own loader, logged into.

A boot takes an emulated guest a minute, so there are few, side by side where that goes.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from guest_cloud import GuestCloud, open_cloud
from vendor_image import ensure_vendor_image

from oscloudctl.client import Client
from oscloudd.errors import HostError

pytestmark = pytest.mark.guest

LIMIT_SECONDS = 1200.0
SHAPE = {"mem_size": "512M", "disk_size": "3G", "wait": "ready"}

# One with hooks, of which the last fails. What its commands say is on the console.
DECLARATION = """\
description = "A vendor's, and what is done to it"
os = "Debian 12"
[source]
kind = "build"
[guest]
identity = "cloud-init"
commands = ["cat /etc/hooked", "stat -c 'is of %U, %a' /srv/hooked", "exit 3"]
[guest.files."/srv/hooked"]
owner = "debian"
mode = "0600"
"""
BUILD = """\
#!/bin/sh
cp {image} "$1/disk.qcow2"
"""

# A list of each kind that ours might have had, and a password that is for the image's own user.
CONFIG = """\
#cloud-config
password: theirs
chpasswd: {expire: false}
write_files:
  - {path: /etc/users_file, content: written by the user}
bootcmd: ["echo boot >>/root/boots"]
runcmd: ["echo ran >>/root/ran"]
"""
SCRIPT = "#!/bin/sh\necho what the script says\nexit 3\n"

IDENTITY = """\
hostname; cat /etc/machine-id /etc/hosts /etc/ssh/ssh_host_*; grep root: /etc/shadow
ip -4 -o address; ip route; cat /root/ran /root/.ssh/authorized_keys
"""

# A variable of a namespace of its own; its first four bytes are its attributes.
VARIABLE = "/sys/firmware/efi/efivars/Test-6f7a1c1e-2f3b-4c8e-9d0a-5b6c7d8e9f00"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    image = ensure_vendor_image()
    with open_cloud() as cloud:
        cloud.control("template-import", str(image), "--name", "vendor", "--firmware", "uefi")
        declare_hooked(cloud.root / "declared/hooked", image)
        cloud.build("hooked")
        cloud.call("network_create", name="lab", subnet="10.73.0.0/24")
        yield cloud


def declare_hooked(directory: Path, image: Path) -> None:
    for name in ("etc/hooked", "srv/hooked"):
        path = directory / "files" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"this is {name}\n")
    (directory / "template.toml").write_text(DECLARATION)
    (directory / "build").write_text(BUILD.format(image=image))
    (directory / "build").chmod(0o755)


def call(cloud: GuestCloud, method: str, **params: Any) -> dict[str, Any]:
    """Call a method over a connection of its own, and wait as long as a boot may take."""
    client = Client(cloud.client.socket_path)
    try:
        answer: dict[str, Any] = client.call(method, params, timeout_seconds=LIMIT_SECONDS)
    finally:
        client.close()
    return answer


def create(
    cloud: GuestCloud, name: str, image: str, user_data: str, **params: Any
) -> dict[str, Any]:
    public = cloud.key.with_suffix(".pub").read_text().strip()
    given = {"name": name, "image": image, "ssh_key": [public], "user_data": user_data}
    return call(cloud, "vm_create", **given, **SHAPE, **params)


@pytest.fixture(scope="module")
def making(cloud: GuestCloud) -> Iterator[dict[str, "Future[dict[str, Any]]"]]:
    """Two vms in the making."""
    with ThreadPoolExecutor() as pool:
        yield {
            "my_web": pool.submit(
                create, cloud, "my_web", "vendor", CONFIG, network=["default", "lab"]
            ),
            "broken": pool.submit(create, cloud, "broken", "hooked", SCRIPT),
        }


def test_a_vendors_image_becomes_who_it_is_told(
    cloud: GuestCloud, making: dict[str, "Future[dict[str, Any]]"]
) -> None:
    vm = making["my_web"].result()
    assert vm["ready"]
    assert cloud.ssh(vm, "cloud-init status") == "status: done"
    assert cloud.ssh(vm, "ls -d /sys/firmware/efi") == "/sys/firmware/efi"
    assert cloud.ssh(vm, "hostname") == "my-web"
    assert f"inet {vm['ip']}/16" in cloud.ssh(vm, "ip -4 -o address show eth0")
    assert f"default via {vm['gateway']} " in cloud.ssh(vm, "ip route")
    assert f"inet {vm['nics'][1]['ip']}/24" in cloud.ssh(vm, "ip -4 -o address show eth1")
    assert cloud.ssh({**vm, "ip": vm["nics"][1]["ip"]}, "hostname") == "my-web"
    assert cloud.ssh(vm, "ip route").count("default") == 1
    gateway6 = cloud.call("network_info", network="default")["gateway6"]
    assert f"inet6 {vm['ip6']}/64" in cloud.ssh(vm, "ip -6 -o address show eth0")
    assert f"default via {gateway6} " in cloud.ssh(vm, "ip -6 route")
    resolvers = cloud.ssh(vm, "cat /run/systemd/resolve/resolv.conf")
    assert f"nameserver {vm['gateway']}\n" in resolvers
    assert int(cloud.ssh(vm, "df -k --output=size / | tail -n 1")) > 2.7 * (1 << 20)
    assert "Powered by OS Cloud" in cloud.ssh(vm, "cat /run/motd.dynamic")
    # What the host wants is nobody's to lose who has lists of his own.
    assert cloud.ssh_by_password(vm, "123456", "hostname") == "my-web"
    assert cloud.ssh(vm, "cat /etc/users_file") == "written by the user"
    assert cloud.ssh(vm, "cat /root/ran") == "ran"
    assert cloud.ssh(vm, "passwd -S debian").split()[:2] == ["debian", "P"]
    assert cloud.ssh(vm, "cut -d ' ' -f 3 /home/debian/.ssh/authorized_keys") == "test"


def test_what_went_wrong_is_told_in_cloud_inits_own_words(
    cloud: GuestCloud, making: dict[str, "Future[dict[str, Any]]"]
) -> None:
    wanted = r"cloud-init failed: \('scripts-vendor', .*; \('scripts-user', "
    with pytest.raises(HostError, match=wanted) as caught:
        making["broken"].result()
    console = caught.value.details["console"]
    assert "this is etc/hooked" in console
    assert "is of debian, 600" in console
    assert "what the script says" in console
    assert [vm["name"] for vm in cloud.call("vm_list")] == ["my_web"]


def test_a_second_boot_changes_nothing(
    cloud: GuestCloud, making: dict[str, "Future[dict[str, Any]]"]
) -> None:
    vm = making["my_web"].result()
    before = cloud.ssh(vm, IDENTITY)
    call(cloud, "vm_restart", vm=vm["id"])
    again = call(cloud, "vm_wait", vm=vm["id"], state="ready", timeout=LIMIT_SECONDS)
    assert again["pid"] != vm["pid"]
    assert cloud.ssh(again, IDENTITY) == before
    assert cloud.ssh(again, "cat /root/boots") == "boot\nboot"


def test_one_that_boots_by_uefi_moves_with_what_its_firmware_remembers(
    cloud: GuestCloud, making: dict[str, "Future[dict[str, Any]]"], tmp_path: Path
) -> None:
    vm = making["my_web"].result()
    before = cloud.ssh(vm, IDENTITY)
    cloud.ssh(vm, f"printf '\\007\\000\\000\\000remembered' >{VARIABLE}")
    call(cloud, "vm_stop", vm="my_web")
    cloud.control("vm-export", "my_web", str(tmp_path / "web"))
    call(cloud, "vm_delete", vm="my_web")
    assert "STOPPED" in cloud.control("vm-import", str(tmp_path / "web"))
    call(cloud, "vm_start", vm="my_web")
    moved = call(cloud, "vm_wait", vm="my_web", state="ready", timeout=LIMIT_SECONDS)
    assert cloud.ssh(moved, IDENTITY) == before
    assert "remembered" in cloud.ssh(moved, f"cat {VARIABLE}")
