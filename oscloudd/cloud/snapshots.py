"""Snapshots: when a vm's disk may be frozen, restored and forgotten, and the tree they make.

What is then done, step by step, is in `operations` and `snapshot_steps`; what they stand on in
`layers`.
"""

import asyncio
import filecmp
import time
from pathlib import Path
from typing import Any

import msgspec

from oscloudd.cloud.disk_sizes import check_room
from oscloudd.cloud.heartbeat import PAUSED_BY_USER
from oscloudd.cloud.jobs import JobInfo, Jobs, Order
from oscloudd.cloud.layers import (
    MAX_LAYERS,
    find_mergeable,
    find_unneeded_layers,
    follow,
    forget_layers,
    layer_directory,
    layer_memory,
    layer_variables,
    read_chain,
    read_parents,
)
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.operations import Decide, Operations
from oscloudd.cloud.states import DOWN_STATES, VmState, WantedState
from oscloudd.cloud.suspended_files import SuspendedFiles
from oscloudd.cloud.suspension import Suspension
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_power import begin_end, refuse
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.config import Config
from oscloudd.errors import (
    AlreadyExistsError,
    CloudError,
    ExhaustedError,
    HostError,
    InvalidStateError,
    NotFoundError,
)
from oscloudd.host.image_header import is_blank
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Layer, Snapshot, Vm

_SNAPSHOT_STATES = DOWN_STATES - {VmState.SUSPENDED} | {VmState.RUNNING, VmState.PAUSED}


class SnapshotInfo(msgspec.Struct, frozen=True):
    """One member of `snapshot_list`'s answer.

    `parent` is the snapshot it was taken on top of, `current` the one that the disk stands on.
    `size` is the disk's, `allocated` what was written between the one below and this; bytes both.
    """

    id: int
    name: str
    vm: str
    description: str
    kind: str
    parent: str | None
    current: bool
    size: int
    allocated: int
    created_at: float


class SnapshotDeleted(msgspec.Struct, frozen=True):
    """The answer of `snapshot_delete`: `kept` where something still stands on its contents."""

    deleted: str
    vm: str
    kept: bool


class Snapshots:
    """The snapshots of all vms."""

    def __init__(
        self,
        config: Config,
        database: Database,
        suspension: Suspension,
        jobs: Jobs,
        operations: Operations,
    ) -> None:
        self._config = config
        self._database = database
        self._suspension = suspension
        self._jobs = jobs
        self._operations = operations

    async def list(self, key: int | str) -> list[SnapshotInfo]:
        """Describe the snapshots of a vm, the oldest first."""
        return [*await self._database.run(lambda: self._describe(read_vm(key)))]

    async def create(
        self, key: int | str, name: str, description: str, order: Order, *, memory: bool
    ) -> SnapshotInfo | JobInfo:
        """Keep a vm's disk as it is now under a name; its guest goes on if it runs.

        With `memory` what the guest has in it is kept, too, and it stands still for that long.
        """
        if memory:
            vm = await self._database.run(lambda: read_vm(key))
            await asyncio.to_thread(self._suspension.check_room, vm)

        def decide(vm: VmRecord) -> dict[str, Any]:
            if _find(vm, name) is not None:
                raise AlreadyExistsError(
                    f"vm {vm.name!r} has a snapshot {name!r} already",
                    hint=f"choose another name, or delete it: oscloudctl snapshot-delete {vm.name} "
                    f"{name}",
                    object="snapshot",
                    name=name,
                )
            if memory and vm.state in DOWN_STATES:
                refuse(vm, "frozen with its memory", "start it first, or leave its memory out")
            if memory:
                _check_has_no_data_disks(vm)
            params = {**self.decide_freeze(vm), "memory": memory}
            Snapshot.create(
                vm=vm.id,
                layer=params["layer"],
                name=name,
                description=description,
                kind="memory" if memory else "disk",
                created_at=time.time(),
            )
            return params

        done = await self._order("snapshot_create", key, order, decide)
        return done if isinstance(done, JobInfo) else await self._get(done, name)

    async def freeze(self, vm: VmRecord, name: str | None, order: Order) -> Layer:
        """Give the layer of a snapshot, or of the disk as it is now, which is frozen for that.

        A disk that nothing was written to since it was frozen is as what it stands on.
        """
        if name is not None:
            return await self._database.run(lambda: _get(vm, name))
        if not await asyncio.to_thread(self._is_as_frozen, vm):
            waiting = Order(order.owner_uid, order.listener)
            frozen = await self._order("disk_freeze", vm.id, waiting, self.decide_freeze)
            assert isinstance(frozen, VmRecord)
            vm = frozen
        return await self._database.run(lambda: _get_layer(vm.layer_id))

    def _is_as_frozen(self, vm: VmRecord) -> bool:
        """Tell whether a vm is down and nothing was written since its disk was frozen. Blocks."""
        if vm.layer_id is None or vm.state not in DOWN_STATES - {VmState.SUSPENDED}:
            return False
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        kept = layer_variables(self._config, vm.layer_id)
        is_remembered = not paths.variables.exists() or (
            kept.exists() and filecmp.cmp(paths.variables, kept, shallow=False)
        )
        return is_remembered and _is_blank(paths.disk)

    def decide_freeze(self, vm: VmRecord) -> dict[str, Any]:
        """Allow a vm's disk to be frozen and reserve the layer it becomes, in a transaction."""
        self._check_can_freeze(vm)
        layer = Layer.create(parent=vm.layer_id, size=vm.disk_size, created_at=time.time())
        is_paused = vm.state == VmState.PAUSED
        return {"layer": layer.id, "memory": False, "paused": is_paused}

    async def restore(
        self, key: int | str, name: str, order: Order, *, force: bool, disk_only: bool
    ) -> VmInfo | JobInfo:
        """Have a vm's disk as it was; what was written since is lost, but for other snapshots.

        A vm that runs is switched off for it, with `force` only, and started again. With the memory
        of its guest it goes on where that stood, unless `disk_only`.
        """
        vm = await self._database.run(lambda: read_vm(key))
        if not disk_only:
            await self._check_memory(vm, name)

        def decide(vm: VmRecord) -> dict[str, Any]:
            layer = _get(vm, name)
            resumes = _is_with_memory(vm, name) and not disk_only
            if resumes:
                _check_has_no_data_disks(vm)
            is_up = vm.state not in DOWN_STATES
            if is_up or vm.state == VmState.SUSPENDED:
                if not force:
                    hint = f"stop it first: oscloudctl vm-stop {vm.name}, or lose what it is doing"
                    refuse(vm, "restored", f"{hint} with --force")
                if vm.state in (VmState.CREATING, VmState.DELETING):
                    refuse(vm, "restored", f"see: oscloudctl vm-info {vm.name}")
            params = {"force": True, "timeout": 0.0, "pid": None}
            if is_up:
                params = begin_end(
                    vm, VmState.STOPPING, WantedState.RUNNING, force=True, timeout_seconds=0.0
                )
            elif resumes:
                check_memory(vm.mem_size, self._config.limits.overcommit)
            restored = {"layer": layer.id, "size": layer.size, "name": name, "resumes": resumes}
            return {**params, **restored, "stops": is_up, "runs_on": is_up or resumes}

        return _described(await self._order("snapshot_restore", key, order, decide))

    async def delete(self, key: int | str, name: str, order: Order) -> SnapshotDeleted | JobInfo:
        """Forget a snapshot; its contents stay for as long as something stands on them."""
        kept = False

        def decide(vm: VmRecord) -> dict[str, Any]:
            nonlocal kept
            layer_id = int(_get(vm, name).id)
            Snapshot.delete().where(Snapshot.layer == layer_id).execute()
            unneeded = find_unneeded_layers()
            forget_layers(unneeded)
            kept = layer_id not in unneeded
            return {"layer": layer_id, "layers": unneeded}

        vm = await self._database.run(lambda: read_vm(key))
        job = await self._carry_out("snapshot_delete", vm, order, decide)
        # While layers are merged the vm is free, and may be deleted or get another name.
        return job or SnapshotDeleted(name, vm.name, kept)

    async def _check_memory(self, vm: VmRecord, name: str) -> None:
        """Raise InvalidStateError or HostError where a snapshot's memory is of no use any more."""
        layer = await self._database.run(lambda: _get(vm, name))
        files = SuspendedFiles(layer_memory(self._config, layer.id))
        if not await self._database.run(lambda: _is_with_memory(vm, name)):
            return
        try:
            if not files.exists():
                raise HostError(f"{files.directory} is missing")
            await self._suspension.check(msgspec.structs.replace(vm, layer_id=layer.id), files)
        except CloudError as error:
            error.hint = "have its disk as it was, and start it anew: oscloudctl snapshot-restore "
            error.hint += f"{vm.name} {name} --disk-only"
            raise

    def _check_can_freeze(self, vm: VmRecord) -> None:
        if vm.state not in _SNAPSHOT_STATES or self._suspension.is_saved(vm):
            hint = f"see: oscloudctl vm-info {vm.name}"
            if vm.state == VmState.SUSPENDED:
                hint = f"resume it first: oscloudctl vm-resume {vm.name}"
            refuse(vm, "frozen", hint)
        if vm.state == VmState.PAUSED and vm.reason != PAUSED_BY_USER:
            refuse(vm, "frozen", f"it stands still for another reason: {vm.reason}")
        told = Vm.select(Vm.seed_document).where(Vm.id == vm.id).scalar()
        if told or not vm.identified:
            raise InvalidStateError(
                f"vm {vm.name!r} can't be frozen: its disk does not know yet who it is",
                hint="try again when it is ready and has come to rest",
                state=vm.state,
            )
        depth = len(read_chain(vm.layer_id))
        if depth >= MAX_LAYERS:
            raise ExhaustedError(
                f"the disk of vm {vm.name!r} stands on {depth} layers, and there may be "
                f"{MAX_LAYERS}",
                hint="delete one of its snapshots, which merges what has no name any more: "
                f"oscloudctl snapshot-delete {vm.name} NAME; many clones can be made of one",
                resource="layers",
                wanted=depth + 1,
                free=0,
            )

    async def _order(
        self, kind: str, key: int | str, order: Order, decide: Decide
    ) -> VmRecord | JobInfo:
        vm = await self._database.run(lambda: read_vm(key))
        check_room(self._config, "overlay")
        if kind in ("snapshot_create", "disk_freeze"):
            await self._make_room_below(vm, order)
        job = await self._carry_out(kind, vm, order, decide)
        if job is not None:
            return job
        return await self._database.run(lambda: read_vm(vm.id))

    async def _carry_out(
        self, kind: str, vm: VmRecord, order: Order, decide: Decide
    ) -> JobInfo | None:
        """Do it, and give None; the job instead, at once, where the order is not to wait."""
        begun = await self._operations.begin(kind, vm.id, order, decide)
        assert begun is not None
        job, task = begun
        if not order.wait:
            return await self._jobs.info(job.id)
        await asyncio.shield(task)
        return None

    async def _make_room_below(self, vm: VmRecord, order: Order) -> None:
        """Merge layers where a disk stands on as many as it may: clones may have left them."""

        def find(vm: VmRecord) -> dict[str, Any] | None:
            is_full = len(read_chain(vm.layer_id)) >= MAX_LAYERS
            return {} if is_full and find_mergeable(vm.layer_id) else None

        if await self._database.run(lambda: find(read_vm(vm.id))) is not None:
            begun = await self._operations.begin("layers_merge", vm.id, order, find)
            if begun is not None:
                await asyncio.shield(begun[1])

    async def _get(self, vm: VmRecord, name: str) -> SnapshotInfo:
        infos = await self._database.run(lambda: self._describe(vm))
        found = [info for info in infos if info.name == name]
        if not found:
            raise _missing(vm, name)
        return found[0]

    def _describe(self, vm: VmRecord) -> tuple[SnapshotInfo, ...]:
        rows = list(
            Snapshot.select(Snapshot, Layer)
            .join(Layer)
            .where(Snapshot.vm == vm.id, Layer.whole)
            .order_by(Snapshot.id)
        )
        names = {row.layer_id: str(row.name) for row in rows}
        parents = read_parents()
        current = _nearest(follow(vm.layer_id, parents), names)
        return tuple(
            SnapshotInfo(
                id=row.id,
                name=row.name,
                vm=vm.name,
                description=row.description,
                kind=row.kind,
                parent=_nearest(follow(row.layer.parent_id, parents), names),
                current=row.name == current,
                size=row.layer.size,
                allocated=_allocated(self._config, row.layer_id),
                created_at=row.created_at,
            )
            for row in rows
        )


def _nearest(chain: list[int], names: dict[int, str]) -> str | None:
    return next((names[layer_id] for layer_id in chain if layer_id in names), None)


def _allocated(config: Config, layer_id: int) -> int:
    files = layer_directory(config, layer_id).rglob("*")
    return sum(path.lstat().st_blocks * 512 for path in files if path.is_file())


def _find(vm: VmRecord, name: str) -> Snapshot | None:
    row: Snapshot | None = Snapshot.get_or_none(Snapshot.vm == vm.id, Snapshot.name == name)
    return row


def _get(vm: VmRecord, name: str) -> Layer:
    """Give the layer of a snapshot that has been taken; raises NotFoundError."""
    row = _find(vm, name)
    if row is None or not row.layer.whole:
        raise _missing(vm, name)
    layer: Layer = row.layer
    return layer


def _is_with_memory(vm: VmRecord, name: str) -> bool:
    row = _find(vm, name)
    return row is not None and row.kind == "memory"


def _check_has_no_data_disks(vm: VmRecord) -> None:
    """Raise InvalidStateError where a guest remembers more than its root disk as it was."""
    names = [name for (name,) in Disk.select(Disk.name).where(Disk.vm_id == vm.id).tuples()]
    if names:
        raise InvalidStateError(
            f"a snapshot with memory can't have vm {vm.name!r} with its data disks, which are no "
            f"part of it: {', '.join(names)}",
            hint="detach them first: oscloudctl disk-detach, or leave the memory out",
            state=vm.state,
        )


def _get_layer(layer_id: int | None) -> Layer:
    layer: Layer = Layer.get_by_id(layer_id)
    return layer


def _is_blank(disk: Path) -> bool:
    with disk.open("rb") as file:
        return is_blank(file, disk.stat().st_size)


def _missing(vm: VmRecord, name: str) -> NotFoundError:
    return NotFoundError(
        f"vm {vm.name!r} has no snapshot {name!r}",
        hint=f"see: oscloudctl snapshot-list {vm.name}",
        object="snapshot",
        name=name,
    )


def _described(answer: VmRecord | JobInfo) -> VmInfo | JobInfo:
    return answer if isinstance(answer, JobInfo) else describe(answer)
