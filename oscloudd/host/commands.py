"""Running one command to its end: its output, or one error that tells the story.

Owns the child until it is reaped; a timeout or a cancellation kills its whole session. There is no
shell: a command is an argument vector. Processes that live on (qemu) are `processes.py`.
"""

import asyncio
import logging
import os
import re
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import HostError
from oscloudd.host.processes import ExitStatus, ProcessHandle, start_process
from oscloudd.host.sessions import end_session

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 65536
_KEPT_OUTPUT_BYTES = 16 << 20
_ERROR_LINES = 20
# How long a grandchild may keep the pipes open after the command itself has ended.
_DRAIN_SECONDS = 1.0
_LINE_END = re.compile(rb"\r\n|\n|\r")

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class CommandLimits:
    """What a command that reads a stranger's file may use before the kernel stops it."""

    cpu_seconds: int
    address_space_bytes: int

    def wrap(self, argv: Sequence[str]) -> list[str]:
        """Give the argument vector that runs `argv` under these limits."""
        return [
            "prlimit",
            f"--cpu={self.cpu_seconds}",
            f"--as={self.address_space_bytes}",
            "--core=0",
            "--",
            *argv,
        ]


async def run(
    argv: Sequence[str],
    *,
    timeout_seconds: float = 60,
    input_text: str | None = None,
    on_line: OnLine | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limits: CommandLimits | None = None,
    user: str | None = None,
    pass_fds: Sequence[int] = (),
) -> str:
    """Run `argv` and give what it printed on standard output (its last 16 MiB).

    `on_line` gets every line of both outputs as it comes, ended by LF or CR. `environment` adds to
    the allow-list. With `user` the command has that user and its group; `pass_fds` keep their
    numbers. Raises HostError (details `argv`, `status`, `output`) when the command is
    missing, fails, or is not done in time.
    """
    argv = list(argv) if limits is None else limits.wrap(argv)
    _log.debug("%s", shlex.join(argv))
    command = _Command(argv, on_line)
    try:
        command.start(
            input_text=input_text, environment=environment, cwd=cwd, user=user, pass_fds=pass_fds
        )
        async with asyncio.timeout(timeout_seconds):
            status = await command.wait()
    except TimeoutError as error:
        raise command.failure(f"not done after {timeout_seconds:g} s", None) from error
    finally:
        await command.close()
    if status.code != 0:
        number = status.code if status.signal is None else -status.signal
        raise command.failure(_describe(status), number)
    return command.stdout.text()


class _Output:
    """The bytes of one of the child's outputs and the lines in them; owns the reading end."""

    def __init__(self, on_line: OnLine | None) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        self._on_line = on_line
        self._kept = bytearray()
        self._line = bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def close_write_end(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    async def read_all(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
        pipe = os.fdopen(self.read_fd, "rb", buffering=0)
        self.read_fd = -1
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        # Chunks, not readline(): a line longer than the stream's limit would raise.
        while chunk := await reader.read(_CHUNK_BYTES):
            self._take(chunk)
        self._report(bytes(self._line))

    def _take(self, chunk: bytes) -> None:
        self._kept += chunk
        if len(self._kept) > _KEPT_OUTPUT_BYTES:
            del self._kept[:-_KEPT_OUTPUT_BYTES]
        if self._on_line is None:
            return
        self._line += chunk
        *lines, rest = _LINE_END.split(bytes(self._line))
        self._line = bytearray(rest[-_CHUNK_BYTES:])
        for line in lines:
            self._report(line)

    def _report(self, line: bytes) -> None:
        if line and self._on_line is not None:
            self._on_line(line.decode("utf-8", "replace"))

    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")

    def close(self) -> None:
        self.close_write_end()
        if self._transport is not None:
            self._transport.close()
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1


class _Command:
    """One child, its outputs and the tasks that read them; `close` kills and reaps what is left."""

    def __init__(self, argv: list[str], on_line: OnLine | None) -> None:
        self._argv = argv
        self.stdout = _Output(on_line)
        self._stderr = _Output(on_line)
        self._process: ProcessHandle | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None

    def start(
        self,
        *,
        input_text: str | None,
        environment: Mapping[str, str] | None,
        cwd: Path | None,
        user: str | None,
        pass_fds: Sequence[int],
    ) -> None:
        stdin_fd = None if input_text is None else _memory_file(input_text)
        try:
            self._process = start_process(
                self._argv,
                cwd=cwd,
                user=user,
                pass_fds=pass_fds,
                stdin_fd=stdin_fd,
                stdout_fd=self.stdout.write_fd,
                stderr_fd=self._stderr.write_fd,
                environment=environment,
            )
        finally:
            if stdin_fd is not None:
                os.close(stdin_fd)
        for output in (self.stdout, self._stderr):
            output.close_write_end()
            self._readers.append(asyncio.create_task(output.read_all()))

    async def wait(self) -> ExitStatus:
        assert self._process is not None
        status = await self._process.wait_exit(None)
        await asyncio.wait(self._readers, timeout=_DRAIN_SECONDS)
        for reader in self._readers:
            if reader.done():
                reader.result()  # what `on_line` raised is the caller's
        return status

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self.stdout.close()
        self._stderr.close()
        if self._process is not None:
            # A second cancellation must not leave half of the session behind.
            self._ending = asyncio.create_task(end_session(self._process))
            await asyncio.shield(self._ending)

    def failure(self, what: str, status: int | None) -> HostError:
        said = (self._stderr.text().strip() or self.stdout.text().strip()).splitlines()
        last_line = f": {said[-1].strip():.300}" if said else ""
        return HostError(
            f"{self._name()} {what}{last_line}",
            argv=self._argv,
            status=status,
            output="\n".join(said[-_ERROR_LINES:]),
        )

    def _name(self) -> str:
        argv = (
            self._argv[self._argv.index("--") + 1 :] if self._argv[0] == "prlimit" else self._argv
        )
        words = [word for word in argv[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
        return " ".join([Path(argv[0]).name, *words[:1]])


def _memory_file(text: str) -> int:
    # A pipe would block us once its 64 KiB are full; a file in memory never does.
    fd = os.memfd_create("input")
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _describe(status: ExitStatus) -> str:
    if status.signal is not None:
        return f"was killed by {signal.Signals(status.signal).name}"
    return f"failed with status {status.code}"
