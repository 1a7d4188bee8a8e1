"""The file a guest's serial output is kept in: reading its end, keeping its size in bounds.

qemu itself writes it, through a descriptor with O_APPEND, so it is complete even while no daemon is
there. Everything here blocks for as long as a disk takes and belongs in a worker thread.
"""

import os
from pathlib import Path

LIMIT_BYTES = 8 << 20
KEPT_BYTES = 1 << 20
TAIL_BYTES = 64 << 10

_LAST_LINES = 20


def read_log_tail(path: Path, limit_bytes: int = TAIL_BYTES) -> bytes:
    """Give the end of a log; b"" when there is none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - limit_bytes))
            return log.read(limit_bytes)
    except FileNotFoundError:
        return b""


def trim_log(path: Path) -> bool:
    """Cut a log beyond 8 MiB down to its last MiB, in place; tell whether it was.

    qemu keeps the file open and goes on at the new end; what it writes between the reading and the
    cutting is lost.
    """
    try:
        if path.stat().st_size <= LIMIT_BYTES:
            return False
        tail = read_log_tail(path, KEPT_BYTES)
        os.truncate(path, 0)
    except FileNotFoundError:
        return False
    with path.open("ab") as log:
        log.write(tail[tail.find(b"\n") + 1 :])
    return True


def read_last_lines(path: Path, *, since: int = 0) -> str:
    """Give the last twenty lines behind byte `since` of what a program has printed."""
    printed = read_log_tail(path, max(0, path.stat().st_size - since))
    return "\n".join(printed.decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:])
