"""What tests make once and keep below `.run/test`, until what it is made from changes."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".run/test"


def keep(directory: Path, make: Callable[[Path], object]) -> Path:
    """Give a directory; `make` fills it first, under another name, where it is not there yet.

    Its name is `<what>-<digest>`: others of that `<what>` are outdated and removed. Who comes
    while it is being made, from another process of the same run, waits for that.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    what = directory.name.rpartition("-")[0]
    with directory.with_name(f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            for outdated in directory.parent.glob(f"{what}-*"):
                shutil.rmtree(outdated)
            part = Path(f"{directory}.part")
            make(part)
            part.rename(directory)
    return directory
