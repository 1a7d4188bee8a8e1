"""A real server in a real guest, reached by ports of the host and by name, whatever happens."""

import signal
import sys
from collections.abc import Iterator

import pytest
from guest_cloud import GuestCloud, open_cloud

pytestmark = pytest.mark.guest

FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())
"""
SERVE = "mkdir -p /www && hostname >/www/index.html && httpd -h /www"


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny") as cloud:
        yield cloud


def fetch(cloud: GuestCloud, address: str) -> str:
    """Give what the host itself gets at an address."""
    return cloud.run(sys.executable, "-I", "-c", FETCH, f"http://{address}/").strip()


def test_a_server_in_a_guest_is_reached_by_ports_of_the_host(cloud: GuestCloud) -> None:
    web = cloud.create("web", publish=["8080:80", "0.0.0.0:8081:80"])
    cloud.ssh(web, SERVE)
    both = ("127.0.0.1:8080", "127.0.0.1:8081")
    assert [fetch(cloud, address) for address in both] == ["web", "web"]

    other = cloud.create("other")
    seen = cloud.ssh(other, f"wget -qO- http://{other['gateway']}:8081/")
    assert seen == "web"
    for name in ("web.oscloud", "web"):
        assert cloud.ssh(other, f"wget -qO- http://{name}/") == "web"
    cloud.call("vm_rename", vm="other", name="shop")
    assert cloud.ssh(web, "ping -c 1 -W 60 shop.oscloud >/dev/null && echo yes") == "yes"

    before = cloud.info(web)["nic"]
    cloud.ssh(web, "head -c 1000000 /dev/zero")
    after = cloud.info(web)["nic"]
    assert after["tx_bytes"] - before["tx_bytes"] > 1_000_000
    assert after["rx_packets"] > before["rx_packets"] > 0

    # What is at loopback is not there: the firewall drops it without a word.
    assert cloud.ssh(other, f"wget -T 5 -qO- http://{other['gateway']}:8080/ || echo no") == "no"

    cloud.end(signal.SIGKILL)
    assert [fetch(cloud, address) for address in both] == ["web", "web"]
    cloud.start()
    assert [fetch(cloud, address) for address in both] == ["web", "web"]

    cloud.run("nft", "flush", "ruleset")
    cloud.until(lambda: "oscbr0" in cloud.run("nft", "list", "ruleset"), "the rules put back")
    assert [fetch(cloud, address) for address in both] == ["web", "web"]

    cloud.call("vm_restart", vm="web")
    cloud.wait(web)
    cloud.ssh(web, SERVE)
    assert [fetch(cloud, address) for address in both] == ["web", "web"]

    shown = [cloud.call("vm_wait", vm="web", **{"for": sign}) for sign in ("port:80", "ssh")]
    assert [vm["name"] for vm in shown] == ["web", "web"]

    cloud.call("vm_delete", vm="web")
    cloud.call("vm_delete", vm="shop")
    assert "ip oscloud_ports" not in cloud.run("nft", "list", "tables")
