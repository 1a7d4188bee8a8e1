"""Several network cards a vm, through the socket of a real daemon whose qemu runs no machine."""

import base64
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import expected_traces, seen_traces
from daemon_process import Box, RpcError
from guest_cloud import wait_for_end
from mariadb_server import MariaDb
from test_rpc_exports import export
from test_rpc_firewall import ruleset
from test_rpc_rates import limits
from test_rpc_vm_copies import take

from oscloudd.machine.arguments import PORTS


@pytest.fixture
def lab(box: Box) -> Box:
    """Give a cloud with two networks more, `lab` and, with room for five guests, `tight`."""
    box.call("network_create", name="lab", subnet="10.20.0.0/24")
    box.call("network_create", name="tight", subnet="10.30.0.0/29")
    return box


def refused(box: Box, kind: str, method: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as error:
        box.call(method, **params)
    assert error.value.kind == kind, error.value
    return error.value


def check_accounted(box: Box) -> None:
    """Assert that all there is belongs to a vm of the list; nobody answers for its guests here."""

    def missing() -> dict[str, Any]:
        seen, expected = seen_traces(box), expected_traces(box)
        seen.pop("unfinished jobs", None)
        names = {name for name in {*seen, *expected} if seen.get(name) != expected.get(name)}
        return {name: (seen.get(name), expected.get(name)) for name in names}

    try:
        box.until(lambda: not missing(), "the account of everything")
    except AssertionError as error:
        raise AssertionError(missing()) from error


def ip(box: Box, *arguments: str) -> str:
    command = ["ip", "-n", box.namespace, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cards(vm: dict[str, Any]) -> list[tuple[int, str, str]]:
    return [(nic["slot"], nic["network"], nic["ip"]) for nic in vm["nics"]]


def plugged(box: Box, vm: str) -> list[str]:
    """Give the cards that qemu itself has in its ports."""
    found = box.call(
        "vm_qemu_command", vm=vm, command="qom-list", arguments={"path": "/machine/peripheral"}
    )
    return sorted(each["name"] for each in found if re.fullmatch(r"nic\d+", each["name"]))


def bridge_of(box: Box, tap: str) -> str:
    """Give the bridge that a tap is a port of, as the host says."""
    shown = ip(box, "-oneline", "link", "show", tap)
    found = re.search(r"master (\S+)", shown)
    return "" if found is None else found[1]


def is_guarded(box: Box, nic: dict[str, Any]) -> bool:
    """Tell whether a card may send with its MAC and its address, and the bridge knows its port."""
    element = f'"{nic["tap"]}" . {nic["mac"]} . {nic["ip"]}'
    known = ip(box, "neighbour", "show", nic["ip"])
    port = subprocess.run(
        ["ip", "netns", "exec", box.namespace, "bridge", "fdb", "show", "dev", nic["tap"]],
        check=False,  # the tap of a card that is gone is gone
        capture_output=True,
        text=True,
    ).stdout
    has_all = element in ruleset(box), nic["mac"] in known, nic["mac"] in port
    assert len({*has_all}) == 1, has_all
    return has_all[0]


def test_a_vm_is_made_with_two_cards_and_keeps_them(lab: Box) -> None:
    vm = lab.create("web", network=["default", "lab,ip=10.20.0.9"], ip="192.168.7.7")
    assert cards(vm) == [(0, "default", "192.168.7.7"), (1, "lab", "10.20.0.9")]
    assert (vm["ip"], vm["network"], vm["started"]) == ("192.168.7.7", "default", "cold")
    first, other = vm["nics"]
    assert (vm["mac"], len({first["mac"], other["mac"]})) == (first["mac"], 2)
    assert plugged(lab, "web") == ["nic1"]
    assert [bridge_of(lab, nic["tap"]) for nic in vm["nics"]] == ["oscbr0", "oscbr1"]
    assert all(is_guarded(lab, nic) for nic in vm["nics"])
    info = lab.call("network_info", network="lab")
    assert (info["vms"], info["addresses"], info["addresses_used"]) == (["web"], ["10.20.0.9"], 1)
    seen = lab.call("vm_info", vm="web")
    assert [nic["rx_bytes"] is not None for nic in seen["nics"]] == [True, True]
    assert seen["nic"] == {key: seen["nics"][0][key] for key in seen["nic"]}
    check_accounted(lab)

    for way in ("restart", "stop and start", "suspend and resume"):
        if way == "restart":
            lab.call("vm_restart", vm="web", force=True)
        elif way == "stop and start":
            lab.call("vm_stop", vm="web", force=True)
            assert not any(nic["rx_bytes"] for nic in lab.call("vm_info", vm="web")["nics"])
            lab.call("vm_start", vm="web")
        else:
            lab.rows("UPDATE vm SET identified = 1")
            lab.call("vm_suspend", vm="web")
            refused(lab, "invalid_state", "nic_delete", vm="web", nic="lab")
            refused(lab, "invalid_state", "nic_add", vm="web", network="tight")
            lab.call("vm_resume", vm="web")
        assert cards(lab.call("vm_info", vm="web")) == cards(vm), way
        assert plugged(lab, "web") == ["nic1"], way
        assert all(is_guarded(lab, nic) for nic in vm["nics"]), way
    lab.call("vm_delete", vm="web", force=True)
    assert not is_guarded(lab, other)
    assert lab.traces() == {}


def test_a_card_comes_and_goes(lab: Box) -> None:
    vm = lab.create("web")
    lab.call("disk_create", name="data", size="1M")
    lab.call("disk_attach", vm="web", disk="data")
    added = lab.call("nic_add", vm="web", network="lab", ip="10.20.0.77")
    assert cards(added)[1:] == [(2, "lab", "10.20.0.77")]
    assert plugged(lab, "web") == ["nic2"]
    assert is_guarded(lab, added["nics"][1])
    assert lab.call("disk_detach", vm="web", disk="data")["vm"] is None
    both = lab.call("nic_add", vm="web", network="tight")
    assert cards(both)[1:] == [(1, "tight", "10.30.0.2"), (2, "lab", "10.20.0.77")]
    check_accounted(lab)
    in_use = refused(lab, "in_use", "network_delete", network="lab")
    assert (in_use.data["vms"], "nic-delete" in in_use.data["hint"]) == (["web"], True)

    assert cards(lab.call("nic_delete", vm="web", nic="lab")) == cards(both)[:2]
    assert not is_guarded(lab, added["nics"][1])
    check_accounted(lab)
    lab.call("network_delete", network="lab")
    assert lab.call("nic_delete", vm=vm["id"], nic=1)["nics"] == vm["nics"]
    assert plugged(lab, "web") == []
    check_accounted(lab)


# Sends to an address, or counts the connections that the kernel keeps of that.
SEND = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
socket.socket(family, socket.SOCK_DGRAM).sendto(b"hello", (sys.argv[1], 7000))
"""
COUNT = """
import ipaddress, sys
from oscloudd.host.network.connections import list_connections
address = ipaddress.ip_address(sys.argv[1])
flows = [connection.original for connection in list_connections(address.version)]
print(sum((flow.target, flow.target_port) == (address, 7000) for flow in flows))
"""


def run_inside(box: Box, code: str, address: str) -> str:
    command = ["ip", "netns", "exec", box.namespace, sys.executable, "-c", code, address]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def test_nothing_goes_on_to_a_card_that_is_gone(lab: Box) -> None:
    run = partial(run_inside, lab)
    lab.create("web")
    web = lab.call("nic_add", vm="web", network="lab")
    stays, goes = ([nic["ip"], nic["ip6"]] for nic in web["nics"])
    for address in (*stays, *goes):
        run(SEND, address)
        assert run(COUNT, address) == "1\n"
    lab.call("nic_delete", vm="web", nic="lab")
    assert [run(COUNT, address) for address in stays] == ["1\n", "1\n"]
    assert [run(COUNT, address) for address in goes] == ["0\n", "0\n"]


def test_nothing_goes_on_to_a_card_that_daemon_and_qemu_died_over(lab: Box) -> None:
    vm = lab.create("web-keeps_disks", network=["default", "lab"])
    address = vm["nics"][1]["ip"]
    run_inside(lab, SEND, address)

    def end(progress: dict[str, Any]) -> None:
        if progress["stage"] == "unplugging_nic" and lab.daemon is not None:
            lab.end(signal.SIGKILL)

    with pytest.raises(AssertionError, match="hung up"):
        lab.call("nic_delete", end, vm=vm["id"], nic="lab")
    pidfd = os.pidfd_open(vm["pid"])
    os.kill(vm["pid"], signal.SIGKILL)
    wait_for_end(pidfd)
    os.close(pidfd)
    assert run_inside(lab, COUNT, address) == "1\n"
    lab.start()
    assert len(lab.call("vm_info", vm=vm["id"])["nics"]) == 1
    lab.until(lambda: run_inside(lab, COUNT, address) == "0\n", "the end of its connections")
    lab.until(lambda: address not in ip(lab, "neighbour", "show"), "the end of its neighbour")


def test_a_vm_that_is_off_gets_its_card_at_its_next_start(lab: Box) -> None:
    lab.create("web")
    lab.call("vm_stop", vm="web", force=True)
    added = lab.call("nic_add", vm="web", network="lab")
    check_accounted(lab)
    # Of this card only its row knows so far.
    own = added["nics"][1]
    shape = {"mem_size": "64M", "disk_size": "16M"}
    refused(lab, "in_use", "vm_create", name="other", network="lab", ip=own["ip"], **shape)
    other = lab.create("other", network="lab")["nics"][0]
    assert not {own["ip"], own["mac"], own["tap"]} & {other["ip"], other["mac"], other["tap"]}
    lab.call("vm_delete", vm="other", force=True)
    lab.call("vm_start", vm="web")
    assert plugged(lab, "web") == ["nic1"]
    assert is_guarded(lab, added["nics"][1])
    lab.call("vm_stop", vm="web", force=True)
    lab.call("nic_delete", vm="web", nic="lab")
    check_accounted(lab)
    lab.call("vm_start", vm="web")
    assert plugged(lab, "web") == []


def test_a_vm_that_is_off_is_given_all_its_cards_at_once(lab: Box) -> None:
    lab.call("network_create", name="more", subnet="10.40.0.0/24")
    vm = lab.create("web", network=["default", "lab", "tight"], bandwidth="80M")
    first, gone, kept = vm["nics"]
    run_inside(lab, SEND, gone["ip"])
    lab.call("vm_stop", vm="web", force=True)
    wanted = ["default", "more,ip=10.40.0.9", f"tight,ip={kept['ip']}"]
    changed = lab.call("vm_set", vm="web", network=wanted, cpus=2, name="blog")
    assert (changed["name"], changed["cpus"], changed["state"]) == ("blog", 2, "STOPPED")
    assert cards(changed)[1] == (1, "more", "10.40.0.9")
    assert [changed["nics"][0], changed["nics"][2]] == [first, kept]
    assert run_inside(lab, COUNT, gone["ip"]) == "0\n"
    assert not is_guarded(lab, gone)
    check_accounted(lab)
    assert lab.call("network_info", network="lab")["vms"] == []
    assert lab.call("vm_set", vm="blog", network=wanted) == changed
    check_accounted(lab)

    other = lab.create("other", network="lab", ip=gone["ip"])
    lab.call("vm_start", vm="blog")
    assert plugged(lab, "blog") == ["nic1", "nic2"]
    there = [*changed["nics"], *other["nics"]]
    assert all(is_guarded(lab, nic) for nic in there)
    taps = {nic["tap"] for nic in changed["nics"]}
    assert {name.split("_")[0] for name in limits(lab)} == taps
    lab.call("vm_stop", vm="blog", force=True)
    number = lab.call("network_info", network="default")["id"]
    assert lab.call("vm_set", vm="blog", network=number)["nics"] == [first]
    check_accounted(lab)
    both = lab.call("vm_set", vm="blog", network=["default", "lab"])
    assert cards(both)[1:] == [(1, "lab", "10.20.0.3")]
    check_accounted(lab)


def test_a_new_card_may_have_the_port_of_one_that_goes(lab: Box) -> None:
    lab.create("web", network=["default", "lab"])
    for number in range(PORTS - 1):
        lab.call("disk_create", name=f"disk{number}", size="1M")
        lab.call("disk_attach", vm="web", disk=f"disk{number}")
    lab.call("vm_stop", vm="web", force=True)
    three = {"vm": "web", "network": ["default", "lab", "tight"]}
    assert refused(lab, "exhausted", "vm_set", **three).data["resource"] == "slot"
    changed = lab.call("vm_set", vm="web", network=["default", "tight"])
    assert cards(changed)[1:] == [(1, "tight", "10.30.0.2")]
    check_accounted(lab)


def test_cards_that_can_not_be_leave_a_vm_as_it_was(lab: Box) -> None:
    lab.create("web", network=["default", "lab"])
    lab.create("other", network="tight", ip="10.30.0.3")
    wanted = {"vm": "web", "network": ["default", "tight"]}
    running = refused(lab, "invalid_state", "vm_set", **wanted)
    assert "it is RUNNING" in running.message
    for word in ("vm-stop web", "nic-add web", "nic-delete"):
        assert word in running.data["hint"]
    told = "SELECT 1 FROM vm WHERE name = 'web' AND identified AND seed_document = ''"
    lab.until(lambda: bool(lab.rows(told)), "the guest's disk to know who it is")
    lab.call("vm_suspend", vm="web")
    assert "vm-resume web" in refused(lab, "invalid_state", "vm_set", **wanted).data["hint"]
    lab.call("vm_stop", vm="web", force=True)
    before, web = lab.traces(), lab.call("vm_info", vm="web")
    for kind, message, network in (
        ("invalid_argument", "has 0 entries", []),
        ("invalid_argument", "in network 'default', which it keeps; 'lab' is", "lab"),
        ("invalid_argument", "'tight' is given as its first", ["tight", "default"]),
        ("invalid_argument", "'lab' is given twice", ["default", "lab", "lab"]),
        ("invalid_argument", "'default' is given twice", ["default", "lab", "default"]),
        ("invalid_argument", f"keeps {web['ip']}", ["default,ip=192.168.7.8", "tight"]),
        ("invalid_argument", f"keeps {web['nics'][1]['ip']}", ["default", "lab,ip=10.20.0.99"]),
        ("invalid_argument", "ip 'fast' can't become", ["default", "tight", "lab,ip=fast"]),
        ("invalid_argument", "ip 10.30.0.1 can't be", ["default", "tight,ip=10.30.0.1"]),
        ("in_use", "ip 10.30.0.3 belongs", ["default", "tight,ip=10.30.0.3"]),
        ("not_found", "'nowhere' not found", ["default", "tight", "nowhere"]),
    ):
        error = refused(lab, kind, "vm_set", vm="web", network=network, autostart="yes")
        assert message in error.message
    anew = {"network": ["default", "lab,ip=10.20.0.99"], "name": "blog"}
    hint = refused(lab, "invalid_argument", "vm_set", vm="web", **anew).data["hint"]
    assert "nic-delete web lab" in hint
    for kind, params in (
        ("already_exists", {"name": "other"}),
        ("exhausted", {"mem_size": "100T"}),
        ("invalid_argument", {"cpus": 0}),
    ):
        refused(lab, kind, "vm_set", **wanted, **params)
    assert lab.call("vm_info", vm="web") == web
    assert lab.traces() == before


def test_the_next_daemon_takes_every_card_up(lab: Box) -> None:
    vm = lab.create("web", network=["default", "lab"])
    lab.end(signal.SIGKILL)
    ip(lab, "link", "delete", "oscbr1")
    subprocess.run(["ip", "netns", "exec", lab.namespace, "nft", "flush", "ruleset"], check=True)
    lab.start()
    lab.wait("web", "RUNNING")
    lab.until(lambda: bridge_of(lab, vm["nics"][1]["tap"]) == "oscbr1", "the tap's return")
    lab.until(lambda: vm["nics"][1]["ip"] in ruleset(lab), "the rules' return")
    assert all(is_guarded(lab, nic) for nic in vm["nics"])
    check_accounted(lab)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("invalid_argument", {"network": []}),
        ("invalid_argument", {"network": ["lab", "lab"]}),
        ("invalid_argument", {"network": ["default"] * (PORTS + 2)}),
        ("invalid_argument", {"network": ["lab,ip="]}),
        ("invalid_argument", {"network": ["lab,ip=10.20.0.5"], "ip": "10.20.0.5"}),
        ("invalid_argument", {"network": ["default", "lab,ip=10.20.0.1"]}),
        ("invalid_argument", {"network": ["default", "lab,ip=10.21.0.5"]}),
        ("invalid_argument", {"network": ["default", "lab"], "warm": "only"}),
        ("invalid_argument", {"network": [None]}),
        ("not_found", {"network": ["default", "nowhere"]}),
        ("not_found", {"network": ["lab,mac=52:54:00:00:00:01"]}),
        ("in_use", {"network": ["default", "lab,ip=10.20.0.2"]}),
        ("exhausted", {"network": ["default", "lab", "tight"]}),
    ],
)
def test_a_vm_whose_cards_can_not_be_leaves_nothing(
    lab: Box, kind: str, params: dict[str, Any]
) -> None:
    lab.create("first", network="lab", ip="10.20.0.2")
    for number in range(5):
        lab.create(f"vm{number}", network=["tight"])
    before = lab.traces()
    refused(lab, kind, "vm_create", name="web", mem_size="64M", disk_size="16M", **params)
    assert lab.traces() == before


def test_a_card_that_can_not_be_leaves_nothing(lab: Box) -> None:
    lab.create("web", network=["default", "lab"])
    lab.create("other", network="tight", ip="10.30.0.3")
    before = lab.traces()
    for kind, params in (
        ("already_exists", {"network": "lab"}),
        ("already_exists", {"network": "default"}),
        ("not_found", {"network": "nowhere"}),
        ("in_use", {"network": "tight", "ip": "10.30.0.3"}),
        ("invalid_argument", {"network": "tight", "ip": "10.30.0.1"}),
        ("invalid_argument", {"network": "tight", "ip": "fast"}),
        ("invalid_argument", {"network": "tight", "mac": "52:54:00:00:00:01"}),
    ):
        refused(lab, kind, "nic_add", vm="web", **params)
    refused(lab, "not_found", "nic_add", vm="nobody", network="lab")
    for kind, nic in (
        ("invalid_state", 0),
        ("invalid_state", "default"),
        ("not_found", 2),
        ("not_found", "tight"),
        ("not_found", -1),
    ):
        refused(lab, kind, "nic_delete", vm="web", nic=nic)
    lab.call("vm_pause", vm="web")
    refused(lab, "invalid_state", "nic_delete", vm="web", nic="lab")
    lab.call("vm_resume", vm="web")
    assert lab.traces() == before


def test_no_vm_has_more_cards_and_disks_than_ports(lab: Box) -> None:
    lab.create("web")
    for number in range(PORTS - 1):
        lab.call("disk_create", name=f"disk{number}", size="1M")
        lab.call("disk_attach", vm="web", disk=f"disk{number}")
    lab.call("nic_add", vm="web", network="lab")
    assert (
        refused(lab, "exhausted", "nic_add", vm="web", network="tight").data["resource"] == "slot"
    )
    lab.call("disk_create", name="more", size="1M")
    refused(lab, "exhausted", "disk_attach", vm="web", disk="more")


def test_a_card_that_qemu_does_not_take_is_forgotten(lab: Box) -> None:
    lab.create("web-nic_fails")
    before = lab.traces()
    refused(lab, "host_failure", "nic_add", vm="web-nic_fails", network="lab")
    assert lab.traces() == before
    check_accounted(lab)
    refused(lab, "host_failure", "vm_create", name="two-nic_fails", network=["default", "lab"],
            mem_size="64M", disk_size="16M")  # fmt: skip
    check_accounted(lab)
    assert lab.traces() == before


def test_a_card_that_its_guest_keeps_stays(lab: Box) -> None:
    vm = lab.create("web-keeps_disks", network=["default", "lab"])
    jobs: list[int] = []

    def cancel(progress: dict[str, Any]) -> None:
        if progress["stage"] == "unplugging_nic" and not jobs:
            jobs.append(progress["job"])
            lab.call("job_cancel", job=progress["job"])

    with pytest.raises(RpcError) as cancelled:
        lab.call("nic_delete", cancel, vm=vm["id"], nic="lab")
    assert cancelled.value.kind == "cancelled"
    assert cards(lab.call("vm_info", vm=vm["id"])) == cards(vm)
    assert plugged(lab, vm["name"]) == ["nic1"]
    check_accounted(lab)


def test_each_card_has_the_vms_bandwidth(lab: Box) -> None:
    vm = lab.create("web", network=["default", "lab"], bandwidth="80M")
    taps = [nic["tap"] for nic in vm["nics"]]
    assert {name.split("_")[0] for name in limits(lab)} == {*taps}
    tight = lab.call("nic_add", vm="web", network="tight")["nics"][2]["tap"]
    assert {name.split("_")[0] for name in limits(lab)} == {*taps, tight}
    lab.call("nic_delete", vm="web", nic="lab")
    assert {name.split("_")[0] for name in limits(lab)} == {taps[0], tight}


def test_a_clone_has_as_many_cards(lab: Box) -> None:
    lab.create("web", network=["default", "lab"])
    told = "SELECT 1 FROM vm WHERE identified AND seed_document = ''"
    lab.until(lambda: bool(lab.rows(told)), "the guest's disk to know who it is")
    clone = lab.call("vm_clone", vm="web", name="copy", wait="started")
    assert [nic["network"] for nic in clone["nics"]] == ["default", "lab"]
    own = lab.call("vm_info", vm="web")["nics"]
    for key in ("ip", "mac", "tap"):
        assert len({nic[key] for nic in (*own, *clone["nics"])}) == 4, key
    check_accounted(lab)


def test_memory_of_a_snapshot_goes_with_the_cards_it_knows(lab: Box) -> None:
    lab.create("web", network=["default", "lab"])
    told = "SELECT 1 FROM vm WHERE identified AND seed_document = ''"
    lab.until(lambda: bool(lab.rows(told)), "the guest's disk to know who it is")
    lab.call("snapshot_create", vm="web", name="a", memory=True)
    restored = {"vm": "web", "snapshot": "a", "force": True}
    assert lab.call("snapshot_restore", **restored)["state"] == "RUNNING"
    assert plugged(lab, "web") == ["nic1"]
    lab.call("nic_add", vm="web", network="tight")
    error = refused(lab, "invalid_state", "snapshot_restore", **restored)
    assert "other network cards" in error.message
    lab.call("nic_delete", vm="web", nic="lab")
    refused(lab, "invalid_state", "snapshot_restore", **restored)
    assert lab.call("snapshot_restore", **restored, disk_only=True)["state"] == "RUNNING"
    assert plugged(lab, "web") == ["nic2"]
    check_accounted(lab)


def test_a_vm_travels_with_its_cards(lab: Box) -> None:
    vm = lab.create("web", network=["default", "lab,ip=10.20.0.9"])
    lab.call("vm_stop", vm="web", force=True)
    content, _answer = export(lab, "vm_export", vm="web")
    lab.call("vm_delete", vm="web")
    taken = take(lab, content)
    assert [(nic["ip"], nic["mac"]) for nic in taken["nics"]] == [
        (nic["ip"], nic["mac"]) for nic in vm["nics"]
    ]
    lab.call("vm_start", vm="web")
    assert all(is_guarded(lab, nic) for nic in taken["nics"])
    lab.call("vm_stop", vm="web", force=True)
    copy = take(lab, content, name="copy", new_identity=True)
    assert [nic["network"] for nic in copy["nics"]] == ["default", "lab"]
    query = "SELECT seed_document FROM vm WHERE name = 'copy'"
    [line] = re.findall(r"^other_nics=(.*)$", lab.rows(query)[0][0], re.MULTILINE)
    other = copy["nics"][1]
    assert base64.b64decode(line).decode() == f"{other['mac']} {other['ip']}/24\n"
    before = lab.traces()
    for kind, params in (
        ("in_use", {"name": "third"}),
        ("invalid_argument", {"name": "third", "network": "lab", "new_identity": True}),
    ):
        with pytest.raises(RpcError) as error:
            take(lab, content, **params)
        assert error.value.kind == kind, error.value
    for name in ("web", "copy"):
        lab.call("vm_delete", vm=name)
    lab.call("network_delete", network="lab")
    with pytest.raises(RpcError) as error:
        take(lab, content)
    assert error.value.kind == "not_found"
    assert before != lab.traces() == {}


def test_mariadb_keeps_cards_too(fake_qemu_binary: Path, mariadb: MariaDb) -> None:
    box = Box(fake_qemu_binary, mariadb)
    try:
        box.start()
        box.call("network_create", name="lab", subnet="10.20.0.0/24")
        vm = box.create("web", network=["default", "lab"])
        assert [seen["nics"] for seen in box.call("vm_list")] == [vm["nics"]]
        assert box.call("network_info", network="lab")["vms"] == ["web"]
        box.call("nic_delete", vm="web", nic="lab")
        assert plugged(box, "web") == []
        check_accounted(box)
        box.call("vm_stop", vm="web", force=True)
        box.call("network_create", name="tight", subnet="10.30.0.0/29")
        both = box.call("vm_set", vm="web", network=["default", "tight"], name="blog")
        assert cards(both)[1:] == [(1, "tight", "10.30.0.2")]
        swapped = box.call("vm_set", vm="blog", network=["default", "lab"])
        assert cards(swapped)[1:] == [(1, "lab", "10.20.0.2")]
        check_accounted(box)
    finally:
        box.close()
