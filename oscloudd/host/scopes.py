"""A scope of systemd's for each qemu: a cgroup with limits and a name, that outlives the daemon.

Speaks to systemd by busctl(1): 8 ms, 20 with the start of its process, of the second that a warm
vm takes; no D-Bus library is worth what is left to gain. Where the daemon is no service, every call
does nothing. A vm is worth more than its scope: what systemd refuses is logged, and the vm runs
without.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.activation import is_service
from oscloudd.host.commands import run

_log = logging.getLogger(__name__)

SLICE = "oscloud.slice"
# Stopped before the scopes are, so that it can stop the guests in peace (libvirt-guests does so).
GUESTS_SERVICE = "oscloud-guests.service"

_MANAGER = (
    "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager",
)  # fmt: skip
_CGROUPS = Path("/sys/fs/cgroup")
_CONTROLLERS = ("memory", "pids", "cpu")
_CALL_SECONDS = 10.0
_STOP_SECONDS = 30.0

# qemu itself takes 20 to 30 MiB, emulated code 64, buffers and stacks some more; page tables take
# a 512th of the guest's memory, twice where the processor nests them.
_OVERHEAD_BYTES = 256 << 20
_OVERHEAD_RATIO = 64
# qemu's pool of threads for disks has up to 64, in each of its loops.
_OWN_TASKS = 128
_SECOND_MICROSECONDS = 1_000_000
# systemd.resource-control(5): 100 is everybody's weight, 10000 the most.
_WEIGHT, _MAX_WEIGHT = 100, 10_000


@dataclass(frozen=True)
class VmScope:
    """The scope of one vm: its number, its name, and the size that the limits follow from."""

    vm_id: int
    vm_name: str
    memory_bytes: int
    cpus: int

    @property
    def unit(self) -> str:
        """The scope's name as a unit."""
        return f"oscloud-vm-{self.vm_id}.scope"

    @property
    def description(self) -> str:
        """What `systemctl status` and the journal call it."""
        return f"OS Cloud vm {self.vm_name}"


async def ensure_scope(pid: int, scope: VmScope) -> None:
    """Have the qemu `pid` in its scope; may be called again."""
    if not is_service() or is_in_unit(pid, scope.unit):
        return
    start = [*_call("StartTransientUnit", "ssa(sv)a(sa(sv))"), *build_scope_arguments(pid, scope)]
    try:
        try:
            await run(start, timeout_seconds=_CALL_SECONDS)
        except HostError:
            if is_in_unit(pid, scope.unit):  # it was slow to say so
                return
            # The scope of the vm's last qemu goes a moment after it: this waits until it has gone.
            await run(["systemctl", "stop", scope.unit], timeout_seconds=_STOP_SECONDS)
            await run(start, timeout_seconds=_CALL_SECONDS)
    except HostError as error:
        _log.warning("vm %d runs without %s: %s", scope.vm_id, scope.unit, error.message)


async def rename_scope(scope: VmScope) -> None:
    """Call the scope by the vm's present name, where there is one."""
    if not is_service():
        return
    call = _call("SetUnitProperties", "sba(sv)")
    try:
        await run(
            [*call, scope.unit, "true", "1", "Description", "s", scope.description],
            timeout_seconds=_CALL_SECONDS,
        )
    except HostError as error:
        _log.info("%s keeps its description: %s", scope.unit, error.message)


def find_missing_controllers(root: Path = _CGROUPS) -> list[str] | None:
    """Give what the limits need and this box's cgroups lack; None where there are no scopes."""
    if not is_service():
        return None
    try:
        present = (root / "cgroup.controllers").read_text(encoding="ascii").split()
    except OSError:  # no cgroup v2, or not for us: so it is in some containers
        present = []
    return [name for name in _CONTROLLERS if name not in present]


def is_in_unit(pid: int, unit: str) -> bool:
    """Tell whether a process is in the cgroup of a unit, by whichever hierarchy systemd uses."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(line.rpartition("/")[2] == unit for line in text.splitlines())


def build_scope_arguments(pid: int, scope: VmScope) -> list[str]:
    """Build what StartTransientUnit is given, as busctl(1) writes it: a type, then the value."""
    memory = scope.memory_bytes + scope.memory_bytes // _OVERHEAD_RATIO + _OVERHEAD_BYTES
    properties: list[tuple[str, ...]] = [
        ("Description", "s", scope.description),
        ("Slice", "s", SLICE),
        ("PIDs", "au", "1", str(pid)),
        ("MemoryMax", "t", str(memory)),
        ("TasksMax", "t", str(scope.cpus + _OWN_TASKS)),
        ("CPUWeight", "t", str(min(_MAX_WEIGHT, scope.cpus * _WEIGHT))),
        # The guest's processors, and one for what qemu does besides.
        ("CPUQuotaPerSecUSec", "t", str((scope.cpus + 1) * _SECOND_MICROSECONDS)),
        # All else that qemu uses it has open.
        ("DevicePolicy", "s", "closed"),
        ("DeviceAllow", "a(ss)", "1", "/dev/kvm", "rw"),
        # One that ended by running out of memory must not keep its name.
        ("CollectMode", "s", "inactive-or-failed"),
        ("Before", "as", "1", GUESTS_SERVICE),
    ]
    words = [word for entry in properties for word in entry]
    return [scope.unit, "fail", str(len(properties)), *words, "0"]


def _call(method: str, signature: str) -> list[str]:
    return ["busctl", "--quiet", "call", *_MANAGER, method, signature]
