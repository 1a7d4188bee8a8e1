"""Who a real guest is: what it was told at its first boot, and that it stays so."""

import sys
from collections.abc import Iterator
from typing import Any

import pexpect
import pytest
from guest_cloud import BOOT_ID, GuestCloud, closing, open_cloud

pytestmark = pytest.mark.guest

PORT = 7777

# Runs on the host, in the namespace; says when it can be connected to.
LISTENER = f"""
import socket
with socket.create_server(("0.0.0.0", {PORT})) as server:
    print("listens", flush=True)
    while True:
        server.accept()[0].close()
"""

CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
"""

IDENTITY = "hostname; cat /etc/machine-id; ip -4 -o address show eth0; ip route; cat /etc/shadow"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def web(cloud: GuestCloud) -> dict[str, Any]:
    return cloud.create("my_web", disk_size="3G")


@pytest.fixture(scope="module")
def mail(cloud: GuestCloud) -> dict[str, Any]:
    return cloud.create("mail")


def boot_id(cloud: GuestCloud, vm: dict[str, Any]) -> str:
    return cloud.ssh(vm, f"cat {BOOT_ID}")


def type_until(console: "pexpect.spawn[str]", line: str, wanted: str) -> None:
    """Type a line until the answer comes: login(1) throws away what comes too early."""
    for _ in range(5):
        console.send(f"{line}\r")
        if console.expect([wanted, pexpect.TIMEOUT], timeout=10) == 0:
            return
    pytest.fail(f"{wanted!r} did not come: {console.before!r}")


def test_it_is_who_vm_info_says(cloud: GuestCloud, web: dict[str, Any]) -> None:
    # ssh has checked the host's key against vm_info's on the way.
    assert cloud.ssh(web, "hostname") == "my-web"
    assert f"inet {web['ip']}/16" in cloud.ssh(web, "ip -4 -o address show eth0")
    assert f"default via {web['gateway']} " in cloud.ssh(web, "ip route")
    assert cloud.ssh(web, "cat /sys/class/net/eth0/address") == web["mac"]
    assert "Powered by OS Cloud" in cloud.ssh(web, "cat /etc/motd")
    kilobytes = int(cloud.ssh(web, "df -k / | tail -n 1").split()[1])
    assert kilobytes > 2.7 * (1 << 20)


def test_it_lets_its_owner_in_by_password(cloud: GuestCloud, web: dict[str, Any]) -> None:
    assert cloud.ssh_by_password(web, "123456", "hostname") == "my-web"


def test_it_greets_on_the_console(cloud: GuestCloud, web: dict[str, Any]) -> None:
    argv = (sys.executable, "-m", "oscloudctl", "vm-console", web["name"])
    with closing(cloud.terminal(*argv)) as console:
        type_until(console, "", "login: ")
        type_until(console, "root", "assword: ")
        type_until(console, "123456", "Powered by OS Cloud")
        type_until(console, "exit", "login: ")
        console.send("\x1d")
        console.expect("Left the console.")


def test_two_guests_have_nothing_in_common(
    cloud: GuestCloud, web: dict[str, Any], mail: dict[str, Any]
) -> None:
    ids = {cloud.ssh(vm, "cat /etc/machine-id") for vm in (web, mail)}
    assert len(ids) == 2
    assert all(len(each) == 32 for each in ids)
    assert not set(web["ssh_host_keys"]) & set(mail["ssh_host_keys"])
    assert web["mac"] != mail["mac"]


def test_guests_reach_each_other_and_the_world_but_not_the_host(
    cloud: GuestCloud, web: dict[str, Any], mail: dict[str, Any]
) -> None:
    assert "SSH-2.0" in cloud.ssh(web, f"nc -w 5 {mail['ip']} 22 </dev/null | head -c 7")
    [uplink] = [line for line in cloud.run("ip", "route").splitlines() if "default" in line]
    cloud.ssh(web, f"ping -c 1 -W 5 {uplink.split()[2]}")
    listener = cloud.spawn(sys.executable, "-c", LISTENER)
    try:
        while not cloud.run("ss", "-Htln", f"sport = :{PORT}"):
            assert listener.poll() is None, cloud.log()
        cloud.run(sys.executable, "-c", CONNECT, web["gateway"], str(PORT))
        attempt = f"nc -w 3 {web['gateway']} {PORT} </dev/null && echo connected || echo refused"
        assert cloud.ssh(web, attempt) == "refused"
    finally:
        listener.kill()
        listener.wait()


def test_a_restart_changes_nothing(cloud: GuestCloud, web: dict[str, Any]) -> None:
    before, booted = cloud.ssh(web, IDENTITY), boot_id(cloud, web)
    cloud.call("vm_restart", vm=web["id"])
    again = cloud.wait(web)
    assert again["ssh_host_keys"] == web["ssh_host_keys"]
    assert cloud.ssh(again, IDENTITY) == before
    assert boot_id(cloud, again) != booted


def test_a_reboot_keeps_identity_and_process(cloud: GuestCloud, mail: dict[str, Any]) -> None:
    before, booted = cloud.ssh(mail, IDENTITY), boot_id(cloud, mail)
    cloud.ssh(mail, "reboot", check=False)
    cloud.wait_for_boot(mail, booted)
    assert cloud.ssh(mail, IDENTITY) == before
    assert cloud.info(mail)["pid"] == mail["pid"]
    assert cloud.info(mail)["state"] == "RUNNING"


def test_a_guest_can_power_itself_off(cloud: GuestCloud, mail: dict[str, Any]) -> None:
    cloud.ssh(mail, "poweroff", check=False)
    stopped = cloud.wait(mail, "STOPPED")
    assert stopped["pid"] is None
    assert stopped["reason"] == "the guest powered itself off"
