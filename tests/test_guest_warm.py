"""Guests that begin where a saved one stood: each is somebody, and shares nothing but the image."""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pexpect
import pytest
from guest_cloud import BOOT_ID, closing
from warm_rig import (
    BOOT_SECONDS,
    CLONE_SECONDS,
    HOST,
    PASSWORD,
    Guest,
    Rig,
    ensure_built,
    run_in_own_network,
)

pytestmark = pytest.mark.guest

DISK_BYTES = 3 << 30
RANDOM_BYTES = 1 << 20

# Name and command of what is looked at in each guest.
LASTING = {
    "hostname": "hostname",
    "hosts": "cat /etc/hosts",
    "machine_id": "cat /etc/machine-id",
    "address": "ip -4 -o address show eth0 scope global | sed 's/ *valid_lft.*//'",
    "address6": "ip -6 -o address show eth0 scope global | awk '{ print $4 }'",
    "route6": "ip -6 route show default | awk '{ print $3 }' | sort -u",
    "route": "ip route | sed 's/ *$//'",
    "mac": "cat /sys/class/net/eth0/address",
    "resolver": "cat /etc/resolv.conf",
    "shadow": "grep ^root: /etc/shadow",
    "keys": "cat /root/.ssh/authorized_keys",
    "modes": "stat -c %a /root/.ssh /root/.ssh/authorized_keys /etc/shadow /etc/*/*host*_key",
    "greeting": "cat /etc/oscloud/greeting",
    "kilobytes": "df -k / | tail -n 1 | awk '{ print $2 }'",
}
PASSING = {
    "boot_id": f"cat {BOOT_ID}",
    "uuid": "uuidgen || cat /proc/sys/kernel/random/uuid",
    "clock": "date +%s",
    "left": "ls -d /run/oscloud /run/busybox 2>&1",
    "journals": "ls /var/log/journal 2>&1",
}
ONLY_DEBIAN = {
    "seed": "sha256sum </var/lib/systemd/random-seed",
    "journal_boot": "journalctl -q -b -o export -n 1 | grep -a -e ^_BOOT_ID -e ^_MACHINE_ID",
    "bus": "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1"
    " org.freedesktop.DBus.Peer GetMachineId",
    "failed": "systemctl --failed --no-legend",
    "network": "networkctl --no-legend | grep eth0",
    "nice": "ps -eo nice=,args= | grep -v '\\[' | awk '$1 != 0'",
}


@dataclass
class Seen:
    """What was seen of one guest at one time."""

    guest: Guest
    facts: dict[str, str]
    host_clock: tuple[float, float]  # the host's, in seconds since 1970: before and after


@dataclass
class Story:
    """Two clones of one saved machine, the first rebooted, the second turned off and on."""

    template: str
    first: Seen
    second: Seen
    randoms: list[bytes]
    by_password: str
    consoles: list[str]
    rebooted: Seen
    turned_on: Seen


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("debian_12", marks=pytest.mark.debian)]
)
def story(request: pytest.FixtureRequest) -> Story:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    # Here, since a build needs the world, and the rig's network has none.
    built = ensure_built(request.param)
    told: Story = run_in_own_network(lambda: tell(request.param, built))
    return told


async def tell(template: str, built: Path) -> Story:
    rig = Rig(template, built)
    try:
        await rig.save()
        one = await rig.clone(10, disk_bytes=DISK_BYTES)
        other = await rig.clone(11, disk_bytes=DISK_BYTES)
        draw = f"head -c {RANDOM_BYTES} /dev/urandom"
        randoms = [await rig.ssh(guest, draw) for guest in (one, other)]
        by_password = log_in_by_password(rig, one)
        first, second = [await look_settled(rig, guest, template) for guest in (one, other)]
        consoles = [await printed_prompt(rig, guest) for guest in (one, other)]
        await reboot(rig, one, first.facts["boot_id"])
        rebooted = await look(rig, one, template)
        await rig.ssh(other, "poweroff", check=False)
        async with asyncio.timeout(BOOT_SECONDS):
            await asyncio.shield(other.qemu.exited)
        await rig.end(other.qemu)
        await rig.start_cold(other)
        turned_on = await look(rig, other, template)
        return Story(
            template, first, second, randoms, by_password, consoles, rebooted, turned_on
        )  # fmt: skip
    finally:
        await rig.close()


async def look(rig: Rig, guest: Guest, template: str) -> Seen:
    commands = {**LASTING, **PASSING, **(ONLY_DEBIAN if template == "debian_12" else {})}
    script = "; ".join(f"echo =={name}; {command}" for name, command in commands.items())
    before = time.time()
    text = (await rig.ssh(guest, script, check=False)).decode()
    clock = (before, time.time())
    parts = (part.partition("\n") for part in text.split("==")[1:])
    return Seen(guest, {name: value.strip() for name, _, value in parts}, clock)


async def look_settled(rig: Rig, guest: Guest, template: str) -> Seen:
    """Look when the clone has done what nobody has to wait for: /run/busybox goes last."""
    await rig.ssh(guest, "while [ -e /run/busybox ]; do sleep 0.2; done")
    return await look(rig, guest, template)


async def reboot(rig: Rig, guest: Guest, old_boot_id: str) -> None:
    await rig.ssh(guest, "reboot", check=False)
    async with asyncio.timeout(BOOT_SECONDS):
        while (await rig.ssh(guest, f"cat {BOOT_ID}", check=False)).decode().strip() in (
            "",
            old_boot_id,
        ):
            await asyncio.sleep(0.2)


async def printed_prompt(rig: Rig, guest: Guest) -> str:
    """Wait for the login prompt; what a log has got has no event."""
    async with asyncio.timeout(CLONE_SECONDS):
        while "login:" not in rig.printed(guest):
            await asyncio.sleep(0.1)
    return rig.printed(guest)


def log_in_by_password(rig: Rig, guest: Guest) -> str:
    options = ["-o", "PubkeyAuthentication=no", "-o", f"UserKnownHostsFile={rig.root}/known10"]
    argv = ["-F", "none", *options, f"root@{guest.address}", "hostname"]
    ssh: pexpect.spawn[str] = pexpect.spawn("ssh", argv, encoding="utf-8", timeout=CLONE_SECONDS)
    with closing(ssh):
        ssh.expect("assword:")
        ssh.sendline(PASSWORD)
        ssh.expect(pexpect.EOF)
        return str(ssh.before).strip()


def lasting(seen: Seen) -> dict[str, str]:
    return {name: seen.facts[name] for name in LASTING}


def test_each_is_who_it_was_told_to_be(story: Story) -> None:
    # ssh has checked the host key of each connection against the guest's own.
    for seen in (story.first, story.second):
        identity, facts = seen.guest.identity, seen.facts
        assert facts["hostname"] == identity.hostname
        assert f"127.0.1.1\t{identity.hostname}" in facts["hosts"]
        assert facts["machine_id"] == identity.machine_id
        assert f"inet {identity.address}/24 " in facts["address"]
        assert facts["address"].count("inet") == 1
        assert f"default via {HOST} dev eth0" in facts["route"]
        assert (facts["address6"], facts["route6"]) == (identity.address6, identity.gateway6)
        assert facts["mac"] == identity.mac
        assert facts["resolver"].split() == ["nameserver", HOST, "nameserver", "192.0.2.53"]
        assert facts["keys"] == identity.authorized_keys[0]
        assert set(facts["modes"].split()) <= {"700", "600", "640"}
        assert facts["greeting"] == "Powered by OS Cloud"
        assert int(facts["kilobytes"]) > 2.7 * (1 << 20)
        assert "No such file" in facts["left"]
        assert "\n/run" not in f"\n{facts['left']}"


def test_only_one_was_told_an_ipv6_address(story: Story) -> None:
    told = [bool(seen.guest.identity.address6) for seen in (story.first, story.second)]
    assert told == [True, False]


def test_it_lets_its_owner_in_by_password(story: Story) -> None:
    assert story.by_password.endswith("vm10")


def test_their_clocks_are_the_hosts(story: Story) -> None:
    # The saved machine's was a day behind; what a clone is told is seconds old when it hears it.
    for seen in (story.first, story.second):
        before, after = seen.host_clock
        assert before - 600 < int(seen.facts["clock"]) < after + 600


def test_two_clones_have_nothing_in_common(story: Story) -> None:
    same = {"greeting", "kilobytes", "modes", "resolver", "keys", "left", "clock", "failed", "nice"}
    same |= {"network"} if story.template == "debian_12" else {"journals"}
    one, other = story.first.facts, story.second.facts
    assert not {name for name in one if one[name] == other[name]} - same


def test_their_random_numbers_have_nothing_in_common(story: Story) -> None:
    one, other = story.randoms
    assert len(one) == len(other) == RANDOM_BYTES
    # Any eight bytes, wherever they stand: by chance that happens once in 10^8 times.
    known = {one[at : at + 8] for at in range(0, RANDOM_BYTES, 8)}
    assert not any(other[at : at + 8] in known for at in range(RANDOM_BYTES - 7))


def test_the_running_system_knows_of_no_other_machine(story: Story) -> None:
    for seen in (story.first, story.second):
        facts, machine_id = seen.facts, seen.guest.identity.machine_id
        if story.template == "tiny":  # nothing in it remembers
            assert "No such file" in facts["journals"]
            continue
        assert facts["journals"] == machine_id
        boot_id = facts["boot_id"].replace("-", "")
        assert set(facts["journal_boot"].split()) == {
            f"_BOOT_ID={boot_id}",
            f"_MACHINE_ID={machine_id}",
        }
        assert machine_id in facts["bus"]
        assert facts["failed"] == ""
        assert "configured" in facts["network"]
        assert facts["nice"] == ""


def test_the_console_asks_who_logs_in(story: Story) -> None:
    for number, console in zip((10, 11), story.consoles, strict=True):
        assert f"vm{number} login:" in console
        assert "oscloud-identity" not in console


@pytest.mark.parametrize("later", ["rebooted", "turned_on"])
def test_it_stays_who_it_is(story: Story, later: str) -> None:
    before: dict[str, Any] = {"rebooted": story.first, "turned_on": story.second}
    seen: Seen = getattr(story, later)
    assert lasting(seen) == lasting(before[later])
    assert seen.facts["boot_id"] != before[later].facts["boot_id"]
