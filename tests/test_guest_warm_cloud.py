"""New vms that begin where a template that was booted once stands: many, and none like another."""

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from guest_cloud import BOOT_ID, GuestCloud, open_cloud

pytestmark = pytest.mark.guest

SHAPE = {"mem_size": "256M", "cpus": 1, "disk_size": "1G"}
MANY = 20
FEW = 3
RANDOM_BYTES = 64

# What of a guest must be its own: for good, and in this boot.
LASTING = {
    "hostname": "hostname",
    "address": "ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4",
    "mac": "cat /sys/class/net/eth0/address",
    "machine-id": "cat /etc/machine-id",
}
PASSING = {
    "boot-id": f"cat {BOOT_ID}",
    "random": f"head -c {RANDOM_BYTES} /dev/urandom | od -An -v -tx1 | tr -d ' \\n'",
    # Each of these draws by a call of its own: the kernel's, the C library's, the key makers'.
    "uuid": "cat /proc/sys/kernel/random/uuid",
    "name": "mktemp -u",
    "key": "rm -f /tmp/key; { dropbearkey -t ed25519 -f /tmp/key ||"
    " { ssh-keygen -q -t ed25519 -N '' -f /tmp/key && cat /tmp/key.pub; }; } 2>/dev/null"
    " | grep -o 'AAAA[^ ]*'",
}
ONLY_DEBIAN = {
    "seed": "sha256sum </var/lib/systemd/random-seed",
    "journal": "ls /var/log/journal",
    "journal-of": "journalctl -q -b -o export -n 1 | grep -a ^_MACHINE_ID",
}


@dataclass
class Crowd:
    """Clones of one image that were made at once, and what was seen of each."""

    cloud: GuestCloud
    template: str
    vms: list[dict[str, Any]]
    seen: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def cloud() -> Iterator[GuestCloud]:
    with open_cloud("tiny", warm="auto") as cloud:
        cloud.call("template_warm", template="tiny", **SHAPE)
        yield cloud


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("debian_12", marks=pytest.mark.debian)]
)
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    template, size = request.param, MANY if request.param == "tiny" else FEW
    with open_cloud(template) as cloud:
        cloud.call("template_warm", template=template, **SHAPE)
        crowd = Crowd(cloud, template, create_at_once(cloud, template, size))
        for vm in crowd.vms:
            wait_rested(cloud, vm)
        more = ONLY_DEBIAN if template == "debian_12" else {}
        crowd.seen = [identity_of(cloud, vm, **more) for vm in crowd.vms]
        yield crowd


def wait_rested(cloud: GuestCloud, vm: dict[str, Any]) -> None:
    """Wait until a clone has done what nobody has to wait for: /run/busybox goes last."""
    cloud.ssh(vm, "while [ -e /run/busybox ]; do sleep 0.2; done")


def create_at_once(cloud: GuestCloud, template: str, size: int) -> list[dict[str, Any]]:
    public = cloud.key.with_suffix(".pub").read_text().strip()
    for number in range(size):
        cloud.call(
            "vm_create", name=f"clone-{number}", image=template, warm="only",
            ssh_key=[public], wait="none", **{**SHAPE, "disk_size": "3G"},
        )  # fmt: skip
    return [cloud.wait({"id": f"clone-{number}"}) for number in range(size)]


def identity_of(cloud: GuestCloud, vm: dict[str, Any], **more: str) -> dict[str, str]:
    """Give what of a guest must be its own, with the host keys that anybody is served."""
    commands = {**LASTING, **PASSING, **more}
    script = "; ".join(f"echo =={name}; {command}" for name, command in commands.items())
    parts = (part.partition("\n") for part in cloud.ssh(vm, script).split("==")[1:])
    facts = {name: value.strip() for name, _, value in parts}
    scanned = cloud.run("ssh-keyscan", "-t", "ed25519,ecdsa", vm["ip"]).splitlines()
    served = (line.split()[1:] for line in scanned if not line.startswith("#"))
    return facts | {f"host key {kind}": key for kind, key in served}


def lasting(facts: dict[str, str]) -> dict[str, str]:
    return {name: fact for name, fact in facts.items() if name in LASTING or "host key" in name}


def test_all_began_with_the_image(crowd: Crowd) -> None:
    assert [vm["started"] for vm in crowd.vms] == ["warm"] * len(crowd.vms)
    [image] = crowd.cloud.call("template_info", template=crowd.template)["warm"]
    assert image["used_by"] == len(crowd.vms)


def test_each_is_who_vm_info_says(crowd: Crowd) -> None:
    for vm, facts in zip(crowd.vms, crowd.seen, strict=True):
        assert facts["hostname"] == vm["name"]
        assert facts["address"].partition("/")[0] == vm["ip"]
        assert facts["mac"] == vm["mac"]
        served = {f"{name[9:]} {key}" for name, key in facts.items() if "host key" in name}
        assert served
        assert served <= set(vm["ssh_host_keys"])
        if crowd.template == "debian_12":
            assert facts["journal"] == facts["machine-id"]
            assert facts["journal-of"] == f"_MACHINE_ID={facts['machine-id']}"


def test_no_two_have_anything_in_common(crowd: Crowd) -> None:
    for name in crowd.seen[0]:
        everyones = [facts[name] for facts in crowd.seen]
        assert all(everyones), (name, everyones)
        assert len(set(everyones)) == len(everyones), (name, sorted(everyones))


def test_no_two_draw_the_same_random_bytes(crowd: Crowd) -> None:
    drawn = [bytes.fromhex(facts["random"]) for facts in crowd.seen]
    # Any eight bytes, wherever they stand: by chance that happens once in 10^13 times.
    pieces = [
        {random[at : at + 8] for at in range(RANDOM_BYTES - 7)}
        for random in drawn
        if len(random) == RANDOM_BYTES
    ]
    assert len(pieces) == len(crowd.vms)
    for one, other in itertools.combinations(pieces, 2):
        assert not one & other


def test_what_one_writes_no_other_sees(crowd: Crowd) -> None:
    one, *others = crowd.vms
    crowd.cloud.ssh(one, "echo kept >/root/kept; sync")
    for other in others[:FEW]:
        assert crowd.cloud.ssh(other, "ls /root/kept 2>&1 || echo none").endswith("none")


def test_it_stays_who_it_is_through_a_reboot(crowd: Crowd) -> None:
    vm, before = crowd.vms[1], crowd.seen[1]
    crowd.cloud.ssh(vm, "reboot", check=False)
    crowd.cloud.wait_for_boot(vm, before["boot-id"])
    again, after = crowd.cloud.info(vm), identity_of(crowd.cloud, vm)
    assert (again["pid"], again["started"]) == (vm["pid"], "warm")
    assert lasting(after) == lasting(before)
    assert not {name for name in PASSING if after[name] == before[name]}


def test_turned_off_and_on_it_begins_with_its_own_disk(crowd: Crowd) -> None:
    vm, before = crowd.vms[2], crowd.seen[2]
    crowd.cloud.ssh(vm, "echo kept >/root/kept")
    crowd.cloud.call("vm_stop", vm=vm["id"])
    crowd.cloud.call("vm_start", vm=vm["id"])
    assert crowd.cloud.wait(vm)["started"] == "cold"
    after = identity_of(crowd.cloud, vm)
    assert lasting(after) == lasting(before)
    assert not {name for name in PASSING if after[name] == before[name]}
    assert crowd.cloud.ssh(vm, "cat /root/kept") == "kept"


def test_a_killed_daemon_leaves_warm_images_and_clones(cloud: GuestCloud) -> None:
    vm = cloud.create("survivor")
    cloud.end(signal.SIGKILL)
    cloud.start()
    assert cloud.wait(vm)["pid"] == vm["pid"]
    assert cloud.create("later")["started"] == "warm"


def test_a_damaged_state_gives_a_cold_start(cloud: GuestCloud) -> None:
    with damaged(cloud, "state"):
        see_cold(cloud, "cold-by-state")


def test_a_damaged_memory_gives_a_cold_start(cloud: GuestCloud) -> None:
    cloud.end()  # it has the memory at hand
    with damaged(cloud, "memory"):
        cloud.start()
        see_cold(cloud, "cold-by-memory")
        cloud.end()
    cloud.start()


@contextmanager
def damaged(cloud: GuestCloud, file: str) -> Iterator[None]:
    """Have something else in the middle of a file of the warm image."""
    [image] = (cloud.root / "state/warm").glob("[!.]*")
    with (image / file).open("r+b") as opened:
        offset = (image / file).stat().st_size // 2
        whole = os.pread(opened.fileno(), 8192, offset)
        os.pwrite(opened.fileno(), os.urandom(8192)[: len(whole)], offset)
        try:
            yield
        finally:
            os.pwrite(opened.fileno(), whole, offset)


def see_cold(cloud: GuestCloud, name: str) -> None:
    vm = cloud.create(name)
    assert vm["started"] == "cold"
    assert cloud.ssh(vm, "hostname") == name
