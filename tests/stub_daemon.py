"""A scripted daemon: a real Unix socket that answers JSON-RPC lines as a test tells it to.

`answers[method]` is a value, or a function of the Call; a function may raise a CloudError (it
becomes the error answer), send progress or events on the way, or return Raw to take the connection
over. A ScriptedJob is such a function, and the one that cancels it, too.
"""

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pexpect.fdpexpect import fdspawn

from oscloudd.errors import CancelledJobError, CloudError, NotFoundError

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 90

VM = {
    "id": 1, "name": "web", "state": "RUNNING", "wanted_state": "RUNNING", "reason": None,
    "os": "debian_12", "network": "default", "ip": "192.168.0.2", "mac": "52:54:00:00:00:01",
    "mem_size": 2 << 30, "disk_size": 10 << 30, "disk": "web", "cpus": 2, "accelerator": "tcg",
    "started": "cold", "ready": True, "pid": 4711, "uptime_seconds": 3725, "serial_port": 10002,
    "autostart": "no", "restart": "no", "created_at": 1767323045.5, "owner_uid": 0,
    "ssh_host_keys": ["ssh-ed25519 AAAAhost web"], "gateway": "192.168.0.1",
}  # fmt: skip

JOB = {
    "id": 7, "kind": "vm_create", "target": "web", "vm": 1, "state": "RUNNING", "step": 3,
    "steps": 6, "stage": "booting", "message": "kernel", "fraction": None, "error_kind": "",
    "cancellable": True, "owner_uid": 0, "created_at": 1767323045.5, "finished_at": None,
}  # fmt: skip


@dataclass
class Raw:
    """An answer after which `talk` has the connection for itself."""

    answer: Any
    talk: Callable[[socket.socket], None]


@dataclass
class Call:
    method: str
    params: dict[str, Any]
    id: int
    stream: socket.socket

    def send(self, message: Any) -> None:
        self.send_text(json.dumps(message))

    def send_text(self, text: str) -> None:
        self.stream.sendall(text.encode() + b"\n")

    def progress(self, stage: str, message: str, fraction: float | None = None) -> None:
        params = {"job": 7, "stage": stage, "message": message, "fraction": fraction}
        self.send({"jsonrpc": "2.0", "method": "progress", "params": params})

    def event(self, sequence: int, **params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": "event", "params": build_event(sequence, **params)})

    def wait_until_gone(self) -> Any:
        """Say nothing until the client has hung up."""
        with contextlib.suppress(OSError):
            self.stream.recv(1)
        return HANG_UP


class StubDaemon:
    """Owns the socket and a thread for each connection; `close` ends them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.jobs: list[ScriptedJob] = []
        self._streams: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for job in self.jobs:
            job.end.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(DEADLINE_SECONDS)
        self._listener.close()
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive()
        for stream in self._streams:
            stream.close()

    def fail(self, method: str, error: CloudError) -> None:
        def raise_it(_call: Call) -> Any:
            raise error

        self.answers[method] = raise_it

    def params_of(self, method: str) -> list[dict[str, Any]]:
        return [params for called, params in self.calls if called == method]

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            self._streams.append(stream)
            thread = threading.Thread(target=self._serve, args=(stream,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, stream: socket.socket) -> None:
        unread = b""
        try:
            while received := stream.recv(65536):
                unread += received
                while b"\n" in unread:
                    line, _, unread = unread.partition(b"\n")
                    if not self._answer(stream, line):
                        return
        except OSError:
            return

    def _answer(self, stream: socket.socket, line: bytes) -> bool:
        request = json.loads(line)
        call = Call(request["method"], request["params"], request["id"], stream)
        self.calls.append((call.method, call.params))
        answer = self.answers.get(call.method)
        try:
            result = answer(call) if callable(answer) else answer
        except CloudError as error:
            body = {"code": error.code, "message": error.message, "data": error.as_data()}
            call.send({"jsonrpc": "2.0", "id": call.id, "error": body})
            return True
        if isinstance(result, Raw):
            call.send({"jsonrpc": "2.0", "id": call.id, "result": result.answer})
            result.talk(stream)
            stream.shutdown(socket.SHUT_RDWR)
            return False
        if result is not HANG_UP:
            call.send({"jsonrpc": "2.0", "id": call.id, "result": result})
            return True
        stream.shutdown(socket.SHUT_RDWR)
        return False


HANG_UP = object()


class ScriptedJob:
    """Job 7, begun by `method`: says it boots, then runs until `end` is set or it is cancelled.

    `answer` or `error` is what the call gets; with `refusal` it can't be cancelled.
    """

    def __init__(self, daemon: StubDaemon, method: str, answer: Any = None) -> None:
        self.answer = VM if answer is None else answer
        self.error: CloudError | None = None
        self.refusal: CloudError | None = None
        self.end = threading.Event()
        self.begun = threading.Event()
        self.gone = threading.Event()
        self.connections: list[socket.socket] = []
        daemon.jobs.append(self)
        daemon.answers[method] = self._run
        daemon.answers["job_cancel"] = self._cancel

    def _run(self, call: Call) -> Any:
        self.connections.append(call.stream)
        call.progress("booting", "kernel")
        self.begun.set()
        threading.Thread(target=self._watch, args=(call,), daemon=True).start()
        assert self.end.wait(DEADLINE_SECONDS)
        if self.error is not None:
            raise self.error
        return HANG_UP if self.gone.is_set() else self.answer

    def _watch(self, call: Call) -> None:
        with contextlib.suppress(OSError):
            if not call.stream.recv(1, socket.MSG_PEEK):
                self.gone.set()

    def _cancel(self, call: Call) -> Any:
        self.connections.append(call.stream)
        if self.refusal is not None:
            raise self.refusal
        self.error = CancelledJobError("job 7 (vm_create web) was cancelled")
        self.end.set()
        return {**JOB, "state": "CANCELLED", "message": self.error.message}


def build_event(sequence: int, **params: Any) -> dict[str, Any]:
    data = {"state": "RUNNING", "reason": "", "wanted_state": "RUNNING"}
    event = {"sequence": sequence, "at": 1767323045.5, "kind": "vm_state", "vm": 1, "job": None,
             "name": "web", "data": data}  # fmt: skip
    return {**event, **params}


def no_vm(name: int | str) -> NotFoundError:
    return NotFoundError(
        f"there is no vm {name}", hint="see: oscloudctl vm-list", object="vm", name=str(name)
    )


def build_environment(daemon: StubDaemon | None, home: Path, **more: str) -> dict[str, str]:
    """The environment of a program under test: its own home, our checkout, the stub's socket."""
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8",
        "TZ": "UTC", **more,
    }  # fmt: skip
    if daemon is not None:
        environment.setdefault("OSCLOUD_SOCKET", str(daemon.path))
    return environment


# A test run in the background of a shell inherits SIGINT ignored, and so would its children.
LAUNCH = (
    sys.executable, "-c", "import os, signal, sys; "
    "signal.signal(signal.SIGINT, getattr(signal, sys.argv[1])); "
    "os.execv(sys.executable, [sys.executable, '-m', 'oscloudctl', *sys.argv[2:]])",
)  # fmt: skip


class Running:
    """`oscloudctl` under way, neither stream a terminal; `see` waits for words on one of them."""

    def __init__(
        self, daemon: StubDaemon, home: Path, *arguments: str, sigint: str = "SIG_DFL"
    ) -> None:
        self.process = subprocess.Popen(
            [*LAUNCH, sigint, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=build_environment(daemon, home), cwd=home,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._files = (self.process.stdout, self.process.stderr)
        self.out, self.err = (
            fdspawn(file, timeout=DEADLINE_SECONDS, use_poll=True, encoding="utf-8")
            for file in self._files
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for file in self._files:
            file.close()

    def see(self, words: str) -> str:
        """Wait for `words` on standard error; give what came before them."""
        self.err.expect_exact(words)
        return str(self.err.before)

    def read(self, words: str) -> str:
        """Wait for `words` on standard output; give what came before them."""
        self.out.expect_exact(words)
        return str(self.out.before)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; give its status and the rest of both streams."""
        status = self.process.wait(DEADLINE_SECONDS)
        return status, str(self.out.read()), str(self.err.read())


class Terminal:
    """`oscloudctl` as the foreground process of a pty of its own."""

    def __init__(self, daemon: StubDaemon, home: Path, *arguments: str, columns: int = 80) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.mode = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import fcntl, os, sys, termios; "
             "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])",
             *LAUNCH, "SIG_DFL", *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            env=build_environment(daemon, home), cwd=home,
        )  # fmt: skip
        self.screen = fdspawn(self.master, timeout=DEADLINE_SECONDS, use_poll=True)

    def see(self, text: bytes) -> bytes:
        """Wait for `text`; give what came before it."""
        self.screen.expect_exact(text)
        before: bytes = self.screen.before
        return before

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


class Oscloudctl:
    """Runs the command line as the user does: a process with a home of its own."""

    def __init__(self, daemon: StubDaemon | None, home: Path) -> None:
        self.daemon, self.home = daemon, home

    def __call__(
        self, *arguments: str, input_text: str = "", status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "oscloudctl", *arguments], check=False,
            input=input_text, capture_output=True, text=True, timeout=DEADLINE_SECONDS,
            env=build_environment(self.daemon, self.home, **environment), cwd=self.home,
        )  # fmt: skip
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done
