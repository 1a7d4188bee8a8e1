"""Real guests and a daemon that is killed; consoles; ssh by the command line; a subnet in use."""

import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from guest_cloud import LIMIT_SECONDS, GuestCloud, closing, is_alive, open_cloud

from oscloudctl.client import Client, RawConnection

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def web(cloud: GuestCloud) -> dict[str, Any]:
    return cloud.create("web")


def read_until(line: RawConnection, wanted: bytes) -> bytes:
    seen = line.unread
    line.stream.settimeout(LIMIT_SECONDS)
    while wanted not in seen:
        received = line.stream.recv(4096)
        assert received, f"hung up after {seen!r}"
        seen += received
    return seen


def open_console(cloud: GuestCloud, vm: dict[str, Any]) -> RawConnection:
    with Client(cloud.client.socket_path) as client:
        return client.upgrade("vm_console", {"vm": vm["id"]})


def test_a_killed_daemon_finds_its_vm_again(cloud: GuestCloud, web: dict[str, Any]) -> None:
    argv = cloud.ssh_command(web, "-i", str(cloud.key), "-tt")
    with closing(cloud.terminal(*argv)) as session:
        session.expect("# ")
        cloud.end(signal.SIGKILL)
        assert is_alive(web["pid"])
        session.sendline("echo still $((40 + 2))")
        session.expect("still 42")
        cloud.start()
        found = cloud.info(web)
        assert (found["state"], found["pid"], found["ready"]) == ("RUNNING", web["pid"], True)
        session.sendline("echo again $((40 + 2))")
        session.expect("again 42")
    assert cloud.ssh(web, "hostname") == "web"
    with open_console(cloud, web).stream as stream:
        stream.sendall(b"\r")
        read_until(RawConnection(None, b"", stream), b"login:")


def test_two_consoles_see_the_same(cloud: GuestCloud, web: dict[str, Any]) -> None:
    one, other = open_console(cloud, web), open_console(cloud, web)
    with one.stream, other.stream:
        cloud.ssh(web, "echo both-see-$((40 + 2)) >/dev/ttyS0")
        read_until(one, b"both-see-42")
        read_until(other, b"both-see-42")


def test_vm_console_on_a_terminal(cloud: GuestCloud, web: dict[str, Any]) -> None:
    argv = (sys.executable, "-m", "oscloudctl", "vm-console", "web")
    with closing(cloud.terminal(*argv)) as console:
        console.expect("Ctrl-] leaves")
        console.send("\r")
        console.expect("web login: ")
        console.send("\x1d")
        console.expect("Left the console.")
    assert is_alive(web["pid"])


def test_vm_ssh_needs_no_question_answered(cloud: GuestCloud, web: dict[str, Any]) -> None:
    assert cloud.control("vm-ssh", "-i", str(cloud.key), "web", "hostname") == "web\n"
    assert cloud.control("vm-ssh", "-i", str(cloud.key), "web", "echo", "a  b") == "a  b\n"
    assert web["name"] in cloud.control("vm-list")


def test_a_subnet_in_use_is_left_to_its_user() -> None:
    with open_cloud(routes=("192.168.0.0/16 dev lo",)) as cloud:
        [network] = cloud.call("network_list")
        assert network["subnet"] != "192.168.0.0/16"
        assert network["mask"] == 16
        [check] = [
            check for check in cloud.call("daemon_doctor")["checks"] if check["check"] == "network"
        ]
        assert check["verdict"] == "warning"
        assert network["subnet"] in check["message"]
        assert "192.168.0.0/16 overlaps" in check["message"]
