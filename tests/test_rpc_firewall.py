"""The firewall as a daemon keeps it: through vms that come and go, a flush, and its own death."""

import signal
import subprocess
from typing import Any

from daemon_process import Box
from test_rpc_ports import route_localnet


def ruleset(box: Box) -> str:
    command = ["ip", "netns", "exec", box.namespace, "nft", "list", "ruleset"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nft(box: Box, text: str) -> None:
    command = ["ip", "netns", "exec", box.namespace, "nft", "-f", "-"]
    subprocess.run(command, input=f"{text}\n", check=True, text=True)


def doctor(box: Box) -> dict[str, Any]:
    """Give what the doctor says of the firewall."""
    checks = box.call("daemon_doctor")["checks"]
    [check] = [check for check in checks if check["check"] == "firewall"]
    return dict(check)


def ports_of(box: Box) -> dict[str, str]:
    """Give which taps may send, each with its bridge's entry for the MAC behind it."""
    shown = subprocess.run(
        ["bridge", "-n", box.namespace, "fdb", "show"], check=True, capture_output=True, text=True
    ).stdout
    entries = [line.split() for line in shown.splitlines() if line.endswith("static")]
    return {words[2]: words[0] for words in entries}


def test_a_vm_may_send_from_its_creation_to_its_end(box: Box) -> None:
    web, db = box.create("web"), box.create("db")
    assert ports_of(box) == {"osctap0": web["mac"], "osctap1": db["mac"]}
    rules = ruleset(box)
    assert f'"osctap0" . {web["mac"]} . {web["ip"]}' in rules
    assert f'"osctap1" . {db["mac"]} . {db["ip"]}' in rules
    box.call("vm_stop", vm="web", force=True)
    assert ruleset(box) == rules
    box.call("vm_delete", vm="web", force=True)
    assert "osctap0" not in ruleset(box)
    assert f'"osctap1" . {db["mac"]} . {db["ip"]}' in ruleset(box)
    api = box.create("api")
    assert ports_of(box)["osctap0"] == api["mac"]
    assert web["mac"] not in ruleset(box)


def test_tables_are_put_back_when_somebody_flushes_or_changes_them(box: Box) -> None:
    box.create("web")
    rules = ruleset(box)
    for change in (
        "flush ruleset\n",
        "delete table bridge oscloud\n",
        "flush chain inet oscloud forward\n",
        "insert rule inet oscloud input accept\n",
        'add element inet oscloud isolated { "oscbr0" }\n',
    ):
        nft(box, change)
        box.until(lambda: ruleset(box) == rules, f"the end of {change}")
    others = 'table ip theirs { chain x { iifname "oscbr0" accept; }; }\n'
    nft(box, others)
    nft(box, "flush ruleset\n" + others)
    box.until(lambda: "table inet oscloud" in ruleset(box), "our own tables")
    assert "table ip theirs" in ruleset(box)


def test_tables_are_right_again_after_a_daemon_has_died(box: Box) -> None:
    box.create("web")
    rules = ruleset(box)
    box.end(signal.SIGKILL)
    nft(box, "flush ruleset\n")
    box.start()
    box.until(lambda: ruleset(box) == rules, "the tables of an adopted vm")


def test_a_vm_that_is_made_when_the_tables_are_gone_brings_them_back(box: Box) -> None:
    box.create("web")
    nft(box, "flush ruleset\n")
    db = box.create("db")
    assert f'"osctap1" . {db["mac"]} . {db["ip"]}' in ruleset(box)


def test_a_vm_whose_deletion_is_given_up_may_send_and_has_its_name(box: Box) -> None:
    vm = box.create("web-ignore_powerdown")
    box.create("other")
    rules = ruleset(box)
    job = box.call("vm_delete", vm=vm["id"], timeout=600, wait=False)
    box.until(lambda: box.call("job_info", job=job["id"])["cancellable"], "the job")
    # Who looks at the rows now sees a vm that is going: a daemon that starts, one that repairs.
    box.end(signal.SIGKILL)
    box.start()
    box.until(lambda: box.call("job_info", job=job["id"])["cancellable"], "the job taken up")
    nft(box, "flush ruleset")
    box.until(lambda: "osctap1" in ruleset(box), "the tables put back")
    assert "osctap0" not in ruleset(box)
    assert box.call("job_cancel", job=job["id"])["state"] == "CANCELLED"
    assert box.call("vm_info", vm=vm["id"])["state"] == "RUNNING"
    assert ruleset(box) == rules
    assert (box.root / f"run/names/oscbr0/hosts/{vm['id']}").exists()


def test_a_guest_whose_bridge_somebody_has_removed_is_on_it_again(box: Box) -> None:
    web = box.create("web")
    box.end(signal.SIGKILL)
    subprocess.run(["ip", "-n", box.namespace, "link", "delete", "oscbr0"], check=True)
    box.start()
    box.wait("web", "running")
    assert box.call("vm_info", vm="web")["pid"] == web["pid"]
    box.until(lambda: ports_of(box) == {"osctap0": web["mac"]}, "its bridge port")
    assert box.call("vm_info", vm="web")["state"] == "RUNNING"


def test_a_bridge_that_somebody_removes_under_running_vms_is_put_back(box: Box) -> None:
    ip = ["ip", "-n", box.namespace]

    def show(*words: str) -> str:
        return subprocess.run([*ip, *words], check=True, capture_output=True, text=True).stdout

    box.call("network_create", name="lab", subnet="10.20.0.0/24")
    web, db = box.create("web", publish=["8080:80"]), box.create("db")
    off, lab = box.create("off", network="lab"), box.create("lab", network="lab")
    box.call("vm_stop", vm="off", force=True)
    there, rules = ports_of(box), ruleset(box)
    addresses = [
        line.split()[3] for line in show("-o", "address", "show", "dev", "oscbr0").splitlines()
    ]
    for _ in range(2):
        show("link", "delete", "oscbr0")
        box.until(lambda: ports_of(box) == there, "the ports of its bridge")
        box.until(lambda: route_localnet(box) == "1", "the way from loopback")
        shown = show("-o", "address", "show", "dev", "oscbr0")
        assert all(address in shown for address in addresses if not address.startswith("fe80"))
        known = show("neighbour", "show", "dev", "oscbr0", "nud", "permanent")
        for vm in (web, db):
            assert {vm["ip"], vm["ip6"]} <= set(known.split())
        assert sorted(ruleset(box).splitlines()) == sorted(rules.splitlines())
    warned = box.rows("SELECT data FROM event WHERE kind = 'warning' AND name = 'oscbr0'")
    assert len(warned) == 2
    # Where nobody is, it comes with the next start.
    box.call("vm_stop", vm="lab", force=True)
    show("link", "delete", "oscbr1")
    show("link", "delete", "oscbr0")
    box.until(lambda: set(ports_of(box)) == {"osctap0", "osctap1"}, "the ports of its bridge")
    assert "oscbr1" not in show("link", "show")
    assert box.call("vm_start", vm="off")["ip"] == off["ip"]
    assert off["mac"] in ports_of(box).values()
    assert lab["mac"] not in ports_of(box).values()


def test_guests_are_on_a_bridge_that_somebody_has_removed_and_made_anew(box: Box) -> None:
    def ip(*lines: str) -> None:
        """Have all of it happen before the daemon looks."""
        assert box.daemon is not None
        batch = ["ip", "-n", box.namespace, "-batch", "-"]
        box.daemon.send_signal(signal.SIGSTOP)
        subprocess.run(batch, input="\n".join(lines), text=True, check=True)
        box.daemon.send_signal(signal.SIGCONT)

    web, db = box.create("web", publish=["8080:80"]), box.create("db")
    there = ports_of(box)
    anew = ("link delete oscbr0", "link add oscbr0 type bridge", "link set oscbr0 alias oscloud")
    ip(*anew)
    box.until(lambda: ports_of(box) == there, "the ports of the bridge that is there already")
    box.until(lambda: route_localnet(box) == "1", "the way from loopback")
    # On another one, or gone altogether: neither keeps another guest from its bridge.
    ip("link add theirs type bridge", "link set osctap1 master theirs", *anew)
    box.until(lambda: ports_of(box) == there, "the tap from another bridge")
    ip("link delete theirs", "link delete osctap0", "link delete oscbr0")
    box.until(lambda: ports_of(box) == {"osctap1": db["mac"]}, "the port of the one with a tap")
    assert box.call("vm_info", vm="web")["pid"] == web["pid"]
    box.until(lambda: route_localnet(box) == "1", "the way from loopback")


OTHERS = {
    "Docker (nft table ip filter)": (
        """table ip filter {
            chain FORWARD { type filter hook forward priority 0; policy drop; }
            chain DOCKER-USER { }
        }""",
        "iptables -I DOCKER-USER -i oscbr+ -j ACCEPT",
    ),
    "ufw (nft table ip filter)": (
        """table ip filter {
            chain FORWARD { type filter hook forward priority 0; policy drop; }
            chain ufw-before-forward { }
        }""",
        "ufw route allow in on oscbr0",
    ),
    "firewalld (nft table inet firewalld)": (
        """table inet firewalld {
            chain filter_FORWARD { type filter hook forward priority 10; reject; }
        }""",
        "--zone=trusted --add-interface=oscbr0",
    ),
    "chain pass (nft table inet site)": (
        "table inet site { chain pass { type filter hook forward priority 0; policy drop; }; }",
        'nft insert rule inet site pass iifname "oscbr*" accept',
    ),
}


def test_the_doctor_names_who_keeps_guests_from_the_outside_and_what_to_do(box: Box) -> None:
    assert doctor(box)["verdict"] == "ok"
    for owner, (table, fix) in OTHERS.items():
        nft(box, table)
        found = doctor(box)
        assert (found["verdict"], owner in found["message"]) == ("warning", True), found
        assert fix in found["hint"]
        nft(box, "flush ruleset")
    nft(box, OTHERS["chain pass (nft table inet site)"][0])
    for word in doctor(box)["hint"].split("; "):
        nft(box, word.removeprefix("nft "))
    assert doctor(box)["verdict"] == "ok"


def test_the_doctor_sees_that_nothing_is_forwarded(box: Box) -> None:
    box.create("web")
    assert doctor(box)["verdict"] == "ok"
    command = ["ip", "netns", "exec", box.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=0"]
    subprocess.run(command, check=True)
    found = doctor(box)
    assert (found["verdict"], "ip_forward is 0" in found["message"]) == ("failure", True)
    assert "sysctl net.ipv4.ip_forward=1" in found["hint"]
