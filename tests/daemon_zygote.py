"""Many daemons, one after the other, without their half second of imports.

A zygote is a process in the box's namespace that has imported all of the daemon, has one thread and
has never had an event loop; on request it forks, and the child becomes a daemon. When it ends, the
kernel kills what it has forked (PR_SET_PDEATHSIG), so nothing is left behind.

    python tests/daemon_zygote.py --config PATH      reads requests, one a line:

    start LOG      answers the pid of a new daemon that writes its output to LOG
    reap PID       waits for one to end and answers its status, as os.waitstatus_to_exitcode has it
"""

import contextlib
import ctypes
import gc
import importlib
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dying_daemon
from daemon_process import LIMIT_SECONDS, Box

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1


class ZygoteDaemon:
    """A daemon that a zygote has forked; looks like the `subprocess.Popen` it stands in for."""

    def __init__(self, zygote: "Zygote", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        self.pidfd = os.pidfd_open(pid)  # not reaped until we say so: the pid is its own

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.pidfd], [], [], 0)[0]:
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("oscloudd", timeout or 0)
            self._reap()
        assert self.returncode is not None
        return self.returncode

    def _reap(self) -> None:
        self.returncode = int(self._zygote.ask(f"reap {self.pid}"))
        os.close(self.pidfd)


class Zygote:
    """The process that forks daemons; `close` ends it, and with it every daemon of its."""

    def __init__(self, box: Box) -> None:
        self._log = box.root / "daemon.log"
        config = str(box.root / "oscloud.toml")
        program = [sys.executable, str(Path(__file__).resolve()), "--config", config]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", box.namespace, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "TMPDIR": str(box.root / "tmp"),
                "NOTIFY_SOCKET": str(box.root / "notify"),
            },
            start_new_session=True,
        )
        assert self._line() == "ready", "the zygote has not come up"

    def ask(self, request: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n".encode())
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line.endswith("\n"), "the zygote has ended"
        return line.strip()

    def start(self) -> ZygoteDaemon:
        return ZygoteDaemon(self, int(self.ask(f"start {self._log}")))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in self._process.stdin, self._process.stdout:
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class ZygoteBox(Box):
    """A box whose daemons come from a zygote and can be told where to die."""

    daemon: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self.root / "notify"))
        try:
            self.zygote = Zygote(self)
        except BaseException:
            self._end_by_force()
            raise

    def spawn(self) -> Any:
        with contextlib.suppress(BlockingIOError):
            while self._notify.recv(4096, socket.MSG_DONTWAIT):
                pass
        return self.zygote.start()

    def start(self) -> None:
        """Start a daemon and wait until it serves."""
        assert self.start_or_die(), f"the daemon died:\n{self.log()[-3000:]}"

    def start_or_die(self, death: dying_daemon.Death | None = None) -> bool:
        """Start a daemon that is to die there; False when it has before it served."""
        if death is not None:
            dying_daemon.write_death(self.root / "oscloud.toml", death)
        self.daemon = self.spawn()
        end = time.monotonic() + LIMIT_SECONDS
        while True:
            watched = [self._notify, self.daemon.pidfd]
            ready = select.select(watched, [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"the daemon does not serve:\n{self.log()[-3000:]}"
            if self._notify not in ready:
                return False
            if b"READY=1" in self._notify.recv(4096).splitlines():
                return True

    def until(self, look: Callable[[], bool], what: str) -> None:
        """Look often: what is waited for here takes milliseconds, a thousand times."""
        end = time.monotonic() + LIMIT_SECONDS
        while not look():
            dead = self.daemon is not None and self.daemon.poll() is not None
            assert not dead, f"the daemon died:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"{what} did not happen:\n{self.log()[-3000:]}"
            time.sleep(0.003)

    def arm(self, death: dying_daemon.Death | None) -> None:
        """Have the daemon that runs die there."""
        dying_daemon.arm(self.root / "oscloud.toml", self.daemon.pid, death)

    def discard(self) -> None:
        """End and remove it all, whatever state it is in."""
        self._end_by_force()

    def _end_by_force(self) -> None:
        if hasattr(self, "zygote"):
            self.zygote.close()
        if self.daemon is not None:  # killed with its zygote, which can't be asked any more
            if self.daemon.returncode is None:
                os.close(self.daemon.pidfd)
            self.daemon = None
        self._notify.close()
        super()._end_by_force()


# In the process itself


def import_all() -> None:
    """Import every module of the daemon, so that no fork has to."""
    package = importlib.import_module("oscloudd")
    for module in pkgutil.walk_packages(package.__path__, "oscloudd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def serve() -> bool:
    """Answer requests; False at their end, True in a child, which is to become a daemon."""
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        request, _, argument = line.decode().strip().partition(" ")
        if request == "start":
            zygote = os.getpid()
            pid = os.fork()
            if pid == 0:
                become_nobodys_child(zygote, argument)
                return True
            print(pid, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1]), flush=True)
    return False


def become_nobodys_child(zygote: int, log: str) -> None:
    """Be as a process that was started afresh: own session, own log, nothing else open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        os._exit(1)
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, number)
    os.dup2(1, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import_all()
    gc.freeze()
    if serve():
        dying_daemon.main()
