"""Warm clones: one at a time, from the pool, and twenty at once.

A clone's time is what its creator waits for: from `vm_create` to its answer, which comes when the
guest's sshd has greeted on the vm's own address.
"""

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon import Daemon, say
from machine import Figure

from oscloudctl.client import Client

MANY = 20
# What is the guest's and qemu's own of a start; all the rest is the manager's.
NOT_OURS = ("spawn", "restore", "identity", "banner")

_WARM_SECONDS = 900.0
_CREATE_SECONDS = 300.0
_SETTLE_SECONDS = 240.0
_LOOK_SECONDS = 5.0
_IDLE_SHARE = 0.05  # of one processor, for each clone


@dataclass(frozen=True)
class Created:
    """One vm that was made: how long its creator waited, and where that went, in seconds."""

    vm: dict[str, Any]
    total: float

    @property
    def timings(self) -> dict[str, float]:
        timings: dict[str, float] = self.vm["timings"]
        return timings

    @property
    def ours(self) -> float:
        return self.total - sum(self.timings.get(stage, 0.0) for stage in NOT_OURS)


def make_image(client: Client, image: str) -> float:
    """Have a warm image; give how long that took."""
    begin = time.monotonic()
    client.call("template_warm", {"template": image}, timeout_seconds=_WARM_SECONDS)
    return time.monotonic() - begin


def create(client: Client, image: str, name: str = "warm") -> Created:
    begin = time.monotonic()
    params = {"name": name, "image": image, "warm": "only"}
    vm = client.call("vm_create", params, timeout_seconds=_CREATE_SECONDS)
    created = Created(vm, time.monotonic() - begin)
    if vm["started"] != "warm":
        raise RuntimeError(f"vm {name} was to begin warm: {vm['started']}, {vm['reason']}")
    return created


def create_and_delete(client: Client, image: str) -> Created:
    created = create(client, image)
    client.call("vm_delete", {"vm": created.vm["id"], "force": True})
    return created


def wait_for_spare(client: Client, image: str) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not any(warm["spares"] for warm in _images(client, image)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no spare clone of {image} within {_SETTLE_SECONDS:g} s")
        time.sleep(0.05)


def _images(client: Client, image: str) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = client.call("template_info", {"template": image})["warm"]
    return images


def create_many(daemon: Daemon, image: str) -> tuple[float, list[Created]]:
    """Fire all creates at once, each from a client of its own; give when the last was ready."""
    made: list[Created] = []
    errors: list[Exception] = []
    ready = threading.Barrier(MANY + 1)

    def one(number: int) -> None:
        try:
            with Client(str(daemon.socket)) as client:
                ready.wait()
                made.append(create(client, image, f"many{number}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(MANY)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.monotonic()
    for thread in threads:
        thread.join()
    total = time.monotonic() - begin
    if errors:
        raise errors[0]
    return total, made


def wait_idle(pids: list[int]) -> float:
    """Wait until the guests have come to rest; give the share of a processor each still takes."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        before, begin = _cpu_seconds(pids), time.monotonic()
        time.sleep(_LOOK_SECONDS)
        share = (_cpu_seconds(pids) - before) / (time.monotonic() - begin) / len(pids)
        if share < _IDLE_SHARE or time.monotonic() > deadline:
            return share


def describe_one_by_one(
    warm: list[Created], pool: list[Created], bare_seconds: float
) -> list[Figure]:
    """Give the lines about clones that were made one at a time."""
    total = statistics.median(each.total for each in warm)
    pooled = statistics.median(each.total for each in pool)
    return [
        _spread("warm vm_create to its answer", [each.total for each in warm], "1.0 s"),
        *_stages(warm),
        Figure("    of it the manager's own", _milliseconds([each.ours for each in warm]), "60 ms"),
        Figure("warm vm_create / bare, medians", f"1/{bare_seconds / total:.1f}", "1/30"),
        _spread("vm_create from the pool", [each.total for each in pool], "0.6 s"),
        *_stages(pool),
        Figure("vm_create from the pool / bare, medians", f"1/{bare_seconds / pooled:.1f}"),
    ]


def describe_many(daemon: Daemon, total: float, made: list[Created], single: float) -> list[Figure]:
    """Give the lines about many at once, with what each clone has of its own when it is idle."""
    pids = [each.vm["pid"] for each in made]
    say(f"Waiting for {MANY} clones to come to rest")
    share = wait_idle(pids)
    pss = [_memory(pid, "Pss") for pid in pids]
    dirty = [_memory(pid, "Private_Dirty") for pid in pids]
    disks = [_disk_bytes(daemon, each.vm["disk"]) for each in made]
    return [
        Figure(f"{MANY} warm creates at once", f"{total:.2f} s", f"{MANY * single / 1.5:.2f} s"),
        Figure(f"    {MANY} single ones / that", f"{MANY * single / total:.2f}", "1.5"),
        Figure("    processor time of each when idle", f"{share:.1%}"),
        Figure("    PSS of each, mean", _mib(statistics.mean(pss)), "85 MB"),
        Figure("    PSS of each, most", _mib(max(pss))),
        Figure("    private and written of each, mean", _mib(statistics.mean(dirty))),
        Figure("    disk of each, mean", _mib(statistics.mean(disks)), "1 MB"),
        Figure("    disk of each, most", _mib(max(disks))),
    ]


def _stages(created: list[Created]) -> list[Figure]:
    return [
        Figure(f"    {stage}", _milliseconds([each.timings.get(stage, 0.0) for each in created]))
        for stage in created[0].timings
    ]


def _spread(what: str, seconds: list[float], aim: str) -> Figure:
    spread = f"median of {len(seconds)}; {min(seconds):.2f} to {max(seconds):.2f}"
    return Figure(f"{what} ({spread})", f"{statistics.median(seconds):.2f} s", aim)


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.0f} ms"


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _cpu_seconds(pids: list[int]) -> float:
    return (
        sum(_nanoseconds(task) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
        / 1e9
    )


def _nanoseconds(task: Path) -> int:
    return int((task / "schedstat").read_text().split()[0])


def _memory(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no {name}")


def _disk_bytes(daemon: Daemon, disk: int) -> int:
    return (daemon.state / f"disks/{disk}/disk.qcow2").stat().st_blocks * 512
