"""The daemon, with a hook by which a test makes it kill itself at a chosen point.

The hook is put in from here, by replacing functions of the program; the program knows nothing of
it. A test writes a `Death` to a file beside the configuration and signals SIGUSR1; the daemon reads
it, removes the file, and counts from there. `arm` does that, and may be called again. A file that
is there when a daemon starts is read then.

    python tests/dying_daemon.py --config PATH
"""

import dataclasses
import functools
import importlib
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 90.0


@dataclasses.dataclass(frozen=True)
class Death:
    """Where the daemon is to kill itself.

    `at` a step: the step `number` of an operation of this `kind`, `before` it is written down that
    it is done, or `after`. `at` a transaction: the one that is begun as `number`, counted from 1
    from the arming, `before` its commit or `after`. `at` a process: likewise, at its start. `at` a
    renaming: likewise, of a file or directory. `at` durable: likewise, where a file is made to
    survive a power cut.
    """

    at: Literal["step", "transaction", "process", "renaming", "durable"]
    number: int
    when: Literal["before", "after"]
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.kind + ' ' if self.kind else ''}{self.when} {self.at} {self.number}"


class Hook:
    """What the replaced functions tell how far they are; ends the process when it is time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.death: Death | None = None
        self.counts: dict[str, int] = {}

    def read(self, *_signal: object) -> None:
        """Take a new death from the file; none when it says null."""
        given = json.loads(self.path.read_text())
        self.death = None if given is None else Death(**given)
        self.counts = {}
        self.path.unlink()

    def count(self, at: str) -> int:
        self.counts[at] = self.counts.get(at, 0) + 1
        return self.counts[at]

    def reach(self, at: str, when: str, number: int, kind: str = "") -> None:
        if self.death == Death(at, number, when, kind):
            os.kill(os.getpid(), signal.SIGKILL)


def hook_path(config: Path) -> Path:
    return config.with_name("death.json")


def write_death(config: Path, death: Death | None) -> Path:
    path = hook_path(config)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(death and dataclasses.asdict(death)))
    return new.rename(path)


def arm(config: Path, pid: int, death: Death | None) -> None:
    """Have the daemon of this configuration die at `death`, or not at all with None.

    Returns when it knows; also when it is dead.
    """
    path = write_death(config, death)
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGUSR1)
        for _ in range(int(LIMIT_SECONDS / 0.001)):
            if not path.exists() or select.select([pidfd], [], [], 0.001)[0]:
                break
        else:
            raise AssertionError("the daemon does not take its death")
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
        path.unlink(missing_ok=True)


def install(hook: Hook) -> None:
    """Put the hook into the functions of the program."""
    _hook_transactions(hook)
    _hook_function(hook, "process", "oscloudd.host.processes", "start_process")
    _hook_function(hook, "durable", "oscloudd.host.images", "durable")
    _hook_steps(hook)
    _hook_renamings(hook)
    signal.signal(signal.SIGUSR1, hook.read)
    if hook.path.exists():
        hook.read()


def _hook_transactions(hook: Hook) -> None:
    from oscloudd.store.database import Database

    do = Database._do

    @functools.wraps(do)
    def dying_do(self: Any, piece: Any) -> Any:
        number = hook.count("transaction")
        work = piece.work

        def dying_work() -> Any:
            result = work()
            hook.reach("transaction", "before", number)
            return result

        piece.work = dying_work
        result = do(self, piece)
        hook.reach("transaction", "after", number)
        return result

    Database._do = dying_do


def _hook_function(hook: Hook, at: str, module_name: str, name: str) -> None:
    """Replace a function everywhere that it was imported by its name."""
    original = getattr(importlib.import_module(module_name), name)

    @functools.wraps(original)
    def dying(*arguments: Any, **named: Any) -> Any:
        number = hook.count(at)
        hook.reach(at, "before", number)
        result = original(*arguments, **named)
        hook.reach(at, "after", number)
        return result

    for module_there, module in list(sys.modules.items()):
        if module_there.startswith("oscloudd.") and getattr(module, name, None) is original:
            setattr(module, name, dying)


def _hook_renamings(hook: Hook) -> None:
    for name in ("rename", "replace"):
        do = getattr(Path, name)

        @functools.wraps(do)
        def dying_do(self: Path, target: Any, do: Any = do) -> Any:
            number = hook.count("renaming")
            hook.reach("renaming", "before", number)
            result = do(self, target)
            hook.reach("renaming", "after", number)
            return result

        setattr(Path, name, dying_do)


def _hook_steps(hook: Hook) -> None:
    from oscloudd.cloud.operations import Operations

    step_done = Operations.step_done

    @functools.wraps(step_done)
    async def dying_step_done(self: Any, job: Any, number: int, name: str) -> None:
        hook.reach("step", "before", number, job.kind)
        await step_done(self, job, number, name)
        hook.reach("step", "after", number, job.kind)

    Operations.step_done = dying_step_done


def main() -> None:
    from oscloudd.main import main as daemon_main

    config = Path(sys.argv[sys.argv.index("--config") + 1])
    install(Hook(hook_path(config)))
    daemon_main()


if __name__ == "__main__":
    # As `python -m oscloudd` in the checkout would: its own package, and not one that is installed.
    sys.path[0] = str(ROOT)
    main()
