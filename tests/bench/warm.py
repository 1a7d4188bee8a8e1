"""Vms that begin with a warm image: one by one, from the pool, many at once, and what they cost."""

import os
import re
import statistics
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from banner import BOOT_SECONDS
from daemon import say
from machine import Figure, give_seconds

from oscloudctl.client import Client
from oscloudd.config import WarmConfig
from oscloudd.host.processes import resource_usage

HAS_POOL = "pool" in WarmConfig.__struct_fields__
POOL = 2

MANY = 20
_SHARES = 5
_MEGABYTE = 1e6

# What of a warm start is qemu's or the guest's. `spawn` is from the fork to the monitor's first
# answers, `restore` the loading of the saved state and the disk's new size; `identity` lasts from
# the guest's first step until it says that it is somebody, `banner` from there to its sshd's
# greeting. The rest is ours: checking what is asked, a host key, reserving all of it in the
# database, the overlay, tap, bridge and neighbour entry, the rows
# of each step, the answer. Of our work there is some in those four, too: the descriptors a qemu is
# given, one transaction that says the guest is told, and the prober's pauses.
_NOT_OURS = ("spawn", "restore", "identity", "banner")

_WINDOW_SECONDS = 2.0
_MOST_WINDOWS = 60
# It has come to rest when it uses no less than this share of what it used in the window before.
_AT_REST = 0.8


@dataclass(frozen=True)
class Clone:
    """Seconds of a vm: until vm_create has answered, which its ssh banner precedes, and by stage.

    Nobody else asks its sshd: each connection costs an emulated guest 0.2 s, and the daemon's own
    has to wait for the answer as well.
    """

    answer: float
    timings: dict[str, float]


def make_image(client: Client, image: str) -> None:
    """Make the warm image of the usual shape, which every clone here has."""
    client.call("template_warm", {"template": image}, timeout_seconds=3 * BOOT_SECONDS)


def wait_spares(client: Client, image: str) -> None:
    """Wait until as many spare clones are ready as the daemon is to keep."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        warm = client.call("template_info", {"template": image})["warm"]
        if sum(each["spares"] for each in warm) >= POOL:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{POOL} spare clones were not ready within {BOOT_SECONDS:g} s")


def boot_clone(client: Client, image: str, address: str) -> Clone:
    """Make a vm from the warm image, or from the pool where there is one, and delete it."""
    begin = time.monotonic()
    vm = _create(client, image, "clone", address)
    answer = time.monotonic() - begin
    client.call("vm_delete", {"vm": vm["id"], "force": True})
    return Clone(answer, vm["timings"])


def describe(what: str, clones: list[Clone], aim: str) -> list[Figure]:
    """Give the lines of clones made one by one."""
    stages = list(clones[0].timings)
    return [
        give_seconds(f"{what} to its answer", [clone.answer for clone in clones], aim),
        *(
            give_seconds(f"    of these {stage!r}", [clone.timings[stage] for clone in clones])
            for stage in stages
        ),
    ]


def measure(
    client: Client, image: str, state: Path, first: IPv4Address, single: list[Clone]
) -> list[Figure]:
    """Measure our own share of a warm start, then many at once and what they take when idle.

    `first` is the first of the addresses they may have, `single` are those made one by one.
    """
    say(f"Making {_SHARES} clones one by one, then {MANY} at once")
    shares = [_own_share(client, image, str(first)) for _ in range(_SHARES)]
    share = statistics.median(shares) * 1000
    begin = time.monotonic()
    vms = _create_at_once(client.socket_path, image, first + 1)
    total = time.monotonic() - begin
    one_by_one = MANY * statistics.median(clone.answer for clone in single)
    say(f"Waiting for {MANY} clones to come to rest")
    used = _come_to_rest([vm["pid"] for vm in vms])
    idle = f"{image}: each of {MANY} clones at rest ({used:.2f} cores in all)"
    memory = [_memory(vm["pid"]) for vm in vms]
    disks = [state / f"disks/{vm['disk']}/disk.qcow2" for vm in vms]
    own = f"{image}: our own share of a warm vm_create (median of {_SHARES})"
    return [
        Figure(own, f"{share:.0f} ms", "60 ms"),
        Figure(
            f"{image}: {MANY} warm vm_create at once ({total:.2f} s)"
            f" / one after the other ({one_by_one:.2f} s)",
            f"1/{one_by_one / total:.2f}",
            "1/1.5",
        ),
        _megabytes(f"{idle}, PSS", [one["Pss"] for one in memory], "85 MB"),
        _megabytes(f"{idle}, Private_Dirty", [one["Private_Dirty"] for one in memory]),
        _megabytes(f"{idle}, disk", [path.stat().st_blocks * 512 for path in disks], "1 MB"),
    ]


def _own_share(client: Client, image: str, address: str) -> float:
    """Make a clone and delete it; give the seconds that are neither qemu's nor the guest's."""
    begin = time.monotonic()
    vm = _create(client, image, "clone", address)
    total = time.monotonic() - begin
    client.call("vm_delete", {"vm": vm["id"], "force": True})
    return total - sum(vm["timings"][stage] for stage in _NOT_OURS)


def _create(client: Client, image: str, name: str, address: str) -> dict[str, Any]:
    params = {"name": name, "image": image, "ip": address, "warm": "only"}
    vm: dict[str, Any] = client.call("vm_create", params, timeout_seconds=BOOT_SECONDS)
    if vm["started"] != "warm":
        raise RuntimeError(f"{name} was started {vm['started']}: see the events of its daemon")
    return vm


def _create_at_once(socket_path: str, image: str, first: IPv4Address) -> list[dict[str, Any]]:
    """Make many clones, each by a client of its own; all are ready when this returns."""
    vms: list[dict[str, Any]] = []

    def create(number: int) -> None:
        with Client(socket_path) as client:
            vms.append(_create(client, image, f"clone-{number}", str(first + number)))

    threads = [
        threading.Thread(target=create, args=(number,), daemon=True) for number in range(MANY)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(vms) < MANY:
        raise RuntimeError(f"{MANY - len(vms)} of {MANY} clones could not be made")
    return vms


def _come_to_rest(pids: list[int]) -> float:
    """Wait until these processes use no less processor time than a moment ago; give how much."""
    used = float("inf")
    for _ in range(_MOST_WINDOWS):
        before, began = _cpu_seconds(pids), time.monotonic()
        time.sleep(_WINDOW_SECONDS)
        now = (_cpu_seconds(pids) - before) / (time.monotonic() - began)
        if now >= _AT_REST * used and now < (os.cpu_count() or 1) / 2:
            return now
        used = now
    say(f"They did not come to rest within {_MOST_WINDOWS * _WINDOW_SECONDS:g} s")
    return used


def _cpu_seconds(pids: list[int]) -> float:
    usages = [resource_usage(pid) for pid in pids]
    return sum(usage.cpu_seconds for usage in usages if usage is not None)


def _memory(pid: int) -> dict[str, int]:
    """Give the bytes of each kind of memory a process has (proc_pid_smaps(5)).

    PSS counts a page that several have in parts: the image's own count a twentieth in each of
    twenty clones, so the figure depends on how many there are.
    """
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.M)}


def _megabytes(what: str, taken: list[int], aim: str = "") -> Figure:
    mean, most = statistics.mean(taken) / _MEGABYTE, max(taken) / _MEGABYTE
    return Figure(f"{what}, mean (max {most:.1f} MB)", f"{mean:.1f} MB", aim)
