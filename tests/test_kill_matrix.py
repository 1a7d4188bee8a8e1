"""The daemon killed at every step, transaction, process start and write to disk of every operation.

Whatever it was killed in, the next daemon finishes it or undoes it, and nothing else remains. Steps
come from the program's own table: a new one is killed here without a line being written.
"""

import contextlib
import json
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from bad_images import qcow2
from cloud_accounts import Question, check_accounted, settle, settle_or_die, tail
from daemon_process import IMAGE, LIMIT_SECONDS
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_rpc_layers import fill_up
from test_rpc_templates import send

from oscloudd.cloud.layers import MAX_LAYERS
from oscloudd.cloud.operations import OPERATIONS

ADDRESS, OTHER_ADDRESS, COPY_ADDRESS = "192.168.7.7", "192.168.7.8", "192.168.7.9"
# Every so many-th transaction of a recovery is killed; `make kills` takes them all.
STRIDE = int(os.environ.get("OSCLOUD_KILL_STRIDE", "5"))
# More than any operation has of anything; beyond it, counting does not work.
MOST = 100
# What a daemon does on the side ends it in the place of a question now and then, not so often.
ATTEMPTS = 5
Asked = TypeVar("Asked")

Judge = Callable[[dict[str, Any], dict[str, Any]], bool]


@dataclass(frozen=True)
class Case:
    """One operation on the vm `web`: what is asked, of which vm, and which outcomes there are.

    `method` names the operation, too. `disk` is where the disk `data` is before it: attached, free,
    or not there; `nic` is attached where `web` has a card in the network `lab`. `is_finished`
    and `is_undone` judge the vms there are by name, the bystander left out, against `web` as it was
    before. `snapshots` are what it has of them, in that order, with `memory` taken while it ran.
    `before_it` is an operation on `web` that comes before the method's own. A vm that is `crowded`
    stands on as many layers as it may.
    """

    method: str
    params: dict[str, Any]
    before: str | None
    is_finished: Judge
    is_undone: Judge
    disk: str | None = None
    nic: str | None = None
    snapshots: tuple[str, ...] = ()
    memory: bool = False
    before_it: str = ""
    crowded: bool = False

    @property
    def operation(self) -> str:
        """The operation in which the daemon is to die at a step."""
        return self.before_it or self.method


def is_same(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return [vm["uuid"] for vm in now.values()] == [was["uuid"]]


def unchanged(now: dict[str, Any], was: dict[str, Any]) -> bool:
    keys = (
        "id", "name", "state", "wanted_state", "pid", "ip", "disk", "disks", "plugged", "nics",
        "nics plugged",
    )  # fmt: skip
    return is_same(now, was) and [now["web"][key] for key in keys] == [was[key] for key in keys]


def gone(now: dict[str, Any], _was: dict[str, Any]) -> bool:
    return now == {}


def runs(now: dict[str, Any], was: dict[str, Any]) -> bool:
    if "web" not in now:
        return False
    web = now["web"]
    return web["state"] == web["wanted_state"] == "RUNNING" and web["pid"] != was.get("pid")


def is_off(now: dict[str, Any], was: dict[str, Any]) -> bool:
    web = now["web"]
    told = "stopped by the user" in web["reason"]
    return is_same(now, was) and web["state"] == web["wanted_state"] == "STOPPED" and told


def is_suspended(now: dict[str, Any], was: dict[str, Any]) -> bool:
    web = now["web"]
    told = web["reason"] == "suspended by the user"
    return is_same(now, was) and (web["state"], web["wanted_state"]) == OFF and told


def has_new_name(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return list(now) == ["blog"] and now["blog"]["pid"] == was["pid"] and is_same(now, was)


def has_disk(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return is_same(now, was) and (now["web"]["disks"], now["web"]["plugged"]) == (
        {"data": 1 << 20},
        1,
    )


def has_no_disk(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return is_same(now, was) and (now["web"]["disks"], now["web"]["plugged"]) == ({}, 0)


def has_nics(*networks: str) -> Judge:
    """The vm has a card in each of these networks, and its qemu too if there is one."""

    def judge(now: dict[str, Any], was: dict[str, Any]) -> bool:
        web = now["web"]
        there = tuple(nic["network"] for nic in web["nics"])
        plugged = len(networks) - 1 if web["state"] == "RUNNING" else 0
        return is_same(now, was) and (there, web["nics plugged"]) == (networks, plugged)

    return judge


def has_two_nics(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return runs(now, was) and has_nics("default", "lab")(now, now["web"])


def has_larger_disk(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return is_same(now, was) and now["web"]["disks"] == {"data": 2 << 20}


def runs_on_disk(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return runs(now, was) and now["web"]["disk_size"] == 1 << 20


def has_snapshots(*names: str) -> Judge:
    """The vm goes on as it was, and has these snapshots, the last of which it stands on."""

    def judge(now: dict[str, Any], was: dict[str, Any]) -> bool:
        current = names[-1:]
        seen = now["web"]["snapshots"]
        there = tuple(each["name"] for each in seen)
        return unchanged(now, was) and there == names and tuple(current_of(seen)) == current

    return judge


def current_of(snapshots: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in snapshots if each["current"]]


def is_back(state: str) -> Judge:
    """The vm has the disk that it had when the snapshot `first` was taken."""

    def judge(now: dict[str, Any], was: dict[str, Any]) -> bool:
        web = now["web"]
        is_other = web["pid"] != was["pid"] or web["pid"] is None
        is_there = is_same(now, was) and web["state"] == state and is_other
        return is_there and current_of(web["snapshots"]) == ["first"]

    return judge


def is_alone(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return "copy" not in now and unchanged(now, was)


def has_copy(now: dict[str, Any], was: dict[str, Any]) -> bool:
    copy = now.get("copy", {})
    is_ready = copy.get("ready") and copy["state"] == copy["wanted_state"] == "RUNNING"
    return bool(is_ready) and unchanged({"web": now["web"]}, was)


OFF = ("SUSPENDED", "STOPPED")
# Operations that come before the one that is asked for, and are of use without it.
PREPARING = ("disk_freeze", "layers_merge")
COPYING = {"vm": "web", "name": "copy", "ip": COPY_ADDRESS}
FIRST = {"vm": "web", "snapshot": "first"}
CREATION = {
    "name": "web", "ip": ADDRESS, "mem_size": "64M", "disk_size": "16M", "wait": "ready",
    "publish": ["8080:80", "0.0.0.0:5353:53/udp"],
}  # fmt: skip
BY_CLOUD_INIT = {"image": "vendor", "mem_size": "128M", "disk_size": "64M"}
ON_DISK = {"name": "web", "ip": ADDRESS, "mem_size": "64M", "disk": "data", "wait": "ready"}
ON_WEB = {"vm": "web", "disk": "data"}
IN_LAB = {"vm": "web", "network": "lab"}
WITHOUT_LAB = {"vm": "web", "nic": "lab"}
CASES = {
    "vm_create": Case("vm_create", CREATION, None, runs, gone),
    "vm_create warm": Case("vm_create", CREATION | {"warm": "only"}, None, runs, gone),
    "vm_create warm, with cloud-init": Case(
        "vm_create", CREATION | BY_CLOUD_INIT | {"warm": "only"}, None, runs, gone
    ),
    "vm_start": Case("vm_start", {"vm": "web"}, "STOPPED", runs, unchanged),
    "vm_stop": Case("vm_stop", {"vm": "web"}, "RUNNING", is_off, unchanged),
    "vm_delete": Case("vm_delete", {"vm": "web"}, "RUNNING", gone, unchanged),
    "vm_rename": Case(
        "vm_rename", {"vm": "web", "name": "blog"}, "RUNNING", has_new_name, unchanged
    ),
    "vm_restart": Case("vm_restart", {"vm": "web"}, "RUNNING", runs, unchanged),
    "vm_suspend": Case("vm_suspend", {"vm": "web"}, "RUNNING", is_suspended, unchanged),
    "vm_start of a suspended vm": Case("vm_start", {"vm": "web"}, "SUSPENDED", runs, unchanged),
    "vm_stop of a suspended vm": Case(
        "vm_stop", {"vm": "web", "force": True}, "SUSPENDED", is_off, unchanged
    ),
    "vm_create on a disk": Case("vm_create", ON_DISK, None, runs_on_disk, gone, "free"),
    "vm_delete of a vm with a disk": Case(
        "vm_delete", {"vm": "web"}, "RUNNING", gone, unchanged, "attached"
    ),
    "vm_delete of a vm with snapshots": Case(
        "vm_delete", {"vm": "web"}, "STOPPED", gone, unchanged, snapshots=("first", "second")
    ),
    "vm_start with a disk": Case("vm_start", {"vm": "web"}, "STOPPED", runs, unchanged, "attached"),
    "disk_attach": Case("disk_attach", ON_WEB, "RUNNING", has_disk, unchanged, "free"),
    "disk_detach": Case("disk_detach", ON_WEB, "RUNNING", has_no_disk, unchanged, "attached"),
    "disk_resize": Case(
        "disk_resize",
        {"disk": "data", "size": "2M"},
        "RUNNING",
        has_larger_disk,
        unchanged,
        "attached",
    ),
    "nic_add": Case("nic_add", IN_LAB, "RUNNING", has_nics("default", "lab"), unchanged),
    "nic_add to a vm that is off": Case(
        "nic_add", IN_LAB, "STOPPED", has_nics("default", "lab"), unchanged
    ),
    "nic_delete": Case(
        "nic_delete", WITHOUT_LAB, "RUNNING", has_nics("default"), unchanged, nic="attached"
    ),
    "nic_delete of a vm that is off": Case(
        "nic_delete", WITHOUT_LAB, "STOPPED", has_nics("default"), unchanged, nic="attached"
    ),
    "vm_create with two cards": Case(
        "vm_create", CREATION | {"network": ["default", "lab"]}, None, has_two_nics, gone
    ),
    "vm_start with two cards": Case(
        "vm_start", {"vm": "web"}, "STOPPED", has_two_nics, unchanged, nic="attached"
    ),
    "vm_delete of a vm with two cards": Case(
        "vm_delete", {"vm": "web"}, "RUNNING", gone, unchanged, nic="attached"
    ),
    "snapshot_create": Case(
        "snapshot_create", {"vm": "web", "name": "a"}, "RUNNING", has_snapshots("a"), unchanged
    ),
    "snapshot_create of a vm that is off": Case(
        "snapshot_create", {"vm": "web", "name": "a"}, "STOPPED", has_snapshots("a"), unchanged
    ),
    "snapshot_create with memory": Case(
        "snapshot_create",
        {"vm": "web", "name": "a", "memory": True},
        "RUNNING",
        has_snapshots("a"),
        unchanged,
    ),
    "snapshot_restore with memory": Case(
        "snapshot_restore",
        FIRST | {"force": True},
        "RUNNING",
        is_back("RUNNING"),
        unchanged,
        snapshots=("first", "second"),
        memory=True,
    ),
    "snapshot_restore": Case(
        "snapshot_restore",
        FIRST,
        "STOPPED",
        is_back("STOPPED"),
        unchanged,
        snapshots=("first", "second"),
    ),
    "snapshot_restore of a running vm": Case(
        "snapshot_restore",
        FIRST | {"force": True},
        "RUNNING",
        is_back("RUNNING"),
        unchanged,
        snapshots=("first", "second"),
    ),
    "snapshot_delete": Case(
        "snapshot_delete",
        FIRST,
        "RUNNING",
        has_snapshots("second"),
        unchanged,
        snapshots=("first", "second"),
    ),
    "vm_clone": Case("vm_clone", COPYING, "RUNNING", has_copy, is_alone),
    "vm_clone of a vm that is off": Case("vm_clone", COPYING, "STOPPED", has_copy, is_alone),
    "vm_clone, while it freezes": Case(
        "vm_clone", COPYING, "RUNNING", has_copy, is_alone, before_it="disk_freeze"
    ),
    "snapshot_create, while it merges": Case(
        "snapshot_create",
        {"vm": "web", "name": "more"},
        "RUNNING",
        has_snapshots(*(f"s{number}" for number in range(1, MAX_LAYERS)), "more"),
        unchanged,
        before_it="layers_merge",
        crowded=True,
    ),
    "vm_delete with snapshots": Case(
        "vm_delete", {"vm": "web"}, "RUNNING", gone, unchanged, snapshots=("first", "second")
    ),
}
STEPS = [
    pytest.param(
        name,
        Death("step", number, when, case.operation),
        id=f"{name}-{when}-{step.name}-is-written",
    )
    for name, case in CASES.items()
    for number, step in enumerate(OPERATIONS[case.operation].steps, 1)
    for when in ("before", "after")
]


class Bench:
    """A cloud to kill daemons in; given a new one after a test that failed in it."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._stack = contextlib.ExitStack()
        self.box: ZygoteBox | None = None
        self.bystander: dict[str, Any] = {}

    def open(self) -> ZygoteBox:
        if self.box is None:
            self.box = ZygoteBox(self._binary)
            self.box.start()
            self.box.call("network_create", name="lab", subnet="10.77.0.0/24")
            for address in (ADDRESS, OTHER_ADDRESS, COPY_ADDRESS):
                self._stack.enter_context(self.box.sshd_at(address))
            send(self.box, BY_CLOUD_INIT["image"], qcow2())
            for creation in (CREATION, {**CREATION, **BY_CLOUD_INIT}):
                shape = {name: creation[name] for name in ("mem_size", "disk_size")}
                template = creation.get("image", IMAGE)
                self.box.call("template_warm", template=template, **shape)
            self.bystander = self.box.create("shop", ip=OTHER_ADDRESS, wait="ready")
        return self.box

    def discard(self) -> None:
        if self.box is not None:
            self._stack.close()
            self.box.discard()
            self.box = None

    def close(self) -> None:
        if self.box is not None:
            self._stack.close()
            self.box.close()


@pytest.fixture(scope="module")
def bench(fake_qemu_binary: Path) -> Iterator[Bench]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    bench = Bench(fake_qemu_binary)
    yield bench
    bench.close()


def others(box: ZygoteBox) -> dict[str, Any]:
    """Give the vms but the bystander, with their snapshots and data disks, and those qemu has."""
    disks = [disk for disk in box.call("disk_list") if disk["role"] == "data"]
    found = {vm["name"]: vm for vm in box.call("vm_list") if vm["name"] != "shop"}
    for name, vm in found.items():
        vm["snapshots"] = box.call("snapshot_list", vm=vm["id"])
        vm["disks"] = {disk["name"]: disk["size"] for disk in disks if disk["vm"] == name}
        vm["plugged"] = count_plugged(box, vm, r"data\d+-device")
        vm["nics plugged"] = count_plugged(box, vm, r"nic\d+")
    return found


def count_plugged(box: ZygoteBox, vm: dict[str, Any], pattern: str) -> int:
    if vm["state"] != "RUNNING":
        return 0
    where = {"path": "/machine/peripheral"}
    call = {"vm": vm["id"], "command": "qom-list", "arguments": where}
    names = [each["name"] for each in box.call("vm_qemu_command", **call)]
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def prepare(box: ZygoteBox, case: Case) -> dict[str, Any]:
    """Have `web` as the case wants it; give it as it is."""
    for vm in others(box).values():
        if vm["name"] != "web" or case.before is None or vm["os"] == BY_CLOUD_INIT["image"]:
            box.call("vm_delete", vm=vm["id"], force=True)
    prepare_disk(box, case)
    if case.before is None:
        return {}
    web = others(box).get("web")
    if web and box.call("disk_info", disk=web["disk"])["layers"] > MAX_LAYERS // 2:
        box.call("vm_delete", vm="web", force=True)
        web = None
    web = web or box.call("vm_create", **CREATION)
    prepare_snapshots(box, case, web)
    web = others(box)["web"]
    prepare_nic(box, case, web)
    if case.disk == "attached":
        box.call("disk_attach", **ON_WEB)
    if case.before == "STOPPED":
        box.call("vm_stop", vm="web", force=True)
    elif web["state"] != "RUNNING":
        box.call("vm_start", vm="web")
        box.wait("web", "ready")  # from then on no transaction is anybody else's
    in_memory = remembered(box) if case.before != "STOPPED" else None
    written = None
    if case.before == "RUNNING":
        written = box.call("vm_qemu_command", vm="web", command="x-runs")
    if case.before == "SUSPENDED":
        box.call("vm_suspend", vm="web")
    web = others(box)["web"]
    assert web["state"] == case.before, web
    return {**web, "in memory": in_memory, "written": written}


def prepare_snapshots(box: ZygoteBox, case: Case, web: dict[str, Any]) -> None:
    """Have the snapshots of `web` as the case wants them, with something written after each."""
    if case.crowded:
        box.call("vm_delete", vm="web", force=True)
        vm = box.call("vm_create", **CREATION)
        knows = "SELECT 1 FROM vm WHERE id = ? AND seed_document = ''"
        box.until(lambda: bool(box.rows(knows, vm["id"])), "the guest's disk to know who it is")
        fill_up(box)
        return
    seen = web.get("snapshots", [])
    there = tuple(each["name"] for each in seen)
    kinds = {each["kind"] for each in seen} <= {"memory" if case.memory else "disk"}
    if there == case.snapshots and kinds and current_of(seen) == [*case.snapshots[-1:]]:
        return
    if there:  # what they were stays below the disk
        box.call("vm_delete", vm="web", force=True)
        box.call("vm_create", **CREATION)
    for name in case.snapshots:
        if not case.memory:
            box.call("vm_stop", vm="web", force=True)
        box.call("snapshot_create", vm="web", name=name, memory=case.memory)
        box.call("vm_restart" if case.memory else "vm_start", vm="web")
        box.wait("web", "ready")


def prepare_nic(box: ZygoteBox, case: Case, web: dict[str, Any]) -> None:
    """Have a card of `web` in the network `lab`, or none."""
    has_it = len(web["nics"]) > 1
    if has_it == (case.nic == "attached"):
        return
    if web["state"] == "SUSPENDED":
        box.call("vm_stop", vm="web", force=True)
    box.call("nic_delete", **WITHOUT_LAB) if has_it else box.call("nic_add", **IN_LAB)


def prepare_disk(box: ZygoteBox, case: Case) -> None:
    """Have a fresh disk `data` that no vm has, or none."""
    for disk in box.call("disk_list"):
        if disk["name"] == "data":
            if disk["role"] == "root":
                box.call("vm_delete", vm=disk["vm"], force=True)
            elif disk["vm"] is not None:
                if box.call("vm_info", vm=disk["vm"])["state"] == "SUSPENDED":
                    box.call("vm_stop", vm=disk["vm"], force=True)
                box.call("disk_detach", vm=disk["vm"], disk="data")
            box.call("disk_delete", disk="data")
    if case.disk is not None:
        box.call("disk_create", name="data", template=IMAGE)


def remembered(box: ZygoteBox) -> Any:
    """Give what the guest of `web` has in memory and nowhere else."""
    return box.call("vm_qemu_command", vm="web", command="x-memory")


def check_memory(box: ZygoteBox, case: Case, was: dict[str, Any]) -> None:
    """Assert that a guest that was suspended, or was to be, has lost nothing."""
    web = others(box).get("web", {})
    state = web.get("state")
    if case.memory and current_of(web["snapshots"]) == ["first"]:
        assert remembered(box) == kept_memory(box, web)
    elif case.method == "snapshot_create" and case.before == "RUNNING":
        assert remembered(box) == was["in memory"]
    if "SUSPENDED" in (case.before, state) or case.method == "vm_suspend":
        if state == "SUSPENDED":
            box.call("vm_resume", vm="web")
        if state != "STOPPED":
            assert remembered(box) == was["in memory"]


def kept_memory(box: ZygoteBox, web: dict[str, Any]) -> Any:
    """Give what the guest had in memory at its first snapshot, as the fake qemu has saved it."""
    order = "SELECT layer_id FROM snapshot WHERE vm_id = ? ORDER BY id"
    layer = box.rows(order, web["id"])[0][0]
    state = box.root / f"state/layers/{layer}/memory/state"
    return json.loads(state.read_bytes())["memory"]


def kill_at(
    bench: Bench, kind: str, death: Death, again: Death | None = None, *, with_qemu: bool = False
) -> bool:
    """Ask for an operation, have the daemon die there, and look what the next one makes of it.

    With `again` that one is to die there, too, counted from its start. With `with_qemu` the vm's
    qemu dies with the daemon. False when a daemon had come to rest before it was to die.
    """
    box, case = bench.open(), CASES[kind]
    try:
        was = prepare(box, case)
        last_job = box.rows("SELECT COALESCE(MAX(id), 0) FROM job")[0][0]
        question, died = ask_to_die(box, death, case.method, **case.params)
        if died and again is not None:
            wait_for_death(box)
            died = not (box.start_or_die(again) and settle_or_die(box)) or is_dead(box)
        if died:
            wait_for_death(box)
            if with_qemu and has_steps_left(box, case):
                kill_qemus(box, but=bench.bystander["pid"])
            box.start()
        settle(box)
        check_accounted(box)
        answered = question.is_answered
        judge(box, case, was, last_job, must_be_finished=answered, may_fail=with_qemu)
        if not died and "warm" in case.params:
            assert others(box)["web"]["started"] == "warm"
        if not with_qemu:
            check_memory(box, case, was)
        assert box.call("vm_info", vm="shop")["pid"] == bench.bystander["pid"]
        if not others(box):
            box.call("vm_create", **CREATION)
            check_accounted(box)
    except BaseException:
        print(f"{kind}: {death}, {again}\n{tail(box)}")
        bench.discard()
        raise
    return died


def ask_to_die(box: ZygoteBox, death: Death, method: str, **params: Any) -> tuple[Question, bool]:
    """Ask for what the daemon is to die in; give the question, and whether it did or will."""
    with armed(box, death, lambda: Question(box, method, **params)) as question:
        question.read()
    assert question.error is None, question.error
    return question, is_dead(box) or not question.is_answered


def armed(box: ZygoteBox, death: Death, ask: Callable[[], Asked]) -> Asked:
    """Arm the daemon and ask it; anew where what it does on the side had it die before."""
    for _ in range(ATTEMPTS):
        box.arm(death)
        try:
            return ask()
        except ConnectionError:
            wait_for_death(box)
            box.start()
            settle(box)
    raise AssertionError(f"the daemon dies on the side at {death}, each time")


def count_deaths(kill: Callable[[int], bool], stride: int = 1) -> int:
    """Kill at number 1, and on by `stride`, until a daemon comes to rest before; give the last."""
    number = 1
    while kill(number):
        number += stride
        assert number < MOST
    return number - stride


def is_dead(box: ZygoteBox) -> bool:
    """Tell whether the daemon has died; from here on it will not."""
    if box.daemon.poll() is None:
        box.arm(None)
    return box.daemon.poll() is not None


def wait_for_death(box: ZygoteBox) -> None:
    assert box.daemon.wait(LIMIT_SECONDS) == -signal.SIGKILL


def has_steps_left(box: ZygoteBox, case: Case) -> bool:
    last = len(OPERATIONS[case.method].steps)
    return bool(box.rows("SELECT id FROM job WHERE state = 'RUNNING' AND step < ?", last))


def kill_qemus(box: ZygoteBox, *, but: int) -> None:
    for pid in {*box.qemus()} - {but}:
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], LIMIT_SECONDS)[0]
        os.close(pidfd)


def judge(
    box: ZygoteBox,
    case: Case,
    was: dict[str, Any],
    last_job: int,
    *,
    must_be_finished: bool,
    may_fail: bool = False,
) -> None:
    """Assert that the operation is finished or undone, and that its job says which.

    What else than the daemon's end may undo it, too, is told by a job that FAILED.
    """
    now = others(box)
    jobs = box.rows("SELECT kind, state, message FROM job WHERE id > ? ORDER BY id", last_job)
    finished = case.is_finished(now, was)
    assert finished or case.is_undone(now, was), (now, was, jobs)
    assert finished or not must_be_finished, (now, was, jobs)
    jobs = [job for job in jobs if job[:2] not in [(kind, "DONE") for kind in PREPARING]]
    # The rename of a database that never came to know of it has no job; nor has any other.
    expected = [(case.method, "DONE", "")] if finished else []
    is_told = may_fail and [job[:2] for job in jobs] == [(case.method, "FAILED")]
    assert jobs == expected or (is_told and not finished), (jobs, now)
    if case.before is None and finished:
        assert now["web"]["ready"], now


def test_every_operation_is_killed() -> None:
    assert {case.operation for case in CASES.values()} == set(OPERATIONS)


@pytest.mark.parametrize(("kind", "death"), STEPS)
def test_killed_at_a_step(bench: Bench, kind: str, death: Death) -> None:
    assert kill_at(bench, kind, death), "the step was not reached"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "process", "renaming", "durable"])
@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if not case.before_it])
def test_killed_at_every(bench: Bench, kind: str, at: str, when: str) -> None:
    deaths = count_deaths(lambda number: kill_at(bench, kind, Death(at, number, when)))
    print(f"{kind}: killed {when} {deaths} {at}(s)")


@pytest.mark.parametrize("at", ["transaction", "process"])
def test_killed_with_the_qemu_of_a_warm_vm(bench: Bench, at: str) -> None:
    # What a clone has written by then does not go with the memory it began with.
    def kill(number: int) -> bool:
        return kill_at(bench, "vm_create warm", Death(at, number, "after"), with_qemu=True)

    print(f"killed with its qemu after {count_deaths(kill)} {at}(s)")


@pytest.mark.parametrize("kind", CASES)
def test_killed_at_transactions_of_the_recovery(bench: Bench, kind: str) -> None:
    first_step = Death("step", 1, "before", CASES[kind].operation)

    def kill(number: int) -> bool:
        return kill_at(bench, kind, first_step, Death("transaction", number, "after"))

    print(f"{kind}: killed after transactions 1 to {count_deaths(kill, STRIDE)} of the recovery")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "durable"])
@pytest.mark.parametrize("kind", ["vm_suspend", "vm_start of a suspended vm"])
def test_power_cut_at_every(bench: Bench, kind: str, at: str, when: str) -> None:
    """The guest goes on from its memory, or it has crashed and the memory is gone with it.

    The fake qemu tells when it is given a memory that does not go with its disk.
    """
    ends = cut_power_everywhere(bench, kind, at, when, judge_power_cut)
    assert at == "durable" or ends.get("went on", 0) > 0, ends


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "renaming", "durable"])
@pytest.mark.parametrize(
    "kind", ["snapshot_create", "snapshot_create with memory", "snapshot_delete"]
)
def test_a_power_cut_loses_nothing_of_a_frozen_disk(
    bench: Bench, kind: str, at: str, when: str
) -> None:
    cut_power_everywhere(bench, kind, at, when, judge_frozen)


def judge_frozen(box: ZygoteBox, was: dict[str, Any]) -> str:
    box.call("vm_start", vm="web")
    written = box.call("vm_qemu_command", vm="web", command="x-runs")
    # A guest that was saved with its memory may have gone on before.
    assert written - was["written"] in (1, 2), (written, was)
    return "whole" if others(box)["web"]["snapshots"] else "none"


PowerJudge = Callable[[ZygoteBox, dict[str, Any]], str]


def cut_power_everywhere(
    bench: Bench, kind: str, at: Any, when: Any, judge: PowerJudge
) -> dict[str, int]:
    """Cut the power at number 1, 2 and on, until nothing dies; count what became of it."""
    ends: dict[str, int] = {}
    number = 1
    while (end := cut_power_at(bench, kind, Death(at, number, when), judge)) is not None:
        ends[end] = ends.get(end, 0) + 1
        number += 1
        assert number < MOST
    print(f"{kind}: power cut {when} {number - 1} {at}(s): {ends}")
    return ends


def cut_power_at(bench: Bench, kind: str, death: Death, judge: PowerJudge) -> str | None:
    """Have daemon and qemu die there; say what became of the guest, None if neither died."""
    box, case = bench.open(), CASES[kind]
    try:
        was = prepare(box, case)
        box.arm(death)
        with Question(box, case.method, **case.params) as question:
            question.read()
        if not is_dead(box) and question.is_answered:
            return None
        wait_for_death(box)
        for pid in set(box.qemus()) - {bench.bystander["pid"]}:
            os.kill(pid, signal.SIGKILL)
        box.start()
        settle(box)
        check_accounted(box)
        return judge(box, was)
    except BaseException:
        print(f"{kind}: {death}\n{tail(box)}")
        bench.discard()
        raise


def judge_power_cut(box: ZygoteBox, was: dict[str, Any]) -> str:
    web = others(box)["web"]
    if web["state"] == "SUSPENDED":
        box.call("vm_resume", vm="web")
    if web["state"] in ("SUSPENDED", "RUNNING"):
        assert remembered(box) == was["in memory"]
        return "went on"
    assert web["state"] in ("STOPPED", "CRASHED", "ERROR"), web
    assert web["reason"], web
    box.call("vm_start", vm="web")
    return "crashed"
