"""Why a qemu has ended, told from its last event and the way its process ended."""

import signal
from dataclasses import dataclass
from enum import StrEnum

from oscloudd.host.processes import ExitStatus


class EndingKind(StrEnum):
    """What ended a machine."""

    GUEST_SHUTDOWN = "guest_shutdown"
    STOPPED = "stopped"
    KILLED = "killed"
    PANICKED = "panicked"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Ending:
    """How a machine came to its end; `message` is for people."""

    kind: EndingKind
    message: str

    @property
    def is_orderly(self) -> bool:
        """Tell whether somebody wanted it: the guest itself, or one of us."""
        return self.kind in (EndingKind.GUEST_SHUTDOWN, EndingKind.STOPPED, EndingKind.KILLED)


# ShutdownCause in qemu's qapi/run-state.json; those missing don't end the process.
_CAUSES = {
    "guest-shutdown": (EndingKind.GUEST_SHUTDOWN, "the guest powered itself off"),
    "guest-panic": (EndingKind.PANICKED, "the guest's kernel panicked"),
    "host-qmp-quit": (EndingKind.STOPPED, "qemu was told to quit"),
    "host-signal": (EndingKind.STOPPED, "qemu was ended by a signal from the host"),
    "host-ui": (EndingKind.STOPPED, "qemu was closed"),
    "host-error": (EndingKind.CRASHED, "qemu gave up after an error on the host"),
}


def describe_ending(cause: str | None, status: ExitStatus, *, was_killed: bool) -> Ending:
    """Say why a qemu ended.

    `cause` is the reason in its SHUTDOWN event, if there was one; `was_killed` means that the stop
    ladder came to SIGKILL.
    """
    if cause in _CAUSES:
        return Ending(*_CAUSES[cause])
    if was_killed:
        return Ending(EndingKind.KILLED, "qemu did not quit when asked and was killed")
    if status.signal is not None:
        known = status.signal in set(signal.Signals)
        name = signal.Signals(status.signal).name if known else f"signal {status.signal}"
        return Ending(EndingKind.CRASHED, f"qemu was ended by {name}, which was not ours")
    if status.code is not None:
        return Ending(EndingKind.CRASHED, f"qemu ended with status {status.code}")
    return Ending(EndingKind.UNKNOWN, "qemu is gone and nobody saw why")
