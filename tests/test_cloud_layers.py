"""Rows of layers that become one."""

from test_cloud_given_ids import opened

from oscloudd.cloud.layers import (
    find_mergeable,
    find_pairs_above,
    read_chain,
    read_parents,
    record_merged,
)
from oscloudd.store.models import Disk, Layer


def insert_layers(*parents: int | None, whole: bool = True) -> None:
    for parent in parents:
        Layer.create(parent=parent, size=1, whole=whole, created_at=0.0)


def insert_disk(layer: int) -> None:
    Disk.create(name=f"on-{layer}", size=1, layer_id=layer, created_at=0.0)


def test_the_lower_of_a_pair_goes() -> None:
    with opened() as run:
        run(lambda: insert_layers(None, 1, 2))
        run(lambda: insert_disk(3))
        assert run(lambda: find_mergeable(3)) == [(2, 1), (3, 2)]
        assert run(lambda: record_merged(3, 2)) is True
        assert run(read_parents) == {1: None, 3: 1}
        assert run(lambda: record_merged(3, 2)) is False
        assert run(lambda: record_merged(3, 1)) is True
        assert run(read_parents) == {3: None}


def test_a_lower_one_that_is_needed_by_now_stays_for_others_only() -> None:
    with opened() as run:
        run(lambda: insert_layers(None, 1, 2))
        run(lambda: insert_disk(3))
        run(lambda: insert_disk(2))  # of a clone, which was begun while the two were merged
        assert run(lambda: record_merged(3, 2)) is False
        assert run(lambda: [read_chain(layer) for layer in (3, 2)]) == [[3, 1], [2, 1]]
        assert run(lambda: find_mergeable(3)) == []


def test_a_layer_that_another_stands_on_by_now_stays() -> None:
    with opened() as run:
        run(lambda: insert_layers(None, 1, 1))
        assert run(lambda: record_merged(2, 1)) is False
        assert run(read_parents) == {1: None, 2: None, 3: 1}


def test_all_that_stands_on_a_layer_is_found_and_nothing_else() -> None:
    with opened() as run:
        run(lambda: insert_layers(None, 1, 2, 3, 2, 1))
        run(lambda: insert_layers(3, whole=False))  # there may be no file of that yet
        assert run(lambda: find_pairs_above(2)) == [(3, 2), (4, 3), (5, 2)]
        assert run(lambda: find_pairs_above(4)) == []
