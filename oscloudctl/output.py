"""Answers on standard output: tables and fields for people, JSON and ids for programs."""

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

Row = dict[str, Any]

EMPTY = "-"
_SIZES = {"mem_size", "disk_size", "size", "allocated", "layers_allocated"}
_TIMES = {"created_at", "built_at", "finished_at"}

# ECMA-48: CSI with its parameters and final byte, OSC up to BEL or ST, two-byte sequences.
_CONTROL_SEQUENCE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -Z\\^-~])"
)


class Column(NamedTuple):
    """One column of a table: its title and the key of the value below it."""

    title: str
    key: str


def print_json(value: Any) -> None:
    """Print an answer as the daemon gave it, indented."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_list(
    rows: list[Row], columns: Sequence[Column], *, as_json: bool, ids_only: bool
) -> None:
    """Print the objects of a list as asked for: JSON, ids, or a table."""
    if as_json:
        print_json(rows)
    elif ids_only:
        print_ids(rows)
    else:
        print_table(rows, columns)


def print_objects(objects: list[Row], *, as_json: bool, ids_only: bool = False) -> None:
    """Print one object or several in full: JSON (a list if they are several), ids, or fields."""
    if as_json:
        print_json(objects[0] if len(objects) == 1 else objects)
    elif ids_only:
        print_ids(objects)
    else:
        for number, item in enumerate(objects):
            if number:
                click.echo()
            print_fields(item)


def print_ids(rows: list[Row]) -> None:
    """Print one id a line; what has none (templates) has its name for one."""
    for row in rows:
        click.echo(str(row.get("id", row.get("name"))))


def print_table(rows: list[Row], columns: Sequence[Column]) -> None:
    """Print aligned columns; on a terminal no line is wider than it, elsewhere nothing is cut.

    An empty cell is a `-`, so that a program that splits at blanks counts columns right.
    """
    lines = [[column.title for column in columns]]
    lines += [[format_value(column.key, row.get(column.key)) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    limit = _terminal_width()
    for cells in lines:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        line = "  ".join(padded).rstrip()
        click.echo(line if limit is None or len(line) <= limit else line[: limit - 1] + "…")


def print_fields(item: Row) -> None:
    """Print an object as `key  value` lines; a list takes a line for each member."""
    width = max(map(len, item), default=0)
    for key, value in item.items():
        members = value if isinstance(value, list) and value else [value]
        for number, member in enumerate(members):
            title = key if number == 0 else ""
            click.echo(f"{title.ljust(width)}  {format_value(key, member)}")


def format_value(key: str, value: Any) -> str:
    """Write one value for people; the key says whether it is a size, a time or a duration."""
    if value is None or value == "" or value == []:
        return EMPTY
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _format_number(key, value)
    if isinstance(value, dict):
        return " ".join(f"{name}={format_value(name, each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(format_value(key, each) for each in value)
    return make_printable(str(value)).replace("\n", " ")


def _format_number(key: str, value: float) -> str:
    if key in _SIZES:
        return format_size(int(value))
    if key in _TIMES:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if key.endswith("_seconds"):
        return format_duration(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_size(size_bytes: int) -> str:
    """Write bytes the way the parameters take them: binary K, M, G, T, one decimal if need be."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.1f}".removesuffix(".0") + unit
    return str(size_bytes)


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def make_printable(text: str) -> str:
    """Drop control characters: what a guest printed must not drive the terminal it is shown on."""
    text = _CONTROL_SEQUENCE.sub("", text)
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


def print_guest_text(text: str) -> None:
    """Print what a guest or qemu wrote; as it is into a file or pipe, harmless on a terminal."""
    # `color` keeps click from dropping escape sequences when it writes to a pipe.
    click.echo(make_printable(text) if sys.stdout.isatty() else text, nl=False, color=True)
    if text and not text.endswith("\n"):
        click.echo()


def _terminal_width() -> int | None:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None
