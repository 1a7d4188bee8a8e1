"""Names of guests: asked for at the gateway as a guest does, through everything that may happen."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_process import Box
from guest_cloud import wait_for_end
from name_stand_in import answering

pytestmark = pytest.mark.skipif(shutil.which("dnsmasq") is None, reason="dnsmasq is not installed")

GATEWAY = "192.168.0.1"
# Prints the address behind a name, or the number of the error (RFC 1035 section 4.1.1).
ASK = """
import socket, struct, sys
family = socket.AF_INET6 if sys.argv[3] == "28" else socket.AF_INET
labels = b"".join(bytes([len(each)]) + each.encode() for each in sys.argv[2].split("."))
question = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + labels
question += struct.pack("!BHH", 0, int(sys.argv[3]), 1)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(20)
    client.connect((sys.argv[1], 53))
    client.send(question)
    answer = client.recv(512)
count = struct.unpack_from("!H", answer, 6)[0]
size = 16 if family == socket.AF_INET6 else 4
print(socket.inet_ntop(family, answer[-size:]) if count else answer[3] & 15)
"""
NOT_FOUND, NOTHING, NOBODY = "3", "0", ""
A, AAAA = "1", "28"
UPSTREAM, OUTSIDE = "198.51.100.53", "198.51.100.7"


def ask(box: Box, name: str, gateway: str = GATEWAY, kind: str = A) -> str:
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-I", "-c", ASK]
    done = subprocess.run(
        [*command, gateway, name, kind], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def server(box: Box) -> int:
    return int((box.root / "run/names/oscbr0/pid").read_text())


def until_answer(box: Box, name: str, answer: str) -> None:
    box.until(lambda: ask(box, name) == answer, f"{name} being {answer or 'nobody'}")


def test_names_come_change_and_go_with_vms(box: Box) -> None:
    web = box.create("My_Web")
    assert box.call("network_info", network="default")["dns"] == [GATEWAY]
    for name in ("my-web.oscloud", "my-web", "MY-WEB.oscloud"):
        until_answer(box, name, web["ip"])
        assert ask(box, name, kind=AAAA) == web["ip6"]
    assert ask(box, "other.oscloud") == NOT_FOUND
    other = box.create("other")
    until_answer(box, "other.oscloud", other["ip"])
    box.call("vm_rename", vm="My_Web", name="shop")
    until_answer(box, "shop.oscloud", web["ip"])
    assert ask(box, "shop.oscloud", kind=AAAA) == web["ip6"]
    assert ask(box, "my-web.oscloud") == NOT_FOUND
    box.call("network_create", name="lab", subnet6="none")
    single = box.create("single", network="lab")
    box.until(lambda: ask(box, "single.oscloud", single["gateway"]) == single["ip"], "its name")
    assert ask(box, "single.oscloud", single["gateway"], AAAA) == NOTHING
    box.call("vm_stop", vm="shop", force=True)
    assert ask(box, "shop.oscloud") == web["ip"]
    box.call("vm_delete", vm="shop")
    until_answer(box, "shop.oscloud", NOT_FOUND)
    assert ask(box, "other.oscloud") == other["ip"]


def test_the_name_server_outlives_the_daemon_and_is_started_again(box: Box) -> None:
    vm = box.create("web")
    until_answer(box, "web.oscloud", vm["ip"])
    first = server(box)
    for number in (signal.SIGKILL, signal.SIGTERM):
        box.end(number)
        assert ask(box, "web.oscloud") == vm["ip"]
        box.start()
        box.create(f"other-{number}")
        assert server(box) == first
    pidfd = os.pidfd_open(first)
    os.kill(first, signal.SIGKILL)
    wait_for_end(pidfd)
    os.close(pidfd)
    until_answer(box, "web.oscloud", vm["ip"])
    assert server(box) != first
    # While nobody looked, it has ended, and a vm has another name.
    box.end(signal.SIGKILL)
    os.kill(server(box), signal.SIGKILL)
    box.rows("UPDATE vm SET name = 'shop' WHERE name = 'web'")
    box.start()
    until_answer(box, "shop.oscloud", vm["ip"])
    assert ask(box, "web.oscloud") == NOT_FOUND


def test_it_ends_with_the_last_daemon_of_a_network_without_guests(box: Box) -> None:
    box.create("web")
    pidfd = os.pidfd_open(server(box))
    box.call("vm_stop", vm="web", force=True)
    assert box.end() == 0
    wait_for_end(pidfd)
    os.close(pidfd)
    assert ask(box, "web.oscloud") == NOBODY
    box.start()
    box.call("vm_start", vm="web")
    until_answer(box, "web.oscloud", box.call("vm_info", vm="web")["ip"])


def test_a_port_that_is_taken_does_not_keep_a_vm_from_starting(box: Box) -> None:
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.bind(('0.0.0.0', 53)); print('ready', flush=True); input()"
    )
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taker:
        assert taker.stdout is not None
        assert taker.stdout.readline() == b"ready\n"
        vm = box.create("web")
        assert vm["state"] == "RUNNING"
        found = {check["check"]: check for check in box.call("daemon_doctor")["checks"]}["names"]
        assert found["verdict"] == "warning"
        assert "oscbr0" in found["message"]
        told = box.rows("SELECT data FROM event WHERE kind = 'warning'")
        assert any("name server of oscbr0" in data for (data,) in told)
        taker.kill()
    until_answer(box, "web.oscloud", vm["ip"])


def test_each_network_has_its_own_until_it_is_deleted(box: Box) -> None:
    box.create("web")
    lab = box.call("network_create", name="lab", subnet="10.20.0.0/24", isolated=True)
    assert lab["dns"] == [lab["gateway"]] == ["10.20.0.1"]
    vm = box.create("inside", network="lab")
    box.until(lambda: ask(box, "inside", "10.20.0.1") == vm["ip"], "inside being known")
    assert ask(box, "inside") == ask(box, "web", "10.20.0.1") == NOT_FOUND
    directory = box.root / "run/names" / lab["bridge"]
    pid = int((directory / "pid").read_text())
    assert b"--no-resolv" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"--no-resolv" not in Path(f"/proc/{server(box)}/cmdline").read_bytes()
    box.call("vm_delete", vm="inside", force=True)
    with ended(pid):
        box.call("network_delete", network="lab")
    assert not directory.exists()


@pytest.mark.parametrize("isolated", [False, True])
def test_a_network_that_names_a_server_asks_that_one(box: Box, *, isolated: bool) -> None:
    lab = box.call(
        "network_create", name="lab", subnet="10.20.0.0/24", isolated=isolated, dns=[UPSTREAM]
    )
    gateway = lab["gateway"]
    assert (lab["dns"], lab["upstream"]) == ([gateway], [UPSTREAM])
    vm = box.create("inside", network="lab")

    def is_served() -> bool:
        return ask(box, "inside.oscloud", gateway) == vm["ip"]

    with answering(box.namespace, UPSTREAM, OUTSIDE):
        box.until(is_served, "inside being known")
        assert ask(box, "www.example.com", gateway) == OUTSIDE
        assert ask(box, "other.oscloud", gateway) == ask(box, "other", gateway) == NOT_FOUND
        # A daemon that starts finds the network in the database only.
        box.end(signal.SIGKILL)
        pid = int((box.root / "run/names/oscbr1/pid").read_text())
        with ended(pid):
            os.kill(pid, signal.SIGKILL)
        box.start()
        box.until(is_served, "inside being known again")
        assert ask(box, "again.example.com", gateway) == OUTSIDE


def test_one_whose_network_a_dead_daemon_was_deleting_is_ended(box: Box) -> None:
    lab = box.call("network_create", name="lab", subnet="10.20.0.0/24")
    box.create("inside", network="lab")
    box.call("vm_delete", vm="inside", force=True)
    directory = box.root / "run/names" / lab["bridge"]
    box.end(signal.SIGKILL)
    box.rows("DELETE FROM network WHERE name = 'lab'")
    with ended(int((directory / "pid").read_text())):
        box.start()
    assert not directory.exists()


def test_one_started_with_other_options_is_replaced(box: Box) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    first = server(box)
    command = Path(f"/proc/{first}/cmdline").read_text().split("\0")[:-1]
    with ended(first):
        os.kill(first, signal.SIGTERM)
    # As the version before this one started it.
    older = [option for option in command if "dhcp" not in option]
    subprocess.run(["ip", "netns", "exec", box.namespace, *older], check=True)
    with ended(server(box)):
        box.start()
    until_answer(box, "web.oscloud", vm["ip"])
    assert Path(f"/proc/{server(box)}/cmdline").read_text().split("\0")[:-1] == command


@contextmanager
def ended(pid: int) -> Iterator[None]:
    """See that a process ends by what is done inside."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)
