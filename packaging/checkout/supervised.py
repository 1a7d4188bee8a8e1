"""A program that goes on when `make up` has ended: started detached, found and stopped again.

Its pid file says "pid starttime", so that a process which got the number later is never taken for
it, nor killed in its place.
"""

import os
import select
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages import CheckoutError

TAIL_LINES = 15


@dataclass(frozen=True)
class Supervised:
    """One program of the checkout: its name, its pid file and its log."""

    name: str
    pid_file: Path
    log: Path

    def find_pid(self) -> int | None:
        """Give its pid if it runs."""
        try:
            number, start_time = self.pid_file.read_text(encoding="ascii").split()
            pid = int(number)
        except (FileNotFoundError, ValueError):
            return None
        return pid if find_start_time(pid) == start_time else None

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start it in a session of its own, its output going to the log; give its pid."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment, cwd="/", start_new_session=True,
            )  # fmt: skip
        # It is somebody else's to reap once we are gone; until then a zombie counts as dead.
        process.returncode = 0
        start_time = find_start_time(process.pid)
        self.pid_file.write_text(f"{process.pid} {start_time}\n", encoding="ascii")
        return process.pid

    def stop(self, timeout_seconds: float) -> bool:
        """Ask it to stop and wait until it has; tell whether it ran.

        Raises CheckoutError if it doesn't stop: what it holds is better looked at than killed.
        """
        with self._watched() as pidfd:
            if pidfd is None:
                self.pid_file.unlink(missing_ok=True)
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if not select.select([pidfd], [], [], timeout_seconds)[0]:
                raise CheckoutError(
                    f"{self.name} did not stop within {timeout_seconds:.0f} s", f"see {self.log}"
                )
        self.pid_file.unlink(missing_ok=True)
        return True

    @contextmanager
    def _watched(self) -> Iterator[int | None]:
        pid = self.find_pid()
        if pid is None:
            yield None
            return
        pidfd = os.pidfd_open(pid)
        try:
            # Between the look and the opening the number may have gone to somebody else.
            yield pidfd if self.find_pid() == pid else None
        finally:
            os.close(pidfd)

    def explain_death(self, begin: int) -> CheckoutError:
        """Give the error for one that ended while it was starting, with its log since `begin`."""
        self.pid_file.unlink(missing_ok=True)
        with self.log.open("rb") as log:
            log.seek(begin)
            lines = deque(log.read().decode(errors="replace").splitlines(), TAIL_LINES)
        shown = "\n".join(f"  {line}" for line in lines) or "  (it said nothing)"
        return CheckoutError(
            f"{self.name} ended while it was starting:\n{shown}", f"see {self.log}"
        )

    def log_end(self) -> int:
        """Give the length of the log so far."""
        return self.log.stat().st_size if self.log.exists() else 0


def find_start_time(pid: int) -> str | None:
    """Give the process's start time in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # proc_pid_stat(5): the name in parentheses may hold anything; state and starttime are
    # fields 3 and 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
