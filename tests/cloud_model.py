"""A model of a cloud, a dict of vms by name, which hypothesis drives side by side with a cloud.

Whatever a user was told stays true, and what a daemon died in is finished or undone; which of the
two, the model learns from the cloud.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cloud_accounts import SETTLE_SECONDS, Question, check_accounted, settle, tail
from dying_daemon import Death
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

DOWN = ("STOPPED", "SUSPENDED", "CRASHED", "ERROR")


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
    "delete --force", "rename", "suspend",
)  # fmt: skip


def plan(verb: str, name: str, known: Known, new_name: str) -> Act:
    """Say what is asked for and what must come of it."""
    method, _, force = verb.partition(" ")
    params: dict[str, Any] = {"vm": name}
    down = known.state in DOWN
    same = Outcome(name, known.state, known.wanted, "none" if down else "same")
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
    off = Outcome(name, "SUSPENDED", "STOPPED", "none")
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

    arena: ClassVar[Any]  # a kill_arena.Arena

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

    @precondition(lambda self: self.model and goes_on(self))
    @rule(again=again, pick=picks, qemu_too=st.booleans())
    def kill_the_idle_daemon(self, again: int | None, pick: int, qemu_too: bool) -> None:
        with self.telling(f"killed at rest and {again}, qemu {pick} too: {qemu_too}"):
            self.kill("nothing")
            if qemu_too:
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
            return self.plan_creation(free[pick % len(free)], "auto" if pick % 2 else "off")
        if verb == "create" or (verb == "rename" and not free):
            verb = "delete"
        name = self.pick(pick)
        act = plan(verb, name, self.model[name], free[pick % len(free)] if free else "")
        self.story.append(f"  {act.method} {act.params} of {self.model[name]}")
        return act

    def plan_creation(self, name: str, warm: str) -> Act:
        taken = set(self.addresses.values())
        every = [self.arena.address(each) for each in self.arena.names]
        address = next(each for each in every if each not in taken)
        self.story.append(f"  create {name} at {address}, warm: {warm}")
        params = {"name": name, "ip": address, "warm": warm, **self.arena.creation}
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
