"""Whether a vm that has ended is started again, and how soon: rules only, nothing is done here."""

from collections import deque
from enum import StrEnum

LONGEST_DELAY_SECONDS = 60.0
# A vm that has run that long is taken to be well again: the next end counts as the first.
STEADY_SECONDS = 60.0
WINDOW_SECONDS = 60.0
STARTS_PER_WINDOW = 10


class RestartPolicy(StrEnum):
    """When a vm that has ended is started again."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Autostart(StrEnum):
    """Whether a vm is started when the host has booted."""

    NO = "no"
    YES = "yes"
    LAST_STATE = "last-state"  # if it was wanted running


def should_restart(policy: str, *, wanted_running: bool, failed: bool) -> bool:
    """Tell whether a vm that has ended is to be started again.

    `wanted_running` is false once its user has stopped it, and then no policy revives it; `failed`
    is true of a crash, a kill, a panic and a failure to start, false of a guest's own poweroff.
    """
    match RestartPolicy(policy):
        case RestartPolicy.NO:
            return False
        case RestartPolicy.ON_FAILURE:
            return wanted_running and failed
        case RestartPolicy.ALWAYS:
            return wanted_running


class Restarts:
    """The starts and ends of one vm as far as they decide how soon it may be started again.

    In memory only. Times are seconds of one clock that never goes back (`time.monotonic`).
    """

    def __init__(self) -> None:
        self._starts: deque[float] = deque(maxlen=STARTS_PER_WINDOW)
        self._running_since: float | None = None
        self._ended_at: float | None = None
        self._short_runs = 0

    def started(self, now: float) -> None:
        """Count an attempt to start it, whoever asked for it, as it begins."""
        self._starts.append(now)
        self._running_since = now

    def ended(self, now: float) -> None:
        """Count its end, or the failure of an attempt; one that is told twice counts once.

        The end of a vm that an earlier daemon started counts as the first.
        """
        if self._ended_at is not None and self._running_since is None:
            return
        steady = self._running_since is None or now - self._running_since >= STEADY_SECONDS
        self._short_runs = 1 if steady else self._short_runs + 1
        self._running_since = None
        self._ended_at = now

    def delay_seconds(self, now: float) -> float:
        """Give how long to wait, from `now`, before the next start: 0 when it may begin at once.

        1 s after the first end, then 2, 4, … up to 60; more where 10 starts in 60 s are reached.
        """
        allowed = now
        if self._ended_at is not None and self._running_since is None:
            allowed = max(allowed, self._ended_at + self._back_off_seconds())
        if len(self._starts) == STARTS_PER_WINDOW:
            allowed = max(allowed, self._starts[0] + WINDOW_SECONDS)
        return allowed - now

    def _back_off_seconds(self) -> float:
        return float(min(LONGEST_DELAY_SECONDS, 2 ** min(self._short_runs - 1, 10)))
