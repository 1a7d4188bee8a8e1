"""Memory: whether the host has room for one more vm.

What is promised counts, not what is used: a guest touches its memory when it likes, and by then
it is too late to refuse it.
"""

from peewee import fn

from oscloudd.cloud.states import LIVE_STATES, VmState
from oscloudd.errors import ExhaustedError
from oscloudd.host.resources import memory_available_bytes, memory_total_bytes
from oscloudd.store.models import Vm
from oscloudd.units import format_size

# One that is being made has been promised its memory though there is no qemu yet.
COMMITTED_STATES = LIVE_STATES | {VmState.CREATING}


def check_memory(wanted_bytes: int, overcommit: float, except_vm: int | None = None) -> None:
    """Raise ExhaustedError unless `wanted_bytes` more can be promised to a vm.

    To be called in the very transaction that writes the vm's STARTING or CREATING, or two at once
    would both be given the last of it. All vms together may have `overcommit` times the host's
    memory; `except_vm` is the id of one that does not count, the one that asks. And one alone may
    not want more than is available now, or than `overcommit` times that where it is above 1.
    """
    committed = committed_bytes(except_vm)
    total, available = memory_total_bytes(), memory_available_bytes()
    limit = int(overcommit * total)
    at_once = most_at_once_bytes(overcommit)
    if committed + wanted_bytes <= limit and wanted_bytes <= at_once:
        return
    if committed + wanted_bytes > limit:
        why = (
            f"vms have {format_size(committed)} of the {format_size(limit)} they may have together"
            f" ({overcommit:g} times the host's {format_size(total)})"
        )
    else:
        why = f"the host has {format_size(available)} of {format_size(total)} available"
    raise ExhaustedError(
        f"{format_size(wanted_bytes)} of memory can't be given to a vm: {why}",
        hint="ask for less, stop a vm, or raise [limits] overcommit in oscloud.toml",
        resource="memory",
        wanted=wanted_bytes,
        committed=committed,
        total=total,
        available=available,
        overcommit=overcommit,
    )


def most_at_once_bytes(overcommit: float) -> int:
    """Give the most that one vm alone may want now."""
    return int(memory_available_bytes() * max(1.0, overcommit))


def committed_bytes(except_vm: int | None = None) -> int:
    """Give the memory promised to vms that run or are about to, inside a transaction."""
    promised = Vm.select(fn.SUM(Vm.mem_size)).where(
        Vm.state.in_(sorted(COMMITTED_STATES)), Vm.id != (except_vm or 0)
    )
    return int(promised.scalar() or 0)
