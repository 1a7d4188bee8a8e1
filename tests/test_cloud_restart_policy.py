"""When a vm that has ended is started again, and how soon."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oscloudd.cloud.restart_policy import (
    STARTS_PER_WINDOW,
    STEADY_SECONDS,
    WINDOW_SECONDS,
    RestartPolicy,
    Restarts,
    should_restart,
)

# Whole seconds: sums of them are exact, so that a bound is a bound.
waits = st.integers(min_value=0, max_value=200)
short_runs = st.integers(min_value=0, max_value=int(STEADY_SECONDS) - 1)


@pytest.mark.parametrize(
    ("policy", "failed", "revived"),
    [
        ("no", True, False),
        ("no", False, False),
        ("on-failure", True, True),
        ("on-failure", False, False),
        ("always", True, True),
        ("always", False, True),
    ],
)
def test_a_policy_revives_what_is_wanted_and_nothing_else(
    policy: str, failed: bool, revived: bool
) -> None:
    assert should_restart(policy, wanted_running=True, failed=failed) is revived
    assert should_restart(policy, wanted_running=False, failed=failed) is False


def test_a_policy_nobody_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        should_restart("sometimes", wanted_running=True, failed=True)
    assert [str(policy) for policy in RestartPolicy] == ["no", "on-failure", "always"]


def test_the_delay_doubles_up_to_a_minute() -> None:
    restarts, now, delays = Restarts(), 1000.0, []
    for _ in range(9):
        restarts.started(now)
        restarts.ended(now)
        delays.append(restarts.delay_seconds(now))
        now += delays[-1]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_the_delay_is_counted_from_the_end_and_not_from_the_question() -> None:
    restarts = Restarts()
    assert restarts.delay_seconds(0) == 0
    restarts.started(0)
    restarts.ended(10)
    assert [restarts.delay_seconds(now) for now in (10, 10.25, 11, 500)] == [1, 0.75, 0, 0]


def test_an_end_told_twice_counts_once() -> None:
    restarts = Restarts()
    restarts.ended(5)  # an earlier daemon has started it
    restarts.ended(5.5)
    assert restarts.delay_seconds(5) == 1
    restarts.started(6)
    restarts.ended(7)
    restarts.ended(7)
    assert restarts.delay_seconds(7) == 2


@given(st.lists(st.tuples(short_runs, waits), min_size=1, max_size=30))
def test_the_delay_never_shrinks_before_the_vm_has_run_for_a_minute(
    lives: list[tuple[int, int]],
) -> None:
    restarts, now, last = Restarts(), 0.0, 0.0
    for run, wait in lives:
        restarts.started(now)
        now += run
        restarts.ended(now)
        delay = restarts.delay_seconds(now)
        assert max(1, last) <= delay <= 60
        last = delay
        now += delay + wait
    restarts.started(now)
    restarts.ended(now + STEADY_SECONDS)
    assert restarts.delay_seconds(now + STEADY_SECONDS) == 1


@given(st.lists(st.tuples(waits, waits, st.integers(0, 12)), min_size=1, max_size=40))
def test_no_minute_has_more_starts_than_ten_unless_a_user_made_them(
    lives: list[tuple[int, int, int]],
) -> None:
    """A user's starts are never held up; but they count, and the policy's give way to them."""
    restarts, now, starts = Restarts(), 0.0, []
    for run, wait, by_user in lives:
        for _ in range(by_user):
            restarts.started(now)
            restarts.ended(now)
            starts.append(now)
        now += restarts.delay_seconds(now)
        starts.append(now)
        in_window = [start for start in starts if now - WINDOW_SECONDS < start <= now]
        assert len(in_window) <= STARTS_PER_WINDOW
        restarts.started(now)
        now += run
        restarts.ended(now)
        now += wait
        assert 0 <= restarts.delay_seconds(now) <= 60


@given(
    st.lists(
        st.tuples(st.sampled_from(["started", "ended", "asked"]), st.integers(0, 90)), max_size=200
    )
)
def test_any_sequence_gives_a_delay_between_nothing_and_a_minute(
    sequence: list[tuple[str, int]],
) -> None:
    restarts, now = Restarts(), 0.0
    for what, wait in sequence:
        if what == "started":
            restarts.started(now)
        elif what == "ended":
            restarts.ended(now)
        assert 0 <= restarts.delay_seconds(now) <= 60
        now += wait
