"""The disk of a machine that runs: which node it is, and giving it an overlay to write to."""

import asyncio
import os
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.machine.arguments import DISK_DEVICE, build_file_nodes, build_overlay_options
from oscloudd.machine.qemu import Qemu

# Above all that a machine is started with.
_FIRST_SET = 1000


async def top_node(qemu: Qemu) -> str:
    """Give the name of the node that the guest's disk is now; raises HostError."""
    path = f"/machine/peripheral/{DISK_DEVICE}/"
    for block in await qemu.monitor.execute("query-block"):
        if str(block.get("qdev", "")).startswith(path):
            return str(block["inserted"]["node-name"])
    raise HostError("qemu says nothing of the guest's disk")


def overlay_node(layer_id: int) -> str:
    """Name the node of the overlay that stands on a layer which was frozen while it ran."""
    return f"over{layer_id}"


async def switch_disk(qemu: Qemu, overlay: Path, layer_id: int) -> None:
    """Have the guest write to `overlay` from now on; what it wrote to before is read only then.

    May be called again, by another daemon too. The guest sees nothing of it, and what it has
    written until then is below the overlay. Raises HostError and OperationTimeoutError.
    """
    name, set_id = overlay_node(layer_id), _FIRST_SET + layer_id
    before = await top_node(qemu)
    if before == name:
        return
    monitor = qemu.monitor
    there = {each["node-name"] for each in await _named_nodes(qemu)}
    descriptor = await asyncio.to_thread(_open, overlay)
    try:
        # A set that nothing uses is gone with the connection of the daemon that made it.
        await monitor.execute("add-fd", {"fdset-id": set_id}, descriptor=descriptor)
    finally:
        os.close(descriptor)
    options = build_overlay_options(None)  # until blockdev-snapshot says what it stands on
    for node in build_file_nodes(name, set_id, "qcow2", read_only=False, options=options):
        if node["node-name"] not in there:
            await monitor.execute("blockdev-add", node)
    await monitor.execute("blockdev-snapshot", {"node": before, "overlay": name})


async def _named_nodes(qemu: Qemu) -> list[dict[str, str]]:
    nodes: list[dict[str, str]] = await qemu.monitor.execute(
        "query-named-block-nodes", {"flat": True}
    )
    return nodes


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{path} can't be opened for qemu: {error.strerror}") from error
