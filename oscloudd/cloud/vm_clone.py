"""Cloning a vm: another one whose disk begins as the first one's is, and who is somebody else.

What they have in common is a layer that both stand on. The clone is made as every new vm is, by
`vm_create`; its guest finds out at its first boot that it is to have another identity.
"""

from dataclasses import dataclass, replace

from oscloudd.cloud.jobs import JobInfo, Order
from oscloudd.cloud.snapshots import Snapshots
from oscloudd.cloud.taken import NicRequest
from oscloudd.cloud.vm_create import Original, VmCreator, VmRequest
from oscloudd.cloud.vm_records import VmInfo, VmRecord, read_vm
from oscloudd.errors import InvalidArgumentError
from oscloudd.store.database import Database


@dataclass(frozen=True)
class CloneRequest:
    """What is asked for; None is as the original has it, or chosen as for a new vm (`ip`)."""

    name: str
    snapshot: str | None
    mem_size: int | None
    cpus: int | None
    disk_size: int | None
    ip: str | None
    wait: str


class VmCloner:
    """Makes vms of vms."""

    def __init__(self, database: Database, snapshots: Snapshots, creator: VmCreator) -> None:
        self._database = database
        self._snapshots = snapshots
        self._creator = creator

    async def clone(self, key: int | str, request: CloneRequest, order: Order) -> VmInfo | JobInfo:
        """Make a vm of another's disk as it is now, or was at a snapshot; the other goes on.

        Answers as `VmCreator.create` does. Raises what it raises, and what freezing a disk does.
        """
        source = await self._database.run(lambda: read_vm(key))
        asked = _as_request(source, request)
        # Whatever is refused is refused before the disk is frozen, which adds a layer to it.
        await self._creator.check_can_clone(asked)
        if request.snapshot is None:
            _check_size(source, request, source.disk_size)
        layer = await self._snapshots.freeze(source, request.snapshot, order)
        # One that was made larger since it was frozen is larger than what it stands on.
        least = layer.size if request.snapshot is not None else max(layer.size, source.disk_size)
        _check_size(source, request, least)
        size = least if request.disk_size is None else request.disk_size
        original = Original(layer.id, source.warm_image)
        return await self._creator.clone(replace(asked, disk_size=size, original=original), order)


def _check_size(source: VmRecord, request: CloneRequest, least_bytes: int) -> None:
    if request.disk_size is not None and request.disk_size < least_bytes:
        raise InvalidArgumentError(
            f"disk_size {request.disk_size} is smaller than the disk of {source.name!r}",
            hint=f"give it at least {least_bytes} bytes, or leave it out",
            parameter="disk_size",
        )


def _as_request(source: VmRecord, request: CloneRequest) -> VmRequest:
    return VmRequest(
        name=request.name,
        image=source.template,
        network=source.network_id,
        mem_size=source.mem_size if request.mem_size is None else request.mem_size,
        disk_size=source.disk_size if request.disk_size is None else request.disk_size,
        disk=None,
        cpus=source.cpus if request.cpus is None else request.cpus,
        ssh_keys=(),
        ip=request.ip,
        password="",
        user_data="",
        wait=request.wait,
        other_nics=tuple(NicRequest(nic.network_id) for nic in source.other_nics),
    )
