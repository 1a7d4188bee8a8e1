"""Network cards of a machine beside its first one: plugged in and out while it stands or runs.

Each is in a port of its own, as a data disk is (`hotplug`). The first card is on the command line.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from oscloudd.errors import HostError
from oscloudd.machine.arguments import (
    build_nic_backend,
    build_nic_device,
    nic_backend_name,
    nic_name,
    port_name,
)
from oscloudd.machine.plugging import UNPLUG_SECONDS, check_has_port, list_devices, unplug
from oscloudd.machine.qemu import Qemu


async def plug_nic(
    qemu: Qemu, slot: int, mac: str, open_tap: Callable[[], AbstractContextManager[int]]
) -> None:
    """Plug a card in; one that is there already stays. `open_tap` makes its tap.

    Raises HostError and what `open_tap` raises, and InvalidStateError when the machine has no such
    port; nothing is plugged in then.
    """
    devices = await list_devices(qemu)
    if nic_name(slot) in devices:
        return
    check_has_port(devices, slot, "a network card")
    # First of all: what a daemon that died has left of it has a tap of the same name.
    await _forget_backend(qemu, slot)
    name = _descriptor_name(slot)
    try:
        with open_tap() as descriptor:
            await qemu.monitor.execute("getfd", {"fdname": name}, descriptor=descriptor)
        await qemu.monitor.execute("netdev_add", build_nic_backend(slot, name))
        device = {**build_nic_device(slot, mac), "bus": port_name(slot)}
        await qemu.monitor.execute("device_add", device)
    except BaseException:
        await _forget_backend(qemu, slot)
        raise


async def unplug_nic(qemu: Qemu, slot: int, *, timeout_seconds: float = UNPLUG_SECONDS) -> None:
    """Ask the guest to let go of a card, wait until it has, and let go of its tap.

    Raises OperationTimeoutError when it does not, which leaves the card where it is.
    """
    await unplug(qemu, nic_name(slot), "network card", timeout_seconds=timeout_seconds)
    await _forget_backend(qemu, slot)


def _descriptor_name(slot: int) -> str:
    return f"tap{slot}"


async def _forget_backend(qemu: Qemu, slot: int) -> None:
    """Close a slot's tap in qemu, as far as it is there; the tap is gone with it."""
    with suppress(HostError):
        await qemu.monitor.execute("netdev_del", {"id": nic_backend_name(slot)})
    with suppress(HostError):
        await qemu.monitor.execute("closefd", {"fdname": _descriptor_name(slot)})
