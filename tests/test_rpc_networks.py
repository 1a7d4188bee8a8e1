"""Networks that people make: over the socket, with their bridges and rules on the host."""

import json
import shutil
import signal
import subprocess
from typing import Any

import pytest
from daemon_process import Box, RpcError
from test_rpc_firewall import ruleset


def bridges(box: Box) -> dict[str, str]:
    """Give the bridges with the first address of each."""
    shown = subprocess.run(
        ["ip", "-n", box.namespace, "-json", "-details", "address"], check=True, capture_output=True
    ).stdout
    return {
        link["ifname"]: link["addr_info"][0]["local"]
        for link in json.loads(shown)
        # One that is being removed has lost them already.
        if link.get("linkinfo", {}).get("info_kind") == "bridge" and link["addr_info"]
    }


def refusal(box: Box, method: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as refused:
        box.call(method, **params)
    return refused.value


def names(box: Box) -> list[str]:
    return [network["name"] for network in box.call("network_list")]


def close_to_empty(box: Box) -> None:
    for vm in box.call("vm_list"):
        box.call("vm_delete", vm=vm["id"], force=True)


def test_a_network_is_made_used_and_deleted(box: Box) -> None:
    lab = box.call("network_create", name="lab", subnet="10.20.0.0/24", dns=["9.9.9.9"])
    wanted = {
        "name": "lab", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1", "mask": 24,
        "bridge": "oscbr1", "isolated": False, "nat": True, "upstream": ["9.9.9.9"],
        "addresses_used": 0, "addresses_free": 253, "vms": [], "addresses": [],
    }  # fmt: skip
    assert {key: lab[key] for key in wanted} == wanted
    assert bridges(box) == {}  # the first vm brings it up
    web = box.create("web", network="lab")
    assert (web["ip"], web["gateway"], web["network"]) == ("10.20.0.2", "10.20.0.1", "lab")
    assert bridges(box) == {"oscbr1": "10.20.0.1"}
    assert '"oscbr1" . 10.20.0.0/24' in ruleset(box)
    chosen = box.create("chosen", network=lab["id"], ip="10.20.0.77")
    assert chosen["ip"] == "10.20.0.77"
    info = box.call("network_info", network="lab")
    assert info["vms"] == ["web", "chosen"]
    assert info["addresses"] == ["10.20.0.2", "10.20.0.77"]
    assert (info["addresses_used"], info["addresses_free"]) == (2, 251)
    error = refusal(box, "network_delete", network="lab")
    assert (error.kind, error.data["vms"]) == ("in_use", ["web", "chosen"])
    assert "web, chosen" in error.message
    close_to_empty(box)
    assert box.call("network_delete", network="lab") == {"id": lab["id"], "name": "lab"}
    assert names(box) == ["default"]
    assert bridges(box) == {}
    assert "oscbr1" not in ruleset(box)
    told = [event[0] for event in box.rows("SELECT data FROM event WHERE kind = 'network'")]
    assert [json.loads(data)["message"] for data in told] == [
        "made: 10.20.0.0/24",
        "deleted: 10.20.0.0/24",
    ]
    again = box.call("network_create", name="lab")
    assert (again["subnet"], again["bridge"]) == ("10.20.0.0/24", "oscbr1")
    assert again["id"] != lab["id"]


def test_the_next_free_subnet_is_given(box: Box) -> None:
    box.call("network_create", name="taken", subnet="10.20.1.0/24")
    given = [box.call("network_create", name=name)["subnet"] for name in ("a", "b")]
    assert given == ["10.20.0.0/24", "10.20.2.0/24"]


def test_networks_isolated_and_without_nat(box: Box) -> None:
    inner = box.call("network_create", name="inner", isolated=True)
    routed = box.call("network_create", name="routed", nat=False)
    asked = [inner["gateway"]] if shutil.which("dnsmasq") else []  # its own name server
    assert (inner["isolated"], inner["dns"], routed["nat"]) == (True, asked, False)
    assert any("nothing outside" in rule for rule in inner["rules"])
    assert any("own addresses, and are reached" in rule for rule in routed["rules"])
    box.create("one", network="inner")
    for words in (f'"{inner["bridge"]}"', f'"{routed["bridge"]}"'):
        assert f"elements = {{ {words} }}" in ruleset(box)
    assert f"elements = {{ {box.call('network_info', network='default')['subnet']} }}" in ruleset(
        box
    )


def test_a_small_network_is_exhausted_and_what_is_deleted_is_given_again(box: Box) -> None:
    box.call("network_create", name="small", subnet="10.30.0.0/29")
    vms = [box.create(f"vm{number}", network="small") for number in range(5)]
    assert [vm["ip"] for vm in vms] == [f"10.30.0.{number}" for number in range(2, 7)]
    error = refusal(box, "vm_create", name="one-more", network="small", mem_size="64M")
    assert (error.kind, error.data["resource"]) == ("exhausted", "address")
    assert "10.30.0.0/29 has 5 for vms" in error.message
    box.call("vm_stop", vm="vm3", force=True)
    assert box.call("vm_start", vm="vm3")["ip"] == "10.30.0.5"
    box.call("vm_delete", vm="vm1", force=True)
    assert box.create("next", network="small")["ip"] == "10.30.0.3"
    other = box.create("elsewhere", network="default")
    assert other["ip"].startswith("192.168.")


BAD = [
    ({"subnet": "10.20.0.0/7"}, "invalid_argument", "not an IPv4 network"),
    ({"subnet": "10.0.0.0/7"}, "invalid_argument", "prefix of /7"),
    ({"subnet": "8.0.0.0/7"}, "invalid_argument", "prefix of /7"),
    ({"subnet": "10.20.0.0/31"}, "invalid_argument", "prefix of /31"),
    ({"subnet": "10.20.0.1/24"}, "invalid_argument", "has host bits set"),
    ({"subnet": "10.20.0.0"}, "invalid_argument", "no prefix length"),
    ({"subnet": "fd00::/64"}, "invalid_argument", "not an IPv4 network"),
    ({"subnet": "nonsense/24"}, "invalid_argument", "not an IPv4 network"),
    ({"subnet": "8.8.8.0/24"}, "invalid_argument", "not private"),
    ({"subnet": "169.254.0.0/16"}, "invalid_argument", "not private"),
    ({"subnet": "127.0.0.0/24"}, "invalid_argument", "not private"),
    ({"subnet": "192.168.0.0/24"}, "in_use", "overlaps network 'default'"),
    ({"subnet": "192.168.7.0/24"}, "in_use", "overlaps network 'default'"),
    ({"subnet": "10.99.0.0/16"}, "in_use", "overlaps a route of this host, 10.99.7.0/24 to lo"),
    ({"subnet6": "10.20.0.0/24"}, "invalid_argument", "subnet6 '10.20.0.0/24' is not an IPv6"),
    ({"subnet6": "fd00::1/64"}, "invalid_argument", "has host bits set"),
    ({"subnet6": "fd00::/48"}, "invalid_argument", "not a /64 within fc00::/7"),
    ({"subnet6": "2001:db8::/64"}, "invalid_argument", "not a /64 within fc00::/7"),
    ({"subnet6": ""}, "invalid_argument", "subnet6 '' is not an IPv6 network"),
    ({"subnet6": "fd00:99::/64"}, "in_use", "overlaps a route of this host, fd00:99::/56 to lo"),
    ({"name": "default"}, "already_exists", "network 'default' already exists"),
    ({"name": "7"}, "invalid_argument", "name '7'"),
    ({"name": "a b"}, "invalid_argument", "name 'a b'"),
    ({"isolated": True, "nat": False}, "invalid_argument", "no way out"),
    ({"dns": ["localhost"]}, "invalid_argument", "not an IPv4 address"),
    ({"dns": ["127.0.0.53"]}, "invalid_argument", "out of a guest's reach"),
    ({"dns": ["9.9.9.9"] * 9}, "invalid_argument", "more than 8"),
    ({"dns": ["9.9.9.9", "192.168.0.1"]}, "invalid_argument", "dns 192.168.0.1 is the gateway"),
    (
        {"dns": ["10.20.9.1"], "subnet": "10.20.9.0/24"},
        "invalid_argument",
        "dns 10.20.9.1 is the gateway",
    ),
    ({"subnet": 7}, "invalid_argument", "subnet"),
    ({"bridge": "br0"}, "invalid_argument", "bridge"),
]


def test_what_can_not_be_is_refused_and_leaves_nothing(box: Box) -> None:
    subprocess.run(
        ["ip", "-n", box.namespace, "route", "add", "10.99.7.0/24", "dev", "lo"], check=True
    )
    subprocess.run(
        ["ip", "-n", box.namespace, "route", "add", "fd00:99::/56", "dev", "lo"], check=True
    )
    drawn = box.call("network_info", network="default")["subnet6"]
    error = refusal(box, "network_create", name="lab", subnet6=drawn)
    assert (error.kind, "overlaps network 'default'" in error.message) == ("in_use", True)
    for params, kind, words in BAD:
        error = refusal(box, "network_create", **{"name": "lab", **params})
        assert (error.kind, words in error.message) == (kind, True), (params, error.message)
        assert names(box) == ["default"]
    error = refusal(box, "network_delete", network="default")
    assert error.kind == "invalid_argument"
    assert names(box) == ["default"]


def test_a_bridge_that_a_dead_daemon_did_not_remove_is_swept_out(box: Box) -> None:
    box.call("network_create", name="lab")
    box.create("web", network="lab")
    box.call("vm_delete", vm="web", force=True)
    box.end(signal.SIGKILL)
    box.rows("DELETE FROM network WHERE name = 'lab'")
    ip = ["ip", "-n", box.namespace]
    subprocess.run([*ip, "link", "add", "oscbr7", "type", "bridge"], check=True)
    subprocess.run([*ip, "address", "add", "10.77.0.1/24", "dev", "oscbr7"], check=True)
    box.start()
    # The other has no alias of ours.
    box.until(lambda: bridges(box) == {"oscbr7": "10.77.0.1"}, "the sweep")
    box.until(lambda: "oscbr1" not in ruleset(box), "the end of its rules")
    assert box.call("network_create", name="lab")["bridge"] == "oscbr1"
    subprocess.run([*ip, "link", "delete", "oscbr7"], check=True)
