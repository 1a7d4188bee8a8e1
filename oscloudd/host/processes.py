"""Processes of this box: starting one, telling which one it is, signalling it, seeing it end.

Owns every pidfd. A pid alone is never signalled: the kernel reuses it, so a process is named by its
pid, its start time and the boot it belongs to. Short commands are `commands.py`, built on this.
"""

import asyncio
import errno
import functools
import os
import pwd
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from oscloudd.errors import HostError, InvalidStateError, NotFoundError, OperationTimeoutError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What a child may know of our environment: where temporary files go and how to reach the internet.
_INHERITED = (
    "HOME", "TMPDIR", "SOURCE_DATE_EPOCH",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
)  # fmt: skip

# Which package of Debian has a command; everything else carries its own name.
_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "ip": "iproute2",
    "nft": "nftables",
    "dnsmasq": "dnsmasq-base",
    "ssh-keygen": "openssh-client",
    "mke2fs": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "prlimit": "util-linux",
}

# Positions in /proc/PID/stat counted from the state, the first field after "(comm)": proc(5).
_STATE, _SESSION, _USER_TICKS, _SYSTEM_TICKS, _START_TIME = 0, 3, 11, 12, 19


@dataclass(frozen=True)
class ProcessIdentity:
    """Which process is meant: valid across restarts of the daemon, safe against pid reuse."""

    pid: int
    start_time_ticks: int
    boot_id: str


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended: `code` or `signal`; both None when it was not our child."""

    code: int | None = None
    signal: int | None = None


@dataclass(frozen=True)
class ResourceUsage:
    """What a process has used up to now."""

    resident_bytes: int
    cpu_seconds: float


class PeerCredentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel recorded it."""

    pid: int
    uid: int
    gid: int


class WorkingProcess(NamedTuple):
    """A process, and in which of the directories looked at it works."""

    identity: ProcessIdentity
    directory: Path


class ProcessHandle:
    """One process held by its pidfd; whoever got the handle closes it.

    Closing neither ends the process nor waits for it.
    """

    def __init__(self, identity: ProcessIdentity, pidfd: int, *, is_child: bool) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._is_child = is_child
        self._status: ExitStatus | None = None
        self._watch: asyncio.Future[ExitStatus] | None = None

    def is_alive(self) -> bool:
        """Tell whether the process still runs; a zombie doesn't."""
        if self._status is not None:
            return False
        poll = select.poll()
        poll.register(self._open_pidfd(), select.POLLIN)
        return not poll.poll(0)

    def send_signal(self, signal_number: int) -> None:
        """Send a signal to exactly this process; raise NotFoundError when it is gone."""
        try:
            signal.pidfd_send_signal(self._open_pidfd(), signal_number)
        except ProcessLookupError as error:
            raise NotFoundError(f"process {self.identity.pid} has ended") from error

    async def wait_exit(self, timeout_seconds: float | None) -> ExitStatus:
        """Wait until the process ends and say how, reaping it if it is our child.

        Any number of tasks may wait. Raises OperationTimeoutError after `timeout_seconds`.
        """
        if self._status is not None:
            return self._status
        if self._watch is None:
            loop = asyncio.get_running_loop()
            self._watch = loop.create_future()
            loop.add_reader(self._open_pidfd(), self._on_exit, self._watch)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(self._watch)
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"process {self.identity.pid} has not ended within {timeout_seconds} s",
                pid=self.identity.pid,
            ) from error

    def close(self) -> None:
        """Let go of the process; tasks still waiting for it are cancelled. May be called twice."""
        if self._pidfd < 0:
            return
        if self._watch is not None and not self._watch.done():
            loop = self._watch.get_loop()
            if not loop.is_closed():
                loop.remove_reader(self._pidfd)
                self._watch.cancel()
        os.close(self._pidfd)
        self._pidfd = -1

    def _open_pidfd(self) -> int:
        if self._pidfd < 0:
            raise InvalidStateError(f"the handle of process {self.identity.pid} is closed")
        return self._pidfd

    def _on_exit(self, watch: asyncio.Future[ExitStatus]) -> None:
        watch.get_loop().remove_reader(self._pidfd)
        self._status = self._reap() if self._is_child else ExitStatus()
        if not watch.done():
            watch.set_result(self._status)

    def _reap(self) -> ExitStatus:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:  # somebody else's SIGCHLD handling took it
            return ExitStatus()
        if result is None:
            return ExitStatus()
        if result.si_code == os.CLD_EXITED:
            return ExitStatus(code=result.si_status)
        return ExitStatus(signal=result.si_status)


def start_process(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    user: str | None = None,
    extra_groups: Sequence[int] = (),
    pass_fds: Sequence[int] = (),
    stdin_fd: int | None = None,
    stdout_fd: int | None = None,
    stderr_fd: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ProcessHandle:
    """Start `argv` in a session of its own and give its handle.

    Standard input and output are /dev/null unless given; standard error goes where output goes.
    With `user` the child has that user, its primary group and `extra_groups`, after it has changed
    to `cwd`, so the directory may be one that only we can reach. `pass_fds` keep their numbers.
    Raises HostError when the command can't be started.
    """
    output = subprocess.DEVNULL if stdout_fd is None else stdout_fd
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin_fd is None else stdin_fd,
            stdout=output,
            stderr=output if stderr_fd is None else stderr_fd,
            cwd=cwd,
            env=child_environment(environment),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            umask=0o077,
            user=user,
            group=None if user is None else _primary_group(user),
            extra_groups=None if user is None else list(extra_groups),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _start_failure(argv, cwd, error) from error
    # Popen's destructor hands a running child to subprocess._cleanup, which would reap it from
    # under our pidfd at the next start; a known return code keeps it away.
    child.returncode = 0
    try:
        return _hold_child(child.pid)
    except BaseException as error:
        # Nobody would ever end it.
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        if isinstance(error, OSError):
            raise _start_failure(argv, cwd, error) from error
        raise


def _hold_child(pid: int) -> ProcessHandle:
    pidfd = os.pidfd_open(pid)
    try:
        fields = _stat_fields(pid)
        identity = ProcessIdentity(pid, int(fields[_START_TIME]) if fields else 0, boot_id())
    except BaseException:
        os.close(pidfd)
        raise
    return ProcessHandle(identity, pidfd, is_child=True)


def child_environment(additions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give a child's environment: a fixed PATH, the C locale, a short allow-list, `additions`."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {"PATH": PATH, "LANG": "C.UTF-8", **inherited, **(additions or {})}


def find_process(pid: int) -> ProcessIdentity | None:
    """Give the identity of the process that has this pid now; None for nobody or a zombie."""
    fields = _stat_fields(pid)
    if fields is None or fields[_STATE] in ("Z", "X"):
        return None
    return ProcessIdentity(pid, int(fields[_START_TIME]), boot_id())


def open_process(identity: ProcessIdentity) -> ProcessHandle:
    """Take hold of a process known by its identity; raise NotFoundError when that one is gone.

    The pidfd is opened first and the identity read after it: in the other order the pid could pass
    to a stranger in between.
    """
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError as error:
        # Too many open files, say: it may live, and must not be taken for dead.
        if error.errno not in (errno.ESRCH, errno.EINVAL):
            raise HostError(f"process {identity.pid} can't be held: {error.strerror}") from error
        raise NotFoundError(f"there is no process {identity.pid}", pid=identity.pid) from error
    except (OverflowError, ValueError) as error:
        raise NotFoundError(f"there is no process {identity.pid}", pid=identity.pid) from error
    if find_process(identity.pid) != identity:
        os.close(pidfd)
        raise NotFoundError(
            f"process {identity.pid} has ended; another may have its number", pid=identity.pid
        )
    return ProcessHandle(identity, pidfd, is_child=_is_our_child(pidfd))


def is_same_process(identity: ProcessIdentity) -> bool:
    """Tell whether this very process still runs, without taking hold of it."""
    return find_process(identity.pid) == identity


def find_processes_in(directory: Path) -> list[ProcessIdentity]:
    """Give the processes that work in `directory` or deeper; blocks for a look at them all."""
    below = find_processes_below(directory.parent)
    return [found.identity for found in below if found.directory.name == directory.name]


def find_processes_below(directory: Path) -> list[WorkingProcess]:
    """Give the processes that work in one of the directories in `directory`, or deeper.

    Blocks for a look at all processes. A working directory that has been removed counts, too.
    """
    try:
        top, device = directory.resolve(), directory.stat().st_dev
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        child = _child_worked_in(entry / "cwd", top, device) if entry.name.isdigit() else None
        if child is not None and (identity := find_process(int(entry.name))) is not None:
            found.append(WorkingProcess(identity, directory / child))
    return found


@functools.cache
def boot_id() -> str:
    """Give the kernel's random name of the boot this is, or what OSCLOUD_BOOT_ID says it is.

    A service with ProtectKernelTunables= has a /proc of its own, and in a container that shows the
    boot of the host around it (systemd 252): oscloudd.service passes on what systemd itself sees.
    """
    if named := os.environ.get("OSCLOUD_BOOT_ID"):
        return named
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def session_pids(session_id: int) -> list[int]:
    """List the processes of a session, zombies left out."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    stats = ((pid, _stat_fields(pid)) for pid in pids)
    return [
        pid
        for pid, fields in stats
        if fields and int(fields[_SESSION]) == session_id and fields[_STATE] not in ("Z", "X")
    ]


def peer_pid(connection: socket.socket) -> PeerCredentials:
    """Give who is at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    layout = struct.Struct("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return PeerCredentials(*layout.unpack(raw))


def resource_usage(pid: int) -> ResourceUsage | None:
    """Give what a process uses; None when it is gone."""
    fields = _stat_fields(pid)
    if fields is None:
        return None
    resident_pages = int(fields[21])
    ticks = int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
    return ResourceUsage(
        resident_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        cpu_seconds=ticks / os.sysconf("SC_CLK_TCK"),
    )


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name may hold blanks and parentheses: only the last one closes it.
    return text.rpartition(")")[2].split()


def _child_worked_in(link: Path, top: Path, device: int) -> str | None:
    """Give the name in `top` of what a /proc/PID/cwd leads into; None when it leads elsewhere."""
    try:
        text = str(link.readlink())
        if not text.startswith(f"{top}/"):
            return None
        status = link.stat()
    except OSError:  # it has ended, or it is a thread of the kernel
        return None
    # The text is the path as the process's own mounts have it, and a container's may read the same.
    if status.st_dev != device:
        return None
    # proc(5): so the kernel marks a directory that has been removed.
    if status.st_nlink == 0:
        text = text.removesuffix(" (deleted)")
    return Path(text).relative_to(top).parts[0]


def _is_our_child(pidfd: int) -> bool:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _primary_group(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_gid
    except KeyError as error:
        raise HostError(
            f"there is no user {user!r} on this machine",
            hint="set [qemu] user in oscloud.toml to one that exists",
        ) from error


def _start_failure(argv: Sequence[str], cwd: Path | None, error: Exception) -> HostError:
    command = argv[0]
    hint = None
    if isinstance(error, FileNotFoundError) and (cwd is None or cwd.is_dir()):
        name = Path(command).name
        hint = f"is it installed? try: apt-get install {_PACKAGES.get(name, name)}"
    return HostError(f"{command} can't be started: {error}", hint=hint, argv=list(argv))
