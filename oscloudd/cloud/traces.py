"""What there is of vms, disks and layers outside the database: directories, logs, processes, by id.

Lists and removes; whose an id is, and so what may be removed, is for `given_ids` to say.
"""

import asyncio
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from oscloudd.cloud.vm_paths import layers_directory, spares_run_directory
from oscloudd.config import Config
from oscloudd.errors import HostError, NotFoundError
from oscloudd.host.processes import (
    ProcessIdentity,
    WorkingProcess,
    find_processes_below,
    is_same_process,
    open_process,
)
from oscloudd.host.sessions import end_session

# No cloud comes that far, and skipping more would use up MariaDB's 2^31.
_HIGHEST_ID = 1_000_000_000
_ID = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)
_LOG = re.compile(r"vm-(.*?)(\.console)?\.log", re.DOTALL)


@dataclass
class Traces:
    """What there is of one vm, disk or layer."""

    name: str  # "vm 7"
    number: int
    processes: list[ProcessIdentity] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def parts(self) -> list[str]:
        """Name everything."""
        processes = [f"process {identity.pid}" for identity in self.processes]
        return [*processes, *(str(path) for path in self.paths)]


@dataclass(frozen=True)
class Listing:
    """What there is of all of them, and what has a name that we never give.

    `spares` are the processes of spare clones, which are no vm's.
    """

    vms: dict[int, Traces]
    disks: dict[int, Traces]
    layers: dict[int, Traces]
    strange: list[str]
    spares: list[ProcessIdentity]


def list_traces(config: Config) -> Listing:
    """List what there is; blocks. Raises HostError when a directory can't be read."""
    strange: list[str] = []
    vms = _Collector("vm", strange)
    disks = _Collector("disk", strange)
    # First: one that becomes a vm's meanwhile is seen twice then, and not never.
    spares = find_processes_below(spares_run_directory(config))
    run_directories = config.runtime_path / "vms"
    for path in _entries(run_directories):
        vms.add_path(path.name, path)
    for found in find_processes_below(run_directories):
        vms.add_process(found)
    for path in _entries(config.log_path):
        if (match := _LOG.fullmatch(path.name)) is not None:
            vms.add_path(match[1], path)
    for path in _entries(config.state_path / "disks"):
        disks.add_path(path.name, path)
    layers = _Collector("layer", strange)
    for path in _entries(layers_directory(config)):
        layers.add_path(path.name, path)
    spare_processes = [found.identity for found in spares]
    return Listing(vms.by_number, disks.by_number, layers.by_number, strange, spare_processes)


async def remove_traces(traces: Traces) -> list[str]:
    """End the processes, then remove the files; name what was still there.

    Raises HostError or OSError for what can't be removed.
    """
    ended = []
    for identity in traces.processes:
        try:
            process = open_process(identity)
        except NotFoundError:
            continue
        await end_session(process)
        if is_same_process(identity):
            raise HostError(f"process {identity.pid} does not die")
        ended.append(f"process {identity.pid}")
    return ended + await asyncio.to_thread(_remove_paths, traces.paths)


class _Collector:
    """Sorts what is found by the id in its name."""

    def __init__(self, noun: str, strange: list[str]) -> None:
        self.by_number: dict[int, Traces] = {}
        self._noun = noun
        self._strange = strange

    def add_path(self, name: str, path: Path) -> None:
        if (traces := self._find(name)) is not None:
            traces.paths.append(path)
        else:
            self._strange.append(str(path))

    def add_process(self, found: WorkingProcess) -> None:
        if (traces := self._find(found.directory.name)) is not None:
            traces.processes.append(found.identity)
        else:
            self._strange.append(f"process {found.identity.pid} in {found.directory}")

    def _find(self, name: str) -> Traces | None:
        number = _parse_id(name)
        if number is None:
            return None
        return self.by_number.setdefault(number, Traces(f"{self._noun} {number}", number))


def _parse_id(name: str) -> int | None:
    if _ID.fullmatch(name) is None or int(name) > _HIGHEST_ID:
        return None
    return int(name)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"{directory} can't be read: {error.strerror}") from error


def _remove_paths(paths: list[Path]) -> list[str]:
    removed = []
    for path in paths:
        try:
            # A link is ours by its name; what it leads to is not.
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue  # its deletion was under way and has come to its end
        removed.append(str(path))
    return removed
