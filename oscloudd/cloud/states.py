"""The states of a vm: seen from outside, and wanted by its user."""

from enum import StrEnum


class VmState(StrEnum):
    """What was last seen of a vm. RUNNING, STOPPED and PAUSED are the original's words."""

    CREATING = "CREATING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    SUSPENDED = "SUSPENDED"
    DELETING = "DELETING"
    CRASHED = "CRASHED"
    UNRESPONSIVE = "UNRESPONSIVE"
    ERROR = "ERROR"


# There is, or may be, a qemu.
LIVE_STATES = frozenset(
    {VmState.STARTING, VmState.RUNNING, VmState.PAUSED, VmState.STOPPING, VmState.UNRESPONSIVE}
)

# What the machine itself is seen to be in; the others say what is being done to it.
SEEN_STATES = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.UNRESPONSIVE})

# Nothing runs, and `vm_start` may begin.
DOWN_STATES = frozenset({VmState.STOPPED, VmState.SUSPENDED, VmState.CRASHED, VmState.ERROR})

# Nothing runs, and no memory is saved that goes with the machine and its disks as they are.
OFF_STATES = DOWN_STATES - {VmState.SUSPENDED}


class WantedState(StrEnum):
    """What the user asked for last."""

    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    DELETED = "DELETED"
