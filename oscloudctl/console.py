"""A terminal attached to a serial console: bytes in, bytes out, Ctrl-] leaves.

Owns the terminal's mode for as long as it is attached and gives it back whatever happens.
"""

import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

# Ctrl-], as telnet and virsh have it.
ESCAPE = b"\x1d"

_CHUNK_BYTES = 1 << 16


def attach(stream: socket.socket, unread: bytes, *, input_fd: int, output_fd: int) -> bool:
    """Carry bytes both ways until the daemon closes or Ctrl-] is typed; say if it was Ctrl-].

    An input that is no terminal is copied to its end, and the console shown until it closes.
    """
    if not os.isatty(input_fd):
        _write_all(output_fd, unread)
        return _copy(stream, input_fd, output_fd, escape=None)
    # Raw before the first byte is shown: what is typed at a prompt in `unread` would be echoed and
    # its carriage return turned, and a guest's getty learns from that what ends a line.
    with _raw_terminal(input_fd):
        _write_all(output_fd, unread)
        return _copy(stream, input_fd, output_fd, escape=ESCAPE)


def follow(stream: socket.socket, unread: bytes, write: Callable[[bytes], None]) -> None:
    """Show the console until the daemon closes, sending nothing."""
    write(unread)
    while received := _receive(stream):
        write(received)


def _copy(stream: socket.socket, input_fd: int, output_fd: int, *, escape: bytes | None) -> bool:
    with stream:
        sources: list[int] = [stream.fileno(), input_fd]
        while True:
            readable, _, _ = select.select(sources, [], [])
            if stream.fileno() in readable:
                received = _receive(stream)
                if not received:
                    return False
                _write_all(output_fd, received)
            if input_fd in readable:
                typed = os.read(input_fd, _CHUNK_BYTES)
                before, found, _ = typed.partition(escape) if escape else (typed, b"", b"")
                if not _send(stream, before):
                    return False
                if found:
                    return True
                if not typed:
                    sources.remove(input_fd)
                    _finish_sending(stream)


@contextmanager
def _raw_terminal(fd: int) -> Iterator[None]:
    saved = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that the terminal is restored on the way out.
    sys.exit(128 + number)


def _receive(stream: socket.socket) -> bytes:
    try:
        return stream.recv(_CHUNK_BYTES)
    except ConnectionResetError:
        return b""


def _send(stream: socket.socket, data: bytes) -> bool:
    try:
        stream.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _finish_sending(stream: socket.socket) -> None:
    with suppress(OSError):
        stream.shutdown(socket.SHUT_WR)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
