"""Ports of the host that lead to vms: added, listed, deleted, refused, there after everything."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from daemon_process import Box, RpcError

WEB = "127.0.0.1 . tcp . 8080 : 192.168.0.2 . 80"
LISTEN = "import socket; s = socket.create_server(('0.0.0.0', {})); print('ready', flush=True); "


@contextmanager
def listening(box: Box, port: int) -> Iterator[int]:
    """Have a program of the host listen at a port; gives its pid."""
    code = LISTEN.format(port) + "s.accept()"
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


def can_listen(box: Box, port: int) -> bool:
    code = LISTEN.format(port)
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-I", "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def route_localnet(box: Box) -> str:
    path = "/proc/sys/net/ipv4/conf/oscbr0/route_localnet"
    command = ["ip", "netns", "exec", box.namespace, "cat", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def refusal(box: Box, method: str, **params: Any) -> RpcError:
    before = box.traces()
    with pytest.raises(RpcError) as refused:
        box.call(method, **params)
    assert box.traces() == before
    assert refused.value.data.get("hint"), refused.value
    return refused.value


def events(box: Box) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with box.connect() as line:
        request = {"since": 0, "follow": False, "limit": 1000}
        text = {"jsonrpc": "2.0", "method": "event_watch", "params": request, "id": 7}
        line.send(json.dumps(text).encode() + b"\n")
        while (message := line.receive()).get("method") == "event":
            found.append(message["params"])
    return [event for event in found if event["kind"] == "port"]


def test_a_port_is_added_listed_and_deleted(box: Box) -> None:
    vm = box.create("web")
    assert vm["ports"] == []
    assert box.forwarded_ports() == []
    assert route_localnet(box) == "0"
    added = box.call("port_add", vm="web", port="8080:80")
    assert added == {
        "name": "127.0.0.1:8080/tcp",
        "vm": "web",
        "protocol": "tcp",
        "host_address": "127.0.0.1",
        "host_port": 8080,
        "guest_address": "192.168.0.2",
        "guest_port": 80,
    }
    assert box.forwarded_ports() == [WEB]
    assert route_localnet(box) == "1"
    box.call("port_add", vm=1, port="0.0.0.0:5353:53/UDP")
    assert box.forwarded_ports() == [WEB, "udp . 5353 : 192.168.0.2 . 53"]
    both = ["0.0.0.0:5353:53/udp", "127.0.0.1:8080:80/tcp"]
    assert box.call("vm_info", vm="web")["ports"] == both
    assert [listed["ports"] for listed in box.call("vm_list")] == [both]
    assert [port["name"] for port in box.call("port_list")] == [
        "0.0.0.0:5353/udp", "127.0.0.1:8080/tcp",
    ]  # fmt: skip
    box.create("db")
    assert box.call("port_list", vm="db") == []
    assert len(box.call("port_list", vm="web")) == 2
    box.call("vm_rename", vm="web", name="shop")
    assert box.call("port_delete", port="5353/udp")["vm"] == "shop"
    assert box.call("port_delete", port=8080) == {**added, "vm": "shop"}
    assert box.forwarded_ports() == []
    assert route_localnet(box) == "0"
    assert [(event["name"], event["data"]["change"]) for event in events(box)] == [
        ("web", "added"), ("web", "added"), ("shop", "deleted"), ("shop", "deleted"),
    ]  # fmt: skip


def test_a_port_is_reached_at_loopback_whenever_its_bridge_comes_up(box: Box) -> None:
    box.create("web")
    box.call("vm_stop", vm="web", force=True)
    subprocess.run(["ip", "-n", box.namespace, "link", "delete", "oscbr0"], check=True)
    box.call("port_add", vm="web", port="8080:80")
    box.create("db")
    assert route_localnet(box) == "1"


def test_ports_are_there_after_everything_but_the_vms_end(box: Box) -> None:
    vm = box.create("web", publish=["8080:80", "5353:53/udp"])
    assert vm["ports"] == ["127.0.0.1:5353:53/udp", "127.0.0.1:8080:80/tcp"]
    forwarded = box.forwarded_ports()
    assert len(forwarded) == 2
    for way in ("kill", "end", "restart", "stop", "flush", "flush unseen"):
        if way in ("kill", "end", "flush unseen"):
            box.end(signal.SIGTERM if way == "end" else signal.SIGKILL)
        if way.startswith("flush"):
            flush = ["ip", "netns", "exec", box.namespace, "nft", "flush ruleset"]
            subprocess.run(flush, check=True)
        if box.daemon is None:
            box.start()
        if way == "restart":
            box.call("vm_restart", vm="web", force=True)
        if way == "stop":
            box.call("vm_stop", vm="web", force=True)
        box.until(lambda: box.forwarded_ports() == forwarded, f"ports after {way}")
        assert not can_listen(box, 8080), way
        assert box.call("vm_info", vm="web")["ports"] == vm["ports"]
    box.call("vm_delete", vm="web")
    assert box.traces() == {}
    assert can_listen(box, 8080)


def test_a_port_is_refused_that_is_taken(box: Box) -> None:
    box.create("web", publish="8080:80")
    box.create("db")
    for spec in ("8080:80", "0.0.0.0:8080:81"):
        error = refusal(box, "port_add", vm="db", port=spec)
        assert error.kind == "in_use"
        assert "is forwarded to vm 'web' already, as 127.0.0.1:8080/tcp" in error.message
    box.call("port_add", vm="db", port="8080:80/udp")
    box.call("port_add", vm="db", port="127.0.0.2:8080:80")
    error = refusal(box, "port_delete", port=8080)
    assert "at several addresses" in error.message
    assert box.call("port_delete", port="127.0.0.2:8080")["vm"] == "db"
    with listening(box, 8000) as pid:
        error = refusal(box, "port_add", vm="db", port="8000:80")
        assert error.kind == "in_use"
        assert error.message.endswith(f"(process {pid})")
    error = refusal(box, "port_add", vm="db", port="10004:80")
    assert "is the serial port of vm 'db'" in error.message
    # And the other way round.
    box.call("port_add", vm="db", port="10006:80")
    assert box.create("third")["serial_port"] == 10008
    error = refusal(box, "vm_create", name="new", mem_size="64M", disk_size="16M", publish="8080:1")
    assert error.kind == "in_use"
    refusal(box, "vm_create", name="web", mem_size="64M", disk_size="16M", publish="8081:1")
    assert can_listen(box, 8081)


@pytest.mark.parametrize(
    "spec",
    ["", "80", "8080", "8080:", ":80", "8080:80/sctp", "0:80", "8080:0", "65536:80", "8080:80:80",
     "300.1.1.1:8080:80", "192.0.2.7:8080:80", "::1:8080:80", "8080:80\n", "٨:80", "8" * 5000],
)  # fmt: skip
def test_what_is_no_port_is_refused(shared_box: Box, spec: str) -> None:
    if not shared_box.call("vm_list"):
        shared_box.create("web")
    error = refusal(shared_box, "port_add", vm="web", port=spec)
    assert error.kind == "invalid_argument"
    error = refusal(
        shared_box, "vm_create", name="new", mem_size="64M", disk_size="16M", publish=[spec]
    )
    assert error.kind == "invalid_argument"


def test_what_is_not_there_is_not_found(shared_box: Box) -> None:
    if not shared_box.call("vm_list"):
        shared_box.create("web")
    assert refusal(shared_box, "port_add", vm="none", port="8080:80").kind == "not_found"
    assert refusal(shared_box, "port_delete", port="8080").kind == "not_found"
    assert refusal(shared_box, "port_list", vm="none").kind == "not_found"
    error = refusal(
        shared_box, "vm_create", name="new", mem_size="64M", disk_size="16M",
        publish=["8080:80", "0.0.0.0:8080:81"],
    )  # fmt: skip
    assert "given twice" in error.message


# Sends to a port of this host from another one, and prints what the kernel keeps of that.
FLOW = """
import socket, sys
from oscloudd.host.network.connections import list_connections
numbers = list(map(int, sys.argv[1:]))
for own, port in zip(numbers[::2], numbers[1::2]):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", own))
        sender.sendto(b"", ("127.0.0.1", port))
for each in list_connections(4):
    if each.is_redirected:
        print(each.original.target_port, each.reply.source)
"""


def flows(box: Box, *sent: tuple[int, int]) -> set[tuple[int, str]]:
    """Send to ports of this host, each from another one, and give what is open and leads where."""
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-c", FLOW]
    numbers = [str(number) for pair in sent for number in pair]
    shown = subprocess.run([*command, *numbers], capture_output=True, text=True, check=True).stdout
    return {(int(port), guest) for port, guest in map(str.split, shown.splitlines())}


def test_what_is_open_by_a_port_ends_with_it_and_with_its_vm(box: Box) -> None:
    vm = box.create("web", publish=["5353:53/udp", "5354:54/udp"])
    other = box.create("other", publish=["5355:55/udp"])
    opened = {(port, vm["ip"]) for port in (5353, 5354)} | {(5355, other["ip"])}
    assert flows(box, (7001, 5353), (7002, 5354), (7003, 5355)) == opened
    box.call("port_delete", port="5353/udp")
    assert flows(box) == opened - {(5353, vm["ip"])}
    box.call("vm_delete", vm="web", force=True)
    assert flows(box) == {(5355, other["ip"])}
