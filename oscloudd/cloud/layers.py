"""Layers: what were the overlays of disks until they were frozen, and who stands on which.

A disk is an overlay on a layer, that one on its parent, and the lowest on a warm image's frozen
disk or a template's image. A snapshot is a layer with a name. A layer is kept for as long as a
disk, a snapshot or another layer stands on it. All that reads rows is for inside a transaction.
"""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from oscloudd.cloud.vm_paths import layers_directory
from oscloudd.config import Config
from oscloudd.store.models import Disk, Layer, Snapshot

# qemu looks through all of them for each cluster that the upper ones lack.
MAX_LAYERS = 32


def layer_directory(config: Config, layer_id: int) -> Path:
    """Give the directory of a layer."""
    return layers_directory(config) / str(layer_id)


def layer_disk(config: Config, layer_id: int) -> Path:
    """Give the qcow2 of a layer, which nobody writes to."""
    return layer_directory(config, layer_id) / "disk.qcow2"


def layer_memory(config: Config, layer_id: int) -> Path:
    """Give the directory of what a guest had in memory when its disk was frozen."""
    return layer_directory(config, layer_id) / "memory"


def layer_variables(config: Config, layer_id: int) -> Path:
    """Give the file of what a guest's firmware remembered when its disk was frozen, if any does."""
    return layer_directory(config, layer_id) / "variables.fd"


def remove_layers(config: Config, layer_ids: Iterable[int]) -> None:
    """Remove the files of layers; blocks. What is left of them has no row, and is swept out."""
    for layer_id in layer_ids:
        shutil.rmtree(layer_directory(config, layer_id), ignore_errors=True)


def read_chain(layer_id: int | None) -> list[int]:
    """Give a layer and all below it, the top first."""
    return follow(layer_id, read_parents()) if layer_id is not None else []


def find_unneeded_layers() -> list[int]:
    """Give the layers that nothing stands on; children first."""
    parents = read_parents()
    needed: set[int] = set()
    for top in _read_tops():
        needed.update(follow(top, parents))
    rows = Layer.select(Layer.id).where(Layer.whole).order_by(Layer.id.desc()).tuples()
    return [layer_id for (layer_id,) in rows if layer_id not in needed]


def find_mergeable(layer_id: int | None) -> list[tuple[int, int]]:
    """Give pairs of layers that may become one, in the tree that a layer is in, the lowest first.

    The upper one comes first in a pair; the lower one has no name, and nothing else stands on it.
    """
    parents = read_parents()
    root = follow(layer_id, parents)[-1:]
    needed, whole = _read_tops(), _read_whole()
    dependants = Counter(parents.values())
    pairs = [
        (len(follow(upper, parents)), upper, lower)
        for upper, lower in parents.items()
        if lower is not None
        and {upper, lower} <= whole
        and lower not in needed
        and dependants[lower] == 1
        and follow(lower, parents)[-1:] == root
    ]
    return [(upper, lower) for _depth, upper, lower in sorted(pairs)]


def find_pairs_above(layer_id: int) -> list[tuple[int, int]]:
    """Give the layers that stand on one, at whatever distance, each with that right below it."""
    parents, whole = read_parents(), _read_whole()
    return sorted(
        (upper, lower)
        for upper, lower in parents.items()
        if lower is not None and upper in whole and layer_id in follow(lower, parents)
    )


def record_merged(upper: int, lower: int) -> bool:
    """Write down that the upper of a pair has all of the lower one; tell whether that goes.

    It stays where something else has come to stand on it meanwhile.
    """
    parents = read_parents()
    if parents.get(upper) != lower:  # deleted meanwhile
        return False
    Layer.update(parent=parents.pop(lower)).where(Layer.id == upper).execute()
    del parents[upper]
    if lower in _read_tops() or lower in parents.values():
        return False
    forget_layers([lower])
    return True


def forget_layers(layer_ids: Iterable[int]) -> None:
    """Remove the rows of layers, of which children come first."""
    for layer_id in layer_ids:
        Layer.delete().where(Layer.id == layer_id).execute()


def read_parents() -> dict[int, int | None]:
    """Give what each layer stands on."""
    return dict(Layer.select(Layer.id, Layer.parent).tuples())


def _read_tops() -> set[int]:
    """Give the layers that a disk stands on, and those that have a name."""
    disks = Disk.select(Disk.layer_id).where(Disk.layer_id.is_null(is_null=False))
    snapshots = Snapshot.select(Snapshot.layer)
    return {each for (each,) in [*disks.tuples(), *snapshots.tuples()]}


def _read_whole() -> set[int]:
    return {each for (each,) in Layer.select(Layer.id).where(Layer.whole).tuples()}


def follow(layer_id: int | None, parents: dict[int, int | None]) -> list[int]:
    """Give a layer and all below it, the top first, by what `read_parents` has said."""
    chain = []
    while layer_id is not None:
        chain.append(layer_id)
        layer_id = parents[layer_id]
    return chain
