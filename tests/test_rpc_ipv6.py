"""IPv6 of networks and vms: derived from the other address, told, known on the host, and gone."""

import base64
import json
import subprocess
from ipaddress import IPv6Network

from daemon_process import IMAGE, Box
from test_rpc_firewall import doctor, ruleset

DRAWN = IPv6Network("fd00::/8")


def ip(box: Box, *words: str) -> str:
    command = ["ip", "-n", box.namespace, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sysctl(box: Box, setting: str) -> None:
    command = ["ip", "netns", "exec", box.namespace, "sysctl", "-qw", setting]
    subprocess.run(command, check=True)


def told(box: Box, vm: str) -> dict[str, str]:
    """Give what the document of a vm says."""
    [(document,)] = box.rows("SELECT seed_document FROM vm WHERE name = ?", vm)
    pairs = (line.split("=", 1) for line in str(document).splitlines())
    return {name: base64.b64decode(value).decode() for name, value in pairs}


def test_a_network_has_a_prefix_of_its_own_and_its_vms_addresses_follow(box: Box) -> None:
    lab = box.call("network_create", name="lab", subnet="10.20.0.0/16")
    networks = [lab, box.call("network_info", network="default")]
    prefixes = [IPv6Network(network["subnet6"]) for network in networks]
    assert len(set(prefixes)) == 2
    for network, prefix in zip(networks, prefixes, strict=True):
        assert (prefix.prefixlen, prefix.subnet_of(DRAWN)) == (64, True)
        assert network["gateway6"] == str(prefix[1])
        assert any(network["gateway6"] in rule for rule in network["rules"])
    vm = box.create("web", network="lab", ip="10.20.1.5")
    assert vm["ip6"] == str(prefixes[0][0x105])
    document = told(box, "web")
    assert (document["address6"], document["gateway6"]) == (f"{vm['ip6']}/64", lab["gateway6"])
    # On the host.
    assert f"{lab['gateway6']}/64" in ip(box, "-6", "address", "show", "dev", lab["bridge"])
    neighbour = f"{vm['ip6']} lladdr {vm['mac']} PERMANENT"
    assert neighbour in ip(box, "-6", "neighbour", "show", "dev", lab["bridge"])
    rules = ruleset(box)
    assert f'"osctap0" . {vm["mac"]} . {vm["ip6"]}' in rules
    assert f'"{lab["bridge"]}" . {lab["gateway6"]}' in rules
    # All of it stays over a stop, a start and a daemon, and goes with the vm.
    box.call("vm_stop", vm="web", force=True)
    box.end()
    box.start()
    again = box.call("vm_start", vm="web")
    assert (again["ip6"], ruleset(box)) == (vm["ip6"], rules)
    box.call("vm_delete", vm="web", force=True)
    assert vm["ip6"] not in ruleset(box)
    assert vm["ip6"] not in ip(box, "-6", "neighbour", "show", "dev", lab["bridge"])


def test_a_prefix_is_chosen_or_left_out(box: Box) -> None:
    chosen = box.call("network_create", name="chosen", subnet6="fd12:3456:789a:1::/64")
    assert (chosen["subnet6"], chosen["gateway6"]) == (
        "fd12:3456:789a:1::/64",
        "fd12:3456:789a:1::1",
    )
    plain = [box.call("network_create", name=name, subnet6="none") for name in ("plain", "too")]
    assert [(network["subnet6"], network["gateway6"]) for network in plain] == [(None, None)] * 2
    assert box.create("web", network="plain")["ip6"] is None
    assert "address6" not in told(box, "web")
    assert "inet6 fd" not in ip(box, "-6", "address", "show", "dev", plain[0]["bridge"])
    assert box.create("db", network="chosen")["ip6"] == "fd12:3456:789a:1::2"


def test_a_guest_that_does_not_take_one_is_told_none(box: Box) -> None:
    declaration = box.root / "state/templates" / IMAGE / "template.toml"
    declaration.write_text(declaration.read_text().replace("ipv6 = true\n", ""))
    box.end()
    box.start()
    vm = box.create("old")
    assert vm["ip6"] is None
    assert "address6" not in told(box, "old")
    prefix = IPv6Network(box.call("network_info", network="default")["subnet6"])
    assert str(prefix[1]) in ruleset(box)
    assert str(prefix[2]) not in ruleset(box)


def test_a_host_without_ipv6_makes_vms_as_before(box: Box) -> None:
    sysctl(box, "net.ipv6.conf.all.disable_ipv6=1")
    sysctl(box, "net.ipv6.conf.default.disable_ipv6=1")
    assert box.create("web")["ip6"] is None
    assert ip(box, "-6", "address", "show", "dev", "oscbr0") == ""
    # Once it is switched on, the bridge gets its address with the next start, new vms theirs.
    sysctl(box, "net.ipv6.conf.all.disable_ipv6=0")
    sysctl(box, "net.ipv6.conf.default.disable_ipv6=0")
    vm = box.create("db")
    assert vm["ip6"] is not None
    assert "inet6 fd" in ip(box, "-6", "address", "show", "dev", "oscbr0")
    assert box.call("vm_info", vm="web")["ip6"] is None


def test_a_host_that_passes_no_ipv6_on_is_told_of(box: Box) -> None:
    box.create("web")
    sysctl(box, "net.ipv6.conf.all.forwarding=0")
    found = doctor(box)
    assert found["verdict"] == "warning"
    assert "net.ipv6.conf.all.forwarding is 0" in found["message"]


def test_permanent_neighbours_of_vms_are_nobodys_leftovers(box: Box) -> None:
    vm = box.create("web")
    ip(
        box,
        "neighbour",
        "add",
        "fd00::99",
        "lladdr",
        vm["mac"],
        "dev",
        "oscbr0",
        "nud",
        "permanent",
    )
    box.end()
    box.start()
    box.until(
        lambda: "fd00::99" not in ip(box, "-6", "neighbour", "show", "dev", "oscbr0"), "the sweep"
    )
    assert vm["ip6"] in ip(box, "-6", "neighbour", "show", "dev", "oscbr0")
    rows = box.rows("SELECT data FROM event WHERE kind = 'warning'")
    assert any("fd00::99 on oscbr0" in json.loads(data)["message"] for (data,) in rows)
