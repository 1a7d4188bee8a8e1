"""What a cloud must be like, whoever was killed: a model of its vms, and what accounts for what.

The model is a dict of vms by name. Hypothesis drives it and a cloud side by side: whatever a user
was told stays true, and what a daemon died in is finished or undone. `check_accounted` compares all
traces of vms on the host with what the vms in the list account for.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from daemon_process import Box, Line, RpcError
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from fake_qemu import install_fake_qemu
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

SETTLE_SECONDS = 20.0
DOWN = ("STOPPED", "CRASHED", "ERROR")


def tail(box: Box, characters: int = 5000) -> str:
    """Give the end of the daemons' log, without who has asked for what."""
    lines = box.log()[-10 * characters :].splitlines(keepends=True)
    return "".join(line for line in lines if " oscloudd.api." not in line)[-characters:]


# What there must be


def expected_traces(box: Box) -> dict[str, Any]:
    """Give what `Box.traces` must find when the vms of the list are all there is."""
    vms = box.call("vm_list")
    taps = dict(box.rows("SELECT id, tap_interface_idx FROM vm"))
    live = [vm for vm in vms if vm["pid"] is not None]
    logs = [f"log/vm-{vm['id']}{kind}.log" for vm in vms for kind in ("", ".console")]
    expected: dict[str, Any] = {
        "vm rows": sorted((vm["id"], vm["name"]) for vm in vms),
        "disk rows": sorted(vm["disk"] for vm in vms),
        "taps": sorted(f"osctap{taps.get(vm['id'])}" for vm in live),
        "addresses": sorted(vm["ip"] for vm in live),
        "ports": sorted(f"127.0.0.1:{vm['serial_port']}" for vm in live),
        "processes": sorted(vm["pid"] for vm in live),
        "run directories": sorted(f"run/vms/{vm['id']}" for vm in live),
        "disks": sorted(f"state/disks/{vm['disk']}" for vm in vms),
        "logs": sorted(logs),
    }
    return {name: what for name, what in expected.items() if what}


def seen_traces(box: Box) -> dict[str, Any]:
    """Give what there is, without what tests themselves have put there."""
    seen = box.traces()
    down = {vm["ip"] for vm in box.call("vm_list") if vm["pid"] is None}
    seen["vm rows"] = sorted(seen.get("vm rows", []))
    seen["disk rows"] = sorted(number for number, _name in seen.get("disk rows", []))
    # A vm that is down keeps its address, and its neighbour entry may stay.
    seen["addresses"] = [ip for ip in seen.get("addresses", []) if ip not in down]
    # Stand-ins for sshd; the telnet ports are all on one address.
    seen["ports"] = [port for port in seen.get("ports", []) if not port.endswith(":22")]
    return {name: what for name, what in seen.items() if what}


def check_accounted(box: Box) -> None:
    """Assert that everything on the host belongs to a vm of the list, and that nothing is missing.

    What ends a moment after the answer about it gets that moment.
    """
    end = time.monotonic() + 10
    while (seen := seen_traces(box)) != (expected := expected_traces(box)):
        if time.monotonic() > end:
            names = sorted({*seen, *expected})
            wrong = {
                name: {"seen": seen.get(name), "expected": expected.get(name)}
                for name in names
                if seen.get(name) != expected.get(name)
            }
            raise AssertionError(f"{wrong}\n{tail(box)}")
        time.sleep(0.01)


def is_settled(box: Box) -> bool:
    """Tell whether there is nothing under way, neither a job nor a state to leave."""
    busy = "SELECT id FROM job WHERE state = 'RUNNING'"
    moving = "SELECT id FROM vm WHERE state IN ('CREATING', 'STARTING', 'STOPPING', 'DELETING')"
    return not box.rows(busy) and not box.rows(moving)


def settle_or_die(box: Box, limit_seconds: float = SETTLE_SECONDS) -> bool:
    """Wait until the daemon has nothing to do any more; False when it has died before."""
    end = time.monotonic() + limit_seconds
    while not is_settled(box):
        if box.daemon is not None and box.daemon.poll() is not None:
            return False
        if time.monotonic() > end:
            jobs = box.rows("SELECT * FROM job WHERE state = 'RUNNING'")
            vms = box.rows("SELECT id, name, state, reason FROM vm")
            raise AssertionError(f"does not settle: {jobs} {vms}\n{tail(box)}")
        time.sleep(0.003)
    return True


def settle(box: Box, limit_seconds: float = SETTLE_SECONDS) -> None:
    """Wait until the daemon has nothing to do any more."""
    assert settle_or_die(box, limit_seconds), tail(box)


# Asking a daemon that may die


class Question:
    """One request under way; what there is of an answer can be read after the daemon's death."""

    def __init__(self, box: Box, method: str, **params: Any) -> None:
        self.what = f"{method} {params}"
        self.line = Line(box.socket_path)
        self.result: Any = None
        self.error: RpcError | None = None
        self.is_answered = False
        self.progress = 0
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": 7}
        self.line.send(json.dumps(request).encode() + b"\n")

    def __enter__(self) -> "Question":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.line.__exit__()

    def read(self, *, until_progress: int | None = None) -> bool:
        """Read to the answer, or so many notifications of progress; False at the line's end."""
        while not self.is_answered and self.progress != until_progress:
            try:
                message = self.line.receive()
            except (AssertionError, ConnectionError):  # cut off
                return False
            if message.get("method") == "progress":
                self.progress += 1
                continue
            self.is_answered = True
            self.result = message.get("result")
            if "error" in message:
                self.error = RpcError(message["error"])
        return True


# The model


@dataclass(frozen=True)
class Known:
    """What its user knows of a vm."""

    state: str
    wanted: str
    pid: int | None
    uuid: str

    @classmethod
    def of(cls, vm: dict[str, Any]) -> "Known":
        return cls(vm["state"], vm["wanted_state"], vm["pid"], vm["uuid"])


@dataclass(frozen=True)
class Outcome:
    """What a vm is when something has been done to it; `pid` is "same", "new" or "none"."""

    name: str
    state: str
    wanted: str
    pid: str

    def is_met(self, was: Known | None, now: dict[str, Known]) -> bool:
        vm = now.get(self.name)
        if vm is None or (vm.state, vm.wanted) != (self.state, self.wanted):
            return False
        if was is not None and vm.uuid != was.uuid:
            return False
        before = was.pid if was is not None else None
        if self.pid == "new":
            return vm.pid is not None and vm.pid != before
        return vm.pid == (before if self.pid == "same" else None)


@dataclass(frozen=True)
class Act:
    """Something a user does to the vm `name`: what follows, None where that is its end."""

    method: str
    params: dict[str, Any]
    name: str
    outcome: Outcome | None
    is_refused: bool = False


Moment = tuple[str, int]
VERBS = (
    "create", "start", "stop", "stop --force", "pause", "resume", "restart", "delete",
    "delete --force", "rename",
)  # fmt: skip


def plan(verb: str, name: str, known: Known, new_name: str) -> Act:
    """Say what is asked for and what must come of it."""
    method, _, force = verb.partition(" ")
    params: dict[str, Any] = {"vm": name}
    down = known.state in DOWN
    same = Outcome(name, known.state, known.wanted, "none" if down else "same")
    fresh = replace(same, state="RUNNING", wanted="RUNNING", pid="new")
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


@dataclass
class Arena:
    """Where the machine plays: a cloud, made anew when a play in it failed, and the score.

    `addresses` are those of guests that answer as an sshd does; `longest_wait_us` bounds the wait
    before a kill.
    """

    open_box: Any
    names: tuple[str, ...]
    creation: dict[str, Any]
    longest_wait_us: int
    box: ZygoteBox = field(init=False)
    kills: Counter[str] = field(default_factory=Counter)
    wanted_kills: int = 1
    failure: BaseException | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _is_open: bool = False

    @property
    def is_over(self) -> bool:
        """Whether enough have been killed: the rest of the steps that were drawn does nothing."""
        return self.failure is not None or self.kills.total() >= self.wanted_kills

    def address(self, name: str) -> str:
        return f"192.168.7.{10 + self.names.index(name)}"

    def ensure_open(self) -> None:
        if not self._is_open:
            self.box = self.open_box()
            self._is_open = True
            self.box.start()
            if "image" not in self.creation:
                for name in self.names:
                    self._stack.enter_context(self.box.sshd_at(self.address(name)))

    def discard(self) -> None:
        if self._is_open:
            self._is_open = False
            self._stack.close()
            self.box.discard()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._stack.close()
            self.box.close()


picks = st.integers(0, 9)
moments = st.one_of(
    st.tuples(st.just("time"), st.integers(0, 1000)),
    st.tuples(st.just("progress"), st.integers(1, 8)),
    st.tuples(st.sampled_from(["before", "after"]), st.integers(1, 30)),
)
# One more daemon killed before it has recovered: a job that a third one dies in is given up.
again = st.one_of(st.none(), st.integers(0, 1000))


def goes_on(machine: Any) -> bool:
    return not machine.arena.is_over


class CloudMachine(RuleBasedStateMachine):
    """Plays with the vms of an arena; subclasses say which. Nothing is shrunk: time matters."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Known] = {}
        self.addresses: dict[str, str] = {}
        self.story: list[str] = []

    @initialize()
    def begin(self) -> None:
        self.arena.ensure_open()
        self.box = self.arena.box

    # What a user does

    @precondition(goes_on)
    @rule(verb=st.sampled_from(VERBS), pick=picks)
    def do(self, verb: str, pick: int) -> None:
        with self.telling(f"{verb} {pick}"):
            act = self.choose(verb, pick)
            with self.ask(act) as question:
                assert question.read(), tail(self.box)
            self.learn(act, question)

    @precondition(goes_on)
    @rule(verb=st.sampled_from(VERBS), pick=picks, moment=moments, again=again)
    def kill_the_daemon_doing(
        self, verb: str, pick: int, moment: Moment, again: int | None
    ) -> None:
        with self.telling(f"{verb} {pick}, killed at {moment} and {again}"):
            act = self.choose(verb, pick)
            if moment[0] in ("before", "after"):
                self.box.arm(Death("transaction", moment[1], moment[0]))
            with self.ask(act) as question:
                self.wait_for(moment, question)
                self.kill(verb)
                question.read()
            self.recover(again)
            self.learn(act, question)

    kill_the_daemon_doing_something = kill_the_daemon_doing
    kill_the_daemon_doing_that = kill_the_daemon_doing

    @precondition(goes_on)
    @rule(again=again, pick=picks, qemu_too=st.booleans())
    def kill_the_idle_daemon(self, again: int | None, pick: int, qemu_too: bool) -> None:
        with self.telling(f"killed at rest and {again}, qemu {pick} too: {qemu_too}"):
            self.kill("nothing")
            if qemu_too and self.model:
                self.kill_qemu(self.pick(pick))
            self.recover(again)
            self.look()

    # What happens to vms

    @precondition(lambda self: self.model and goes_on(self))
    @rule(pick=picks)
    def qemu_dies(self, pick: int) -> None:
        with self.telling(f"qemu of {pick} dies"):
            name = self.pick(pick)
            if self.kill_qemu(name):
                self.box.wait(name, "CRASHED")
            self.look()

    @precondition(lambda self: self.model and goes_on(self))
    @rule(pick=picks)
    def guest_powers_off(self, pick: int) -> None:
        name = self.pick(pick)
        known = self.model[name]
        if known.state == "RUNNING":
            with self.telling(f"{name} powers off"):
                self.box.call("vm_wait", vm=name, state="ready", timeout=SETTLE_SECONDS)
                self.box.call("vm_qemu_command", vm=name, command="system_powerdown")
                self.box.wait(name, "STOPPED")
                self.model[name] = replace(known, state="STOPPED", wanted="STOPPED", pid=None)
                self.look()

    @precondition(lambda self: not goes_on(self))
    @rule()
    def rest(self) -> None:
        """Take up the steps that are left over."""

    def teardown(self) -> None:
        if self.arena._is_open:
            with self.telling("the end"):
                for name in list(self.model):
                    self.box.call("vm_delete", vm=name, force=True)
                    del self.model[name]
                settle(self.box)
                self.look()

    # How it is done

    @contextlib.contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Note a step; after a failure the arena is not fit for another play."""
        self.story.append(what)
        try:
            yield
        except BaseException as error:
            self.arena.failure = error
            print(*self.story, tail(self.box), sep="\n")
            self.arena.discard()
            raise

    def pick(self, number: int) -> str:
        names = sorted(self.model)
        return names[number % len(names)]

    def choose(self, verb: str, pick: int) -> Act:
        """Turn what was drawn into something that can be asked for now."""
        free = [name for name in self.arena.names if name not in self.model]
        if not self.model or (verb == "create" and free):
            return self.plan_creation(free[pick % len(free)])
        if verb == "create" or (verb == "rename" and not free):
            verb = "delete"
        name = self.pick(pick)
        act = plan(verb, name, self.model[name], free[pick % len(free)] if free else "")
        self.story.append(f"  {act.method} {act.params} of {self.model[name]}")
        return act

    def plan_creation(self, name: str) -> Act:
        taken = set(self.addresses.values())
        every = [self.arena.address(each) for each in self.arena.names]
        address = next(each for each in every if each not in taken)
        self.story.append(f"  create {name} at {address}")
        params = {"name": name, "ip": address, **self.arena.creation}
        return Act("vm_create", params, name, Outcome(name, "RUNNING", "RUNNING", "new"))

    def ask(self, act: Act) -> Question:
        return Question(self.box, act.method, **act.params)

    def wait_for(self, moment: Moment, question: Question) -> None:
        kind, number = moment
        if kind == "time":
            # Half of them within the first tenth: that is where most happens.
            time.sleep(self.arena.longest_wait_us * (number / 1000) ** 3 / 1e6)
        elif kind == "progress":
            question.read(until_progress=number)
        else:
            question.read()

    def kill(self, doing: str) -> None:
        self.box.daemon.kill()
        assert self.box.daemon.wait(10) == -signal.SIGKILL
        self.arena.kills[doing] += 1

    def recover(self, again: int | None) -> None:
        """Start a daemon, perhaps one more that is killed before; wait until it has settled."""
        if again is not None:
            self.box.daemon = self.box.spawn()
            time.sleep(0.15 * again / 1000)
            self.kill("recovery")
        self.box.start()
        settle(self.box)
        # A vm shows what the last daemon knew of it until this one has taken hold of its qemu.
        check_accounted(self.box)

    def kill_qemu(self, name: str) -> bool:
        """Kill a vm's qemu and wait for its end; False when it has none."""
        known = self.model[name]
        if known.pid is None:
            return False
        pidfd = os.pidfd_open(known.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        self.model[name] = replace(known, state="CRASHED", pid=None)
        return True

    def learn(self, act: Act, question: Question) -> None:
        """Judge what came of it, and take into the model which of its outcomes it was."""
        was = self.model.get(act.name)
        settle(self.box)
        now = {vm["name"]: Known.of(vm) for vm in self.box.call("vm_list")}
        what = f"{act} of {was}: answered {question.result or question.error}, now {now}"
        if act.outcome is None:
            mine = {name: vm for name, vm in now.items() if was and vm.uuid == was.uuid}
            is_finished = not mine
        else:
            is_finished = act.outcome.is_met(was, now)
        is_undone = now.get(act.name) == was
        if question.error is not None:
            assert act.is_refused, what
            assert question.error.kind == "invalid_state", what
            assert is_undone, what
        elif question.is_answered:
            assert not act.is_refused, what
            assert is_finished, what
        else:
            assert is_finished or is_undone, what
        self.model.pop(act.name, None)
        address = self.addresses.pop(act.name, act.params.get("ip", ""))
        name = act.outcome.name if act.outcome is not None and is_finished else act.name
        if name in now:
            self.model[name] = now[name]
            self.addresses[name] = address
        self.look()

    def look(self) -> None:
        """Assert that the vms are as the model has them, and nothing else is anywhere."""
        now = {vm["name"]: Known.of(vm) for vm in self.box.call("vm_list")}
        assert now == self.model, (now, self.model)
        check_accounted(self.box)


# Playing


class RealBox(ZygoteBox):
    """A box with the real qemu and the guest `tiny`."""

    def __init__(self) -> None:
        binary = shutil.which("qemu-system-x86_64")
        assert binary is not None
        super().__init__(Path(binary))
        template = tiny_template()
        shutil.copytree(template, self.root / "state/templates/tiny")


def tiny_template() -> Path:
    """Give the built template `tiny`; builds it if nobody has."""
    from guest_cloud import _kept_path, open_cloud

    if not _kept_path("tiny").exists():
        with open_cloud("tiny"):
            pass
    return _kept_path("tiny")


@contextlib.contextmanager
def fake_arena(binary: Path) -> Iterator[Arena]:
    creation = {"mem_size": "64M", "disk_size": "16M", "wait": "ready"}
    names = ("web", "shop", "blog", "mail")
    with closing(Arena(lambda: ZygoteBox(binary), names, creation, 200_000)) as arena:
        yield arena


@contextlib.contextmanager
def real_arena() -> Iterator[Arena]:
    creation = {"image": "tiny", "mem_size": "256M", "disk_size": "1G", "wait": "ready"}
    with closing(Arena(RealBox, ("web", "shop", "blog"), creation, 6_000_000)) as arena:
        yield arena


@contextlib.contextmanager
def closing(arena: Arena) -> Iterator[Arena]:
    try:
        yield arena
    except BaseException:
        arena.discard()
        raise
    arena.close()


def play(arena: Arena, kills: int, seed: int) -> None:
    """Play until so many daemons have been killed; what is drawn depends on the seed only."""
    print(f"seed {seed}: at least {kills} kills", flush=True)
    rules = settings(
        max_examples=10,
        stateful_step_count=40,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    arena.wanted_kills = kills
    batch = 0
    while not arena.is_over:
        machine = type("Machine", (CloudMachine,), {"arena": arena})
        try:
            run_state_machine_as_test(seeded(seed * 1000 + batch)(machine), settings=rules)
        except BaseException as error:
            # Hypothesis tries again what has failed, and finds it flaky: the instant was another.
            raise (arena.failure or error) from None
        batch += 1
    print(f"seed {seed}: {arena.kills.total()} kills: {dict(arena.kills.most_common())}")


def main() -> None:
    """Do what `make kills` promises."""
    parser = argparse.ArgumentParser(description="Kill the daemon at random, very often.")
    parser.add_argument("--fake", type=int, default=1000, help="kills with the fake qemu")
    parser.add_argument("--real", type=int, default=30, help="kills with real guests")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    begun = time.monotonic()
    with install_fake_qemu() as binary, fake_arena(binary) as arena:
        play(arena, options.fake, options.seed)
    print(f"fake qemu: {time.monotonic() - begun:.0f} s", flush=True)
    begun = time.monotonic()
    with real_arena() as arena:
        play(arena, options.real, options.seed)
    print(f"real qemu: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
