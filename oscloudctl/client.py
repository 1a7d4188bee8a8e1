"""The daemon's socket as a Python object: JSON-RPC 2.0, one JSON text per line.

`call` waits for an answer, `stream` gives what comes before it. Owns the connection and turns
error answers back into the exceptions of `oscloudd.errors`. Uses the standard library only, so that
the command line starts fast and others can copy it. Prints nothing.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from oscloudctl.unreachable import DEFAULT_SOCKET, explain
from oscloudctl.upload import Upload
from oscloudd.errors import (
    ERRORS_BY_KIND,
    CloudError,
    DaemonUnreachableError,
    InternalError,
    OperationTimeoutError,
)

CONNECT_TIMEOUT_SECONDS = 5.0

# The longest a call that does no long work may leave us without a line.
ANSWER_TIMEOUT_SECONDS = 60.0

# unix(7): sun_path holds 108 bytes with its closing zero.
MAX_SOCKET_PATH_BYTES = 107

# Four times what the daemon sends at once.
MAX_PIECE_BYTES = 1 << 20

# A thousand vms are half a megabyte; more than this is not our daemon.
MAX_LINE_BYTES = 64 << 20

Progress = dict[str, Any]
OnProgress = Callable[[Progress], None]
OnPiece = Callable[[bytes], None]


def find_socket_path(given: str | None = None) -> str:
    """Give the socket to use: the one named, else OSCLOUD_SOCKET, else the system's."""
    return given or os.environ.get("OSCLOUD_SOCKET") or DEFAULT_SOCKET


class NotTheDaemonError(DaemonUnreachableError):
    """What listens on the socket is something else: trying again does not help."""


@dataclass(frozen=True)
class RawConnection:
    """A connection that stopped speaking JSON-RPC; its holder closes `stream`.

    `unread` came in behind the answer and belongs before anything read from `stream`.
    """

    answer: Any
    unread: bytes
    stream: socket.socket


class Client:
    """One connection to the daemon, made at the first call; a context manager that closes it."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._stream: socket.socket | None = None
        self._unread = bytearray()
        self._last_id = 0
        self._aborted = False

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one; the next call makes another."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._unread.clear()

    def abort(self) -> None:
        """Make the call that another thread is in fail at once, and every later one."""
        self._aborted = True
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        on_progress: OnProgress | None = None,
        timeout_seconds: float | None = None,
        upload: Upload | None = None,
        on_piece: OnPiece | None = None,
    ) -> Any:
        """Call `method` and give its result; progress notifications go to `on_progress`.

        `upload` is sent when the daemon asks for it, and has to be closed by the caller; `on_piece`
        takes the bytes the daemon sends.
        `timeout_seconds` bounds the silence between two lines, not the whole call: work that
        reports progress is alive. Raises the CloudError the daemon named, DaemonUnreachableError
        or OperationTimeoutError.
        """
        limit = ANSWER_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        exchange = self._exchange(method, params or {}, limit, on_piece)
        with contextlib.closing(exchange) as messages:
            for message in messages:
                if upload is not None and message.get("method") == "send":
                    upload.begin(self._connected())
                if on_progress is not None and message.get("method") == "progress":
                    on_progress(_parameters(message))
        if upload is not None:
            self.close()  # what follows a file is not read as requests any more
        return _result(message)

    def stream(
        self, method: str, params: dict[str, Any] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Call `method` and give the parameters of each event it sends, until its answer comes.

        Waits for as long as it takes. Whoever leaves before the end closes the generator, which
        closes the connection. Raises what `call` raises.
        """
        with contextlib.closing(self._exchange(method, params or {}, None)) as messages:
            for message in messages:
                if message.get("method") == "event":
                    yield _parameters(message)
        _result(message)

    def upgrade(self, method: str, params: dict[str, Any]) -> RawConnection:
        """Call `method` and hand over the connection, which carries raw bytes from then on."""
        answer = self.call(method, params)
        stream, unread = self._connected(), bytes(self._unread)
        self._stream = None
        self._unread.clear()
        stream.settimeout(None)
        return RawConnection(answer=answer, unread=unread, stream=stream)

    def _connected(self) -> socket.socket:
        if self._aborted:
            raise ConnectionAbortedError
        if self._stream is None:
            self._stream = _connect(self.socket_path)
        return self._stream

    def _exchange(
        self,
        method: str,
        params: dict[str, Any],
        limit: float | None,
        on_piece: OnPiece | None = None,
    ) -> Generator[dict[str, Any], None, None]:
        """Send a request and give every notification that comes, and at last the answer."""
        self._last_id += 1
        request = {"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params}
        answered = False
        try:
            stream = self._connected()
            stream.settimeout(limit)
            _send(stream, request)
            while not answered:
                message = _decode(self._read_line(stream), self.socket_path)
                answered = self._is_answer(message)
                if on_piece is not None and message.get("method") == "piece":
                    on_piece(self._read_piece(stream, _parameters(message)))
                if answered or "id" not in message:
                    yield message
        except TimeoutError as error:
            raise _no_answer(method, limit or 0) from error
        except OSError as error:
            raise _connection_lost(method) from error
        finally:
            # The answer to an abandoned call must not be taken for the next one's.
            if not answered:
                self.close()

    def _is_answer(self, message: dict[str, Any]) -> bool:
        identifier = message.get("id")
        # An error without an id answers a line the daemon could not or would not read.
        return identifier == self._last_id or (identifier is None and "error" in message)

    def _read_line(self, stream: socket.socket) -> bytes:
        searched = 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            if searched > MAX_LINE_BYTES:
                raise _not_the_daemon(self.socket_path)
            received = stream.recv(1 << 18)
            if not received:
                raise ConnectionResetError
            self._unread += received
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return line

    def _read_piece(self, stream: socket.socket, announced: dict[str, Any]) -> bytes:
        size = announced.get("size")
        if not isinstance(size, int) or not 0 < size <= MAX_PIECE_BYTES:
            raise _not_the_daemon(self.socket_path)
        while len(self._unread) < size:
            received = stream.recv(1 << 18)
            if not received:
                raise ConnectionResetError
            self._unread += received
        piece = bytes(self._unread[:size])
        del self._unread[:size]
        return piece


def _send(stream: socket.socket, request: dict[str, Any]) -> None:
    # A daemon that turns a connection away writes why and closes: the reason is there to be read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.sendall(json.dumps(request).encode() + b"\n")


def _parameters(notification: dict[str, Any]) -> dict[str, Any]:
    params = notification.get("params")
    return params if isinstance(params, dict) else {}


def _result(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise build_error(answer["error"])
    return answer.get("result")


def build_error(error: Any) -> CloudError:
    """Turn the `error` of an answer into the exception it was on the daemon's side."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    data = error.get("data")
    details = dict(data) if isinstance(data, dict) else {}
    known = ERRORS_BY_KIND.get(str(details.pop("kind", "")), InternalError)
    hint = details.pop("hint", None)
    built = known(str(error.get("message", "the daemon gave no reason")), hint=hint)
    built.details = details
    return built


def _decode(line: bytes, socket_path: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _not_the_daemon(socket_path) from error
    if not isinstance(message, dict):
        raise _not_the_daemon(socket_path)
    return message


def _connect(path: str) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(CONNECT_TIMEOUT_SECONDS)
    try:
        _connect_path(stream, path)
    except OSError as error:
        stream.close()
        raise explain(error, path) from error
    return stream


def _connect_path(stream: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        stream.connect(path)
        return
    directory = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        stream.connect(f"/proc/self/fd/{directory}/{Path(path).name}")
    finally:
        os.close(directory)


def _no_answer(method: str, limit: float) -> OperationTimeoutError:
    return OperationTimeoutError(
        f"the daemon said nothing about {method} for {limit:g} seconds",
        hint="it may still be at it: see oscloudctl vm-list and journalctl -u oscloudd",
    )


def _connection_lost(method: str) -> DaemonUnreachableError:
    return DaemonUnreachableError(
        f"the daemon closed the connection before it answered {method}",
        hint="see why with: journalctl -u oscloudd",
    )


def _not_the_daemon(path: str) -> NotTheDaemonError:
    return NotTheDaemonError(
        f"what answers on {path} does not speak JSON-RPC: it is not oscloudd",
        hint="name the daemon's socket with --socket or OSCLOUD_SOCKET",
    )
