"""The ports of a machine, and devices in them: what is there, and having the guest let go of one.

What the devices are is in `hotplug` (data disks) and `nics` (network cards).
"""

import asyncio

from oscloudd.errors import InvalidStateError, OperationTimeoutError
from oscloudd.machine.arguments import port_name
from oscloudd.machine.qemu import Heard, Qemu

# An idle guest lets go of a disk in 0.1 s under emulation, one that is still booting later.
UNPLUG_SECONDS = 30.0


async def list_devices(qemu: Qemu) -> set[str]:
    """Give the ids of all devices that have one."""
    found = await qemu.monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return {str(each["name"]) for each in found}


def check_has_port(devices: set[str], slot: int, what: str) -> None:
    """Raise InvalidStateError when the machine has no port of this number for `what`."""
    if port_name(slot) not in devices:
        raise InvalidStateError(
            f"this machine has no port for {what}: it was started by an older version",
            hint="stop the vm and start it again",
        )


async def unplug(
    qemu: Qemu, device: str, what: str, *, timeout_seconds: float = UNPLUG_SECONDS
) -> None:
    """Ask the guest to let go of a device, and wait until it has; one that is gone is no error.

    Raises OperationTimeoutError when it does not, which leaves the device where it is.
    """
    with qemu.hear("DEVICE_DELETED") as heard:
        if device not in await list_devices(qemu):
            return
        await qemu.monitor.execute("device_del", {"id": device})
        try:
            async with asyncio.timeout(timeout_seconds):
                await _wait_deleted(heard, device)
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"the guest has not let go of the {what} within {timeout_seconds:g} s",
                hint=f"see that it has booted and does not use the {what}, then try again; or "
                "stop the vm first",
            ) from error


async def _wait_deleted(heard: Heard, device: str) -> None:
    """Wait for the guest's consent, or for the end of its qemu."""
    while (event := await heard.get()) is not None:
        if event.get("device") == device:
            return
