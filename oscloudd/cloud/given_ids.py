"""Whose an id is: of this database, one deleted from it, or another database's.

An id is given once. So one that this database has given and has no row for was deleted here, and
one it has never given comes from another database, or from a newer state of this one, before an
older copy was put back. Such ids are never given from then on, and that they are not ours is
remembered. Everything here is for inside a transaction.
"""

import msgspec

from oscloudd.store.ids import highest_id_given, never_give_up_to
from oscloudd.store.models import Disk, Layer, Meta, Table, Vm

_Range = tuple[int, int]  # first and last
_REMEMBERED: dict[type[Table], str] = {
    Vm: "foreign_vm_ids",
    Disk: "foreign_disk_ids",
    Layer: "foreign_layer_ids",
}


class GivenIds(msgspec.Struct, frozen=True):
    """The ids of one table as they were when asked."""

    rows: frozenset[int]
    highest: int
    foreign: tuple[_Range, ...]

    def is_deleted(self, number: int) -> bool:
        """Tell whether this database has given the id and has no row for it any more."""
        return number <= self.highest and number not in self.rows and not self._is_set_aside(number)

    def is_foreign(self, number: int) -> bool:
        """Tell whether this database has never given the id."""
        return number not in self.rows and not self.is_deleted(number)

    def _is_set_aside(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.foreign)


def read_given_ids(table: type[Table]) -> GivenIds:
    """Read which ids of the table are whose."""
    return GivenIds(
        rows=frozenset(number for (number,) in table.select(table.id).tuples()),
        highest=highest_id_given(table),
        foreign=tuple(_read_foreign(table)),
    )


def set_aside(table: type[Table], number: int) -> None:
    """Never give an id up to `number`, and remember which of them were not given until now.

    Nothing else may be written in the transaction: MariaDB commits in the middle of it.
    """
    highest = highest_id_given(table)
    # One beyond what was given is from an attempt that was cut short, and is made again below.
    foreign = [known for known in _read_foreign(table) if known[1] <= highest]
    if number > highest:
        foreign.append((highest + 1, number))
        # In this order: ids that are skipped and not remembered would pass for deleted ones.
        text = msgspec.json.encode(foreign).decode()
        Meta.replace(name=_REMEMBERED[table], value=text).execute()
        never_give_up_to(table, number)


def _read_foreign(table: type[Table]) -> list[_Range]:
    row = Meta.get_or_none(Meta.name == _REMEMBERED[table])
    return [] if row is None else msgspec.json.decode(row.value, type=list[_Range])
