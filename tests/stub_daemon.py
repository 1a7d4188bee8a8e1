"""A scripted daemon: a real Unix socket that answers JSON-RPC lines as a test tells it to.

`answers[method]` is a value, or a function of the Call; a function may raise a CloudError (it
becomes the error answer), send progress on the way, or return Raw to take the connection over.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oscloudd.errors import CloudError, NotFoundError

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 20

VM = {
    "id": 1, "name": "web", "state": "RUNNING", "wanted_state": "RUNNING", "reason": None,
    "os": "debian_12", "network": "default", "ip": "192.168.0.2", "mac": "52:54:00:00:00:01",
    "mem_size": 2 << 30, "disk_size": 10 << 30, "disk": "web", "cpus": 2, "accelerator": "tcg",
    "started": "cold", "ready": True, "pid": 4711, "uptime_seconds": 3725, "serial_port": 10002,
    "autostart": True, "restart": "no", "created_at": "2026-01-02T03:04:05Z", "owner_uid": 0,
    "ssh_host_keys": ["ssh-ed25519 AAAAhost web"], "gateway": "192.168.0.1",
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


class StubDaemon:
    """Owns the socket and a thread for each connection; `close` ends them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._streams: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
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
