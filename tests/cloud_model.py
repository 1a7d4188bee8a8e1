"""A model of a cloud, a dict of vms by name, which hypothesis drives side by side with a cloud.

Whatever a user was told stays true, and what a daemon died in is finished or undone; which of the
two, the model learns from the cloud.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from cloud_accounts import SETTLE_SECONDS, Question, check_accounted, settle, tail
from cloud_acts import (
    DISK_VERBS,
    DISKS,
    SNAPSHOT_VERBS,
    VERBS,
    Act,
    Known,
    Outcome,
    plan,
    plan_disk,
    plan_disk_alone,
    plan_snapshot,
    see_disks,
    see_vms,
)
from dying_daemon import Death
from fake_qemu import MARK, read_block
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

Moment = tuple[str, int]
picks = st.integers(0, 9)
# As often one of the vm itself as one of its snapshots and disks.
verbs = st.one_of(
    st.sampled_from(VERBS), st.sampled_from(SNAPSHOT_VERBS), st.sampled_from(DISK_VERBS)
)
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
        self.disks: set[str] = set()
        # How often a guest had run, by what its snapshots and its disk have of it.
        self.kept: dict[tuple[str, int], int] = {}
        self.runs: dict[str, int] = {}
        self.addresses: dict[str, str] = {}
        self.story: list[str] = []

    @initialize()
    def begin(self) -> None:
        self.arena.ensure_open()
        self.box = self.arena.box

    # What a user does

    @precondition(goes_on)
    @rule(verb=verbs, pick=picks)
    def do(self, verb: str, pick: int) -> None:
        with self.telling(f"{verb} {pick}"):
            act = self.choose(verb, pick)
            with self.ask(act) as question:
                assert question.read(), tail(self.box)
            self.learn(act, question)

    @precondition(goes_on)
    @rule(verb=verbs, pick=picks, moment=moments, again=again)
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
                for disk in self.disks:
                    self.box.call("disk_delete", disk=disk)
                self.disks = set()
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
        if verb in SNAPSHOT_VERBS and pick % 3:  # where there are some, that are related
            name = max(sorted(self.model), key=lambda each: len(self.model[each].snapshots))
        known = self.model[name]
        if verb in SNAPSHOT_VERBS:
            is_somebody = self.is_somebody(known)
            first = verb if known.snapshots else "snapshot"
            act = plan_snapshot(first, name, known, pick, is_somebody=is_somebody)
        elif verb in DISK_VERBS and not self.arena.is_fake:
            # A guest that boots takes longer to let go of one than anybody waits here.
            act = plan("pause", name, known, "")
        elif verb in DISK_VERBS:
            act = self.choose_disk(verb, pick, name, known)
        else:
            act = plan(verb, name, known, free[pick % len(free)] if free else "")
        self.story.append(f"  {act.method} {act.params} of {known}")
        return act

    def choose_disk(self, verb: str, pick: int, name: str, known: Known) -> Act:
        attached = {disk for vm in self.model.values() for disk in vm.disks}
        loose = sorted(self.disks - attached)
        missing = sorted(set(DISKS) - self.disks)
        if verb == "detach" and known.disks:
            return plan_disk(verb, name, known, known.disks[pick % len(known.disks)])
        if verb == "attach" and loose:
            return plan_disk(verb, name, known, loose[pick % len(loose)])
        if missing and (verb != "no disk" or not loose):
            return plan_disk_alone(missing[0], is_there=False)
        if loose:
            return plan_disk_alone(loose[0], is_there=True)
        return plan("start", name, known, "")  # all there are are attached

    def is_somebody(self, known: Known) -> bool:
        """Tell whether a vm's disk knows who it is; that of one that runs will in a moment."""
        has_it = "SELECT 1 FROM vm WHERE uuid = ? AND identified AND seed_document = ''"
        if known.state == "RUNNING":
            self.box.until(lambda: bool(self.box.rows(has_it, known.uuid)), "its disk to know")
        return bool(self.box.rows(has_it, known.uuid))

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
        now, disks = see_vms(self.box), see_disks(self.box)
        what = f"{act} of {was}: answered {question.result or question.error}, now {now}, {disks}"
        is_finished = self.is_finished(act, now, disks)
        is_undone = now.get(act.name) == was and disks == self.disks
        if question.error is not None:
            assert act.is_refused, what
            assert question.error.kind == "invalid_state", what
            assert is_undone, what
        elif question.is_answered:
            assert not act.is_refused, what
            assert is_finished, what
        else:
            assert is_finished or is_undone, what
        if is_finished and was is not None and act.method == "snapshot_restore":
            self.come_back(was, act.params["snapshot"])
        self.disks = disks
        if act.name:
            self.model.pop(act.name, None)
            address = self.addresses.pop(act.name, act.params.get("ip", ""))
            name = act.outcome.name if act.outcome is not None and is_finished else act.name
            if name in now:
                self.model[name] = now[name]
                self.addresses[name] = address
        self.look()

    def is_finished(self, act: Act, now: dict[str, Known], disks: set[str]) -> bool:
        if act.disk[0]:
            name, is_there = act.disk
            return disks == (self.disks | {name} if is_there else self.disks - {name})
        if disks != self.disks:
            return False
        was = self.model.get(act.name)
        if act.outcome is None:
            return not [vm for vm in now.values() if was and vm.uuid == was.uuid]
        return act.outcome.is_met(was, now)

    def come_back(self, was: Known, snapshot: str) -> None:
        """A vm is at a snapshot again: its guest has run that often, or once more."""
        if self.arena.is_fake:
            (kept,) = [runs for (name, _layer), runs in self.kept_of(was.uuid) if name == snapshot]
            self.runs[was.uuid] = kept

    def kept_of(self, uuid: str) -> list[tuple[tuple[str, int], int]]:
        """Give how often a guest had run at its snapshots, by the files there are."""
        parents = dict(self.box.rows("SELECT id, parent_id FROM layer"))
        rows = self.box.rows(
            "SELECT snapshot.name, layer_id FROM snapshot JOIN vm ON vm.id = vm_id WHERE uuid = ?",
            uuid,
        )
        return [((name, layer), self.runs_in(layer, parents)) for name, layer in rows]

    def runs_in(self, layer: int | None, parents: dict[int, int | None]) -> int:
        while layer is not None:
            with (self.box.root / f"state/layers/{layer}/disk.qcow2").open("rb") as image:
                block = read_block(image.fileno())
            if block:
                return int(block.removeprefix(MARK)[:8])
            layer = parents[layer]
        return 0

    def check_written(self) -> None:
        """Assert that snapshots and disks have what guests wrote: how often they were let run."""
        for vm, known in self.model.items() if self.arena.is_fake else ():
            for (name, layer), runs in self.kept_of(known.uuid):
                key = (f"{known.uuid} {name}", layer)
                assert self.kept.setdefault(key, runs) == runs, (known, name, self.kept)
            if known.state == "RUNNING":
                runs = self.box.call("vm_qemu_command", vm=vm, command="x-runs")
                assert runs >= self.runs.get(known.uuid, 0), (known, runs, self.runs)
                self.runs[known.uuid] = runs

    def look(self) -> None:
        """Assert that the vms are as the model has them, and nothing else is anywhere."""
        now = see_vms(self.box)
        assert now == self.model, (now, self.model)
        assert see_disks(self.box) == self.disks
        check_accounted(self.box)
        self.check_written()
