"""Events over the socket: in order, none missing, and an end for those who do not read them."""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from daemon_process import Box, Line, RpcError

# More than a listener may be behind, and than its socket and ours hold for it.
MANY = 12_000


class Watch:
    """One `event_watch` on a connection of its own; `close` hangs up."""

    def __init__(self, box: Box, **params: Any) -> None:
        self.line = box.connect()
        request = {"jsonrpc": "2.0", "method": "event_watch", "params": params, "id": 7}
        self.line.send(json.dumps(request).encode() + b"\n")

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.line.__exit__()

    def next(self) -> dict[str, Any]:
        message = self.line.receive()
        assert message.get("method") == "event", message
        event: dict[str, Any] = message["params"]
        return event

    def until(self, **wanted: Any) -> list[dict[str, Any]]:
        """Give the events up to the first that has all these members, or data."""
        seen = []
        while True:
            event = self.next()
            seen.append(event)
            if all({**event, **event["data"]}.get(key) == what for key, what in wanted.items()):
                return seen

    def answer(self) -> dict[str, Any]:
        """Read on to the answer, and give that."""
        while (message := self.line.receive()).get("method") == "event":
            pass
        return message


def replay(box: Box, since: int | None, limit: int = 10_000) -> tuple[list[dict[str, Any]], int]:
    with Watch(box, since=since, follow=False, limit=limit) as watch:
        events = []
        while (message := watch.line.receive()).get("method") == "event":
            events.append(message["params"])
        return events, message["result"]["latest"]


def latest(box: Box) -> int:
    return replay(box, None)[1]


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence"] for event in events]


def states(events: list[dict[str, Any]]) -> list[str]:
    return [event["data"]["state"] for event in events if event["kind"] == "vm_state"]


def insert(box: Box, count: int) -> None:
    """Write events past the daemon, which learns of them at the next change of anything."""
    text = json.dumps({"message": "x" * 200})
    for start in range(0, count, 1000):
        rows = ", ".join([f"(0, 'warning', 'filler', '{text}')"] * min(1000, count - start))
        # There is nothing in it but this function's own words.
        box.rows(f"INSERT INTO event (at, kind, name, data) VALUES {rows}")  # noqa: S608


def announce(box: Box) -> None:
    box.call("vm_set", vm="web", restart="no")


def connections(box: Box) -> int:
    """Count what this process and others have open at the daemon, by the kernel's word."""
    assert box.daemon is not None
    # An accepted socket belongs to the network namespace of the one that connected: ours.
    rows = [line.split() for line in Path("/proc/self/net/unix").read_text().splitlines()]
    accepted = {f"socket:[{row[6]}]" for row in rows if row[-1].endswith("/oscloudd.sock")}
    count = 0
    for descriptor in Path(f"/proc/{box.daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(descriptor) in accepted
    return count


def test_a_life_of_a_vm_is_told_in_order(box: Box) -> None:
    start = latest(box)
    with Watch(box, since=start) as watch:
        vm = box.create("web")
        box.call("vm_stop", vm="web", force=True)
        box.call("vm_delete", vm="web", force=True)
        seen = watch.until(kind="vm_state", state="DELETED")
    assert numbers(seen) == sorted(set(numbers(seen)))
    told = [state for state, _ in itertools.groupby(states(seen))]
    assert told[0] == "CREATING"
    assert told[-1] == "DELETED"
    assert [state for state in told if state in ("RUNNING", "STOPPED")] == ["RUNNING", "STOPPED"]
    assert {event["vm"] for event in seen if event["kind"] == "vm_state"} == {vm["id"]}
    assert {event["data"]["kind"] for event in seen if event["kind"] == "job"} >= {
        "vm_create",
        "vm_stop",
        "vm_delete",
    }
    again, _ = replay(box, start)
    assert again[: len(seen)] == seen


def test_a_replay_in_pieces_leaves_no_gap(box: Box) -> None:
    box.create("web")
    box.call("vm_stop", vm="web", force=True)
    whole, end = replay(box, 0)
    assert numbers(whole)[-1] == end
    pieces: list[dict[str, Any]] = []
    since = 0
    while since < end:
        piece, reached = replay(box, since, limit=3)
        assert 1 <= len(piece) <= 3
        assert reached == piece[-1]["sequence"]
        pieces, since = pieces + piece, reached
    assert pieces[: len(whole)] == whole
    assert replay(box, end, limit=1)[1] >= end


def test_two_that_watch_see_the_same_and_one_from_earlier_sees_it_all(box: Box) -> None:
    with Watch(box, since=latest(box)) as first, Watch(box, since=latest(box)) as second:
        box.create("web")
        seen = first.until(kind="vm_state", state="RUNNING")
        assert second.until(kind="vm_state", state="RUNNING")[-len(seen) :] == seen
    with Watch(box, since=0) as third:
        assert third.until(kind="vm_state", state="RUNNING") == seen
        box.call("vm_stop", vm="web", force=True)
        assert states(third.until(kind="vm_state", state="STOPPED"))[-1] == "STOPPED"


def test_one_that_watches_from_now_on_sees_what_comes_only(box: Box) -> None:
    box.create("web")
    before = latest(box)
    with Watch(box) as watch:
        # Whether it has begun yet, nobody tells: there is a change until it sees one.
        answered = 0
        while not select.select([watch.line.socket], [], [], 0)[0]:
            box.call("vm_pause" if answered % 2 == 0 else "vm_resume", vm="web")
            answered += 1
        assert watch.next()["sequence"] > before


def test_nothing_is_missed_over_the_death_of_the_daemon(box: Box) -> None:
    with Watch(box, since=0) as watch:
        box.create("web")
        seen = watch.until(kind="vm_state", state="RUNNING")
        box.end(signal.SIGKILL)
    box.start()
    box.call("vm_stop", vm="web", force=True)
    with Watch(box, since=seen[-1]["sequence"]) as watch:
        seen += watch.until(kind="vm_state", state="STOPPED")
    whole, _ = replay(box, 0)
    assert whole[: len(seen)] == seen


def test_a_number_yet_to_come_is_refused(box: Box) -> None:
    end = latest(box)
    with pytest.raises(RpcError) as refused:
        box.call("event_watch", since=end + 1000)
    assert refused.value.kind == "invalid_argument"
    assert refused.value.data["latest"] >= end
    assert f"the latest event is {refused.value.data['latest']}" in refused.value.message


@pytest.mark.parametrize("follow", [True, False])
def test_events_that_are_no_longer_kept_are_an_error(box: Box, follow: bool) -> None:
    insert(box, 10)
    oldest = latest(box) - 2
    box.rows("DELETE FROM event WHERE id < ?", oldest)
    forgotten = ("events_forgotten_up_to", str(oldest - 1))
    box.rows("INSERT INTO meta (name, value) VALUES (?, ?)", *forgotten)
    with pytest.raises(RpcError) as refused:
        box.call("event_watch", since=oldest - 2, follow=follow)
    assert refused.value.kind == "not_found"
    assert refused.value.data["oldest"] == oldest
    events, _ = replay(box, oldest - 1)
    assert numbers(events)[:1] == [oldest]


def test_one_that_does_not_read_is_cut_off_and_told_from_where_to_go_on(box: Box) -> None:
    box.create("web")
    start = latest(box)
    with Watch(box, since=start) as deaf, Watch(box, since=start) as good:
        insert(box, 2000)
        announce(box)
        for _ in range(2000):
            good.until(name="filler")
        insert(box, MANY)
        announce(box)
        for _ in range(MANY):
            good.until(name="filler")
        box.until(lambda: "cut off after event" in box.log(), "the end of patience")
        answer = deaf.answer()
        error = answer["error"]
        assert (error["code"], error["data"]["kind"]) == (11, "unavailable")
        assert "cut off" in error["message"]
        assert deaf.line.at_end()
        announce(box)
    since = error["data"]["since"]
    assert start < since < start + MANY
    rest, _ = replay(box, since, limit=1)
    assert len(rest) == 1


def test_a_slow_one_that_reads_at_last_gets_everything(box: Box) -> None:
    box.create("web")
    start = latest(box)
    with Watch(box, since=start) as watch:
        insert(box, 3000)
        announce(box)
        box.until(lambda: latest(box) >= start + 3000, "the events")
        got = [watch.next() for _ in range(3000)]
    expected, _ = replay(box, start, limit=3000)
    assert got == expected


def test_those_that_hang_up_leave_nothing(box: Box) -> None:
    box.create("web")
    box.wait("web", "RUNNING")
    watches = [Watch(box, since=0) for _ in range(50)]
    for watch in watches:
        watch.next()
    box.until(lambda: connections(box) == 50, "fifty that watch")
    # Each in another way: at once, in the middle of more, with requests behind.
    for number, watch in enumerate(watches):
        if number % 3 == 1:
            watch.line.send(b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1}\n' * 100)
        elif number % 3 == 2:
            watch.line.socket.shutdown(socket.SHUT_RDWR)
        watch.line.__exit__()
    box.until(lambda: connections(box) == 0, "the end of their connections")
    assert "Traceback" not in box.log()
    assert "incident" not in box.log()


def test_one_that_waits_for_a_vm_and_hangs_up_leaves_nothing(box: Box) -> None:
    box.create("web")
    lines: list[Line] = []
    for _ in range(20):
        lines.append(box.connect())
        lines[-1].send(
            b'{"jsonrpc": "2.0", "method": "vm_wait", "id": 1,'
            b' "params": {"vm": "web", "state": "PAUSED", "timeout": 86400}}\n'
        )
    box.until(lambda: connections(box) == 20, "twenty that wait")
    for line in lines:
        line.__exit__()
    box.until(lambda: connections(box) == 0, "the end of their connections")
