"""The curl session of the original's documentation, word by word, with a real guest behind it."""

import json
import sys
import time
from collections.abc import Iterator

import pytest
from guest_cloud import LIMIT_SECONDS, GuestCloud, is_alive, open_cloud

pytestmark = pytest.mark.guest

URL = "http://127.0.0.1:5000"

# `telnet 127.0.0.1 10002`, return pressed, up to the prompt.
TELNET = """
import socket, sys
with socket.create_connection(("127.0.0.1", 10002), 30) as line:
    line.settimeout(30)
    seen = b""
    line.sendall(b"\\r\\n")
    while b"login:" not in seen:
        seen += line.recv(4096) or sys.exit("hung up after " + repr(seen))
print("prompt")
"""


@pytest.fixture
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        shim = cloud.spawn(sys.executable, "-m", "oscloudctl.http", "--listen", "127.0.0.1:5000")
        deadline = time.monotonic() + LIMIT_SECONDS
        while "oscloud-http listens on" not in cloud.log():
            assert shim.poll() is None, cloud.log()
            assert time.monotonic() < deadline, cloud.log()
            time.sleep(0.05)
        yield cloud
        shim.terminate()
        shim.wait(LIMIT_SECONDS)


def curl(cloud: GuestCloud, path: str, body: str | None = None) -> str:
    post = ["-X", "POST", "-H", "Content-Type: application/json", "-d", body] if body else []
    return cloud.run("curl", "-sS", *post, f"{URL}{path}")


def test_the_originals_curl_session(cloud: GuestCloud) -> None:
    assert curl(cloud, "/") == "Welcome to OS Cloud!\n"
    assert json.loads(curl(cloud, "/vm_list")) == []
    wanted = '{"name":"my_vm","image":"tiny","network":"default","mem_size":"2G","disk_size":"10G"}'
    assert json.loads(curl(cloud, "/vm_create", wanted)) == {"id": 1, "status": "ok"}
    assert json.loads(curl(cloud, "/vm_list")) == [{"id": 1, "name": "my_vm"}]
    info = {
        "disk_size": 10737418240, "id": 1, "ip": "192.168.0.2", "mem_size": 2147483648,
        "name": "my_vm", "network": "default", "os": "tiny", "state": "RUNNING",
    }  # fmt: skip
    assert json.loads(curl(cloud, "/vm_info", '{"id":1}')) == info
    assert cloud.run(sys.executable, "-c", TELNET) == "prompt\n"
    pid = cloud.call("vm_info", vm=1)["pid"]
    assert is_alive(pid)

    assert json.loads(curl(cloud, "/vm_stop", '{"id":1}')) == {"status": "ok"}
    assert not is_alive(pid)
    assert json.loads(curl(cloud, "/vm_info", '{"id":1}')) == {**info, "state": "STOPPED"}

    assert json.loads(curl(cloud, "/vm_start", '{"id":1}')) == {"status": "ok"}
    assert json.loads(curl(cloud, "/vm_info", '{"id":1}')) == info
    assert cloud.call("vm_info", vm=1)["pid"] != pid
