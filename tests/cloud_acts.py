"""What users do with vms, snapshots and disks, and what must come of it: the model's plans."""

from dataclasses import dataclass, replace
from typing import Any

from daemon_process import Box

DOWN = ("STOPPED", "SUSPENDED", "CRASHED", "ERROR")
SNAPSHOTS = ("a", "b", "c", "d")
DISKS = ("data", "logs")

VERBS = (
    "create", "start", "stop", "stop --force", "pause", "resume", "restart", "delete",
    "delete --force", "rename", "suspend",
)  # fmt: skip
SNAPSHOT_VERBS = (
    "snapshot", "snapshot", "snapshot", "snapshot --memory", "restore", "restore --force",
    "forget", "forget",
)  # fmt: skip
DISK_VERBS = ("attach", "detach", "disk", "no disk")


@dataclass(frozen=True)
class Known:
    """What its user knows of a vm; of a snapshot its name and its kind."""

    state: str
    wanted: str
    pid: int | None
    uuid: str
    snapshots: tuple[tuple[str, str], ...] = ()
    disks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a vm is when something has been done to it; `pid` is "same", "new" or "none"."""

    name: str
    state: str
    wanted: str
    pid: str
    snapshots: tuple[tuple[str, str], ...] = ()
    disks: tuple[str, ...] = ()

    def is_met(self, was: Known | None, now: dict[str, Known]) -> bool:
        vm = now.get(self.name)
        if vm is None or (vm.state, vm.wanted) != (self.state, self.wanted):
            return False
        if (vm.snapshots, vm.disks) != (self.snapshots, self.disks):
            return False
        if was is not None and vm.uuid != was.uuid:
            return False
        before = was.pid if was is not None else None
        if self.pid == "new":
            return vm.pid is not None and vm.pid != before
        return vm.pid == (before if self.pid == "same" else None)


@dataclass(frozen=True)
class Act:
    """Something a user does to the vm `name`: what follows, None where that is its end.

    Or to a disk that no vm has or gets: `name` is empty, and `disk` that is there then, or is not.
    """

    method: str
    params: dict[str, Any]
    name: str
    outcome: Outcome | None
    is_refused: bool = False
    disk: tuple[str, bool] = ("", False)


def see_vms(box: Box) -> dict[str, Known]:
    """Give what a user is told of all vms."""
    disks = [disk for disk in box.call("disk_list") if disk["role"] == "data"]
    found = {}
    for vm in box.call("vm_list"):
        snapshots = box.call("snapshot_list", vm=vm["id"])
        found[vm["name"]] = Known(
            vm["state"],
            vm["wanted_state"],
            vm["pid"],
            vm["uuid"],
            tuple((each["name"], each["kind"]) for each in snapshots),
            tuple(sorted(disk["name"] for disk in disks if disk["vm"] == vm["name"])),
        )
    return found


def see_disks(box: Box) -> set[str]:
    """Give the names of the disks that are no vm's root disk."""
    return {disk["name"] for disk in box.call("disk_list") if disk["role"] != "root"}


def as_it_is(name: str, known: Known) -> Outcome:
    pid = "none" if known.state in DOWN else "same"
    return Outcome(name, known.state, known.wanted, pid, known.snapshots, known.disks)


def plan(verb: str, name: str, known: Known, new_name: str) -> Act:
    """Say what is asked for and what must come of it."""
    method, _, force = verb.partition(" ")
    params: dict[str, Any] = {"vm": name}
    down = known.state in DOWN
    same = as_it_is(name, known)
    fresh = replace(same, state="RUNNING", wanted="RUNNING", pid="new")
    if method == "suspend" or known.state == "SUSPENDED":
        return plan_suspended(method, bool(force), name, known, new_name)
    if method in ("stop", "delete", "restart"):
        # A guest that is paused can't hear its power button.
        params |= {"force": bool(force), "timeout": 1 if known.state == "PAUSED" else 30}
    if method == "rename":
        params["name"] = new_name
    if method in ("stop", "delete", "rename"):
        off = replace(same, state=known.state if down else "STOPPED", wanted="STOPPED", pid="none")
        outcomes = {"stop": off, "delete": None, "rename": replace(same, name=new_name)}
        return Act(f"vm_{method}", params, name, outcomes[method])
    allowed = down if method == "start" else not down
    if not allowed:
        return Act(f"vm_{method}", params, name, same, is_refused=True)
    outcome = {
        "start": fresh,
        "restart": fresh,
        "pause": replace(same, state="PAUSED"),
        "resume": replace(same, state="RUNNING"),
    }[method]
    return Act(f"vm_{method}", params, name, outcome)


def plan_suspended(method: str, force: bool, name: str, known: Known, new_name: str) -> Act:
    """Say it of a vm that is suspended, or is to be."""
    is_suspended = known.state == "SUSPENDED"
    off = replace(as_it_is(name, known), state="SUSPENDED", wanted="STOPPED", pid="none")
    params: dict[str, Any] = {"vm": name}
    if method in ("stop", "delete", "restart"):
        params |= {"force": force}
    if method == "rename":
        params["name"] = new_name
    fresh = replace(off, state="RUNNING", wanted="RUNNING", pid="new")
    outcomes = {
        "suspend": off,
        "start": fresh,
        "resume": fresh,
        "stop": replace(off, state="STOPPED"),
        "rename": replace(off, name=new_name),
        "delete": None,
    }
    is_refused = method not in outcomes or (method == "stop" and not force)
    is_refused |= method == "suspend" and not is_suspended and known.state in DOWN
    return Act(f"vm_{method}", params, name, outcomes.get(method, off), is_refused=is_refused)


def plan_snapshot(verb: str, name: str, known: Known, pick: int, *, is_somebody: bool) -> Act:
    """Say it of a snapshot; `is_somebody` of a vm whose disk knows who it is."""
    method, _, option = verb.partition(" ")
    same = as_it_is(name, known)
    free = [each for each in SNAPSHOTS if each not in dict(known.snapshots)]
    if method == "snapshot" and free:
        kind = "memory" if option else "disk"
        params: dict[str, Any] = {"vm": name, "name": free[0], "memory": bool(option)}
        is_refused = known.state == "SUSPENDED" or not is_somebody
        is_refused |= bool(option) and (known.state in DOWN or bool(known.disks))
        outcome = replace(same, snapshots=(*known.snapshots, (free[0], kind)))
        return Act("snapshot_create", params, name, outcome, is_refused)
    snapshot = known.snapshots[pick % len(known.snapshots)]
    params = {"vm": name, "snapshot": snapshot[0]}
    if method != "restore":
        left = tuple(each for each in known.snapshots if each != snapshot)
        return Act("snapshot_delete", params, name, replace(same, snapshots=left))
    resumes = snapshot[1] == "memory"
    is_refused = resumes and bool(known.disks)
    is_refused |= not option and (known.state not in DOWN or known.state == "SUSPENDED")
    outcome = replace(same, state="STOPPED", wanted="STOPPED", pid="none")
    if resumes or known.state not in DOWN:
        outcome = replace(same, state="RUNNING", wanted="RUNNING", pid="new")
    return Act("snapshot_restore", params | {"force": bool(option)}, name, outcome, is_refused)


def plan_disk(verb: str, name: str, known: Known, disk: str) -> Act:
    """Say it of a disk that a vm is to have, or has and is to have no more."""
    same, params = as_it_is(name, known), {"vm": name, "disk": disk}
    if verb == "attach":
        disks = tuple(sorted((*known.disks, disk)))
    else:
        disks = tuple(each for each in known.disks if each != disk)
    is_refused = known.state == "SUSPENDED" or (verb == "detach" and known.state == "PAUSED")
    return Act(f"disk_{verb}", params, name, replace(same, disks=disks), is_refused)


def plan_disk_alone(disk: str, *, is_there: bool) -> Act:
    """Say it of a disk that is to be made, or to go."""
    if is_there:
        return Act("disk_delete", {"disk": disk}, "", None, disk=(disk, False))
    return Act("disk_create", {"name": disk, "size": "1M"}, "", None, disk=(disk, True))
