"""Merging layers: one that has no name any more becomes part of the one that stands on it.

Else a vm whose snapshots are taken and deleted in turn would stand on one more with each. The upper
layer gets another file, which reads the same and stands on what the lower one did, and then another
row; a qemu that has its old file open goes on with that. Disks, which are written to, are never
merged with what they stand on.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from oscloudd.cloud.disk_chain import check_frozen, disk_chain, stands_on
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.layers import (
    find_mergeable,
    find_pairs_above,
    follow,
    layer_disk,
    read_parents,
    record_merged,
)
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_records import VmRecord, find_vm
from oscloudd.config import Config
from oscloudd.errors import CloudError, ExhaustedError
from oscloudd.host.image_chain import Layer, OpenLayer, measure, open_chain
from oscloudd.host.images import durable
from oscloudd.host.merging import merge
from oscloudd.host.resources import disk_free_bytes
from oscloudd.host.users import resolve_qemu_user
from oscloudd.store.database import Database
from oscloudd.units import format_size

_log = logging.getLogger(__name__)


class LayerMerger:
    """Merges the layers of one cloud, one pair at a time."""

    def __init__(
        self, config: Config, database: Database, templates: Templates, chains: LayerChains
    ) -> None:
        self._config = config
        self._database = database
        self._templates = templates
        self._chains = chains
        self._user = resolve_qemu_user(config.qemu.user).name
        self._turn = asyncio.Lock()

    async def merge_all(self, vm: VmRecord, job: Job) -> None:
        """Merge what can be of the layers of a vm, and of all that have the lowest in common.

        What can't be is left for the next time, and said in the log.
        """
        left: set[tuple[int, int]] = set()
        async with self._turn:
            while pairs := [each for each in await self._find(vm) if each not in left]:
                upper, lower = pairs[0]
                try:
                    half_done = await self._find_half_done(upper)
                    await self._merge(vm, *(half_done or pairs[0]), job)
                except (CloudError, OSError) as error:  # it may be deleted just now
                    _log.warning(
                        "vm %d (%s): layer %d stays below layer %d for now: %s",
                        vm.id, vm.name, lower, upper, error,
                    )  # fmt: skip
                    left.add(pairs[0])

    async def _find(self, vm: VmRecord) -> list[tuple[int, int]]:
        def find() -> list[tuple[int, int]]:
            now = find_vm(vm.id)
            return [] if now is None else find_mergeable(now.layer_id)

        return await self._database.run_when_available(find)

    async def _find_half_done(self, layer_id: int) -> tuple[int, int] | None:
        """Give a pair above a layer that is one by what its upper one says, and two by the rows.

        That names what is below the pair, which must have a row until this is written down. Raises
        HostError when it can't be told.
        """
        pairs = await self._database.run_when_available(lambda: find_pairs_above(layer_id))

        def is_half_done(pair: tuple[int, int]) -> bool:
            upper, lower = (Layer(layer_disk(self._config, each), "qcow2") for each in pair)
            return not stands_on(upper, lower)

        return await asyncio.to_thread(lambda: next(filter(is_half_done, pairs), None))

    async def _merge(self, vm: VmRecord, upper: int, lower: int, job: Job) -> None:
        what = f"layer {lower} into layer {upper}"
        job.report("merging", what)
        parents = await self._database.run_when_available(read_parents)
        if parents.get(upper) != lower:  # deleted meanwhile
            return
        template = self._templates.get_ready(vm.template)
        # Those that a vm and its clones stand on have the same below them.
        chain = disk_chain(self._config, vm, template, follow(upper, parents))[1:]
        await asyncio.to_thread(check_frozen, chain, template)
        if not await asyncio.to_thread(stands_on, *chain[:2]):
            # An earlier daemon came as far as that, and perhaps not to the disk with the name.
            await asyncio.to_thread(durable, chain[0].path)
        else:
            with open_chain(chain) as opened:
                await self._check_room(chain[0].path.parent, opened)
                await merge(
                    opened,
                    layer_disk(self._config, upper),
                    self._user,
                    on_fraction=lambda done: job.report("merging", what, done),
                )
        await self._chains.remove(lower, lambda: record_merged(upper, lower))

    async def _check_room(self, directory: Path, opened: Sequence[OpenLayer]) -> None:
        """Raise ExhaustedError unless there is room for the two as one, and a copy of the upper.

        Raises HostError, too, while a qemu that has not been heard of writes to either: to it they
        are no layers yet.
        """
        least = self._config.limits.min_free_disk_bytes()
        wanted = await measure(opened[:2], self._user)
        wanted += os.fstat(opened[0].fd).st_blocks * 512
        free = disk_free_bytes(directory)
        if free - wanted < least:
            raise ExhaustedError(
                f"{directory} has {format_size(free)} free: to merge them takes "
                f"{format_size(wanted)}, and {format_size(least)} are to stay free",
                resource="disk",
                free=free,
                wanted=wanted,
            )
