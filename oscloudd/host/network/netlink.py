"""Messages to the kernel's netlink sockets: laid out, sent, their answers read.

Knows netlink(7) alone; what the messages say is `set_elements.py`'s, `bridge_ports.py`'s and
`nft_events.py`'s. One exchange takes some 0.05 ms, where a run of `ip` or `nft` takes 3 to 10.
"""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# linux/netlink.h
REQUEST = 0x001
ACKNOWLEDGE = 0x004
CREATE = 0x400
REPLACE = 0x100
_DUMP = 0x300
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port of the sender
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_RECEIVE_BYTES = 1 << 20
# The kernel goes on with a list as it is read.
_LIST_SECONDS = 10.0


@dataclass(frozen=True)
class Message:
    """One message as it came: its type, the port of whoever caused it, what follows the header."""

    kind: int
    port: int
    body: bytes


def pack_message(kind: int, flags: int, body: bytes) -> bytes:
    """Lay out one message to the kernel."""
    return _pad(_HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, 0, 0) + body)


def pack_attribute(kind: int, value: bytes) -> bytes:
    """Lay out one attribute."""
    return _pad(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value)


def pack_nested(kind: int, *attributes: bytes) -> bytes:
    """Lay out an attribute that is made of attributes."""
    return pack_attribute(kind | _NESTED, b"".join(attributes))


def parse_messages(data: bytes) -> Iterator[Message]:
    """Read the messages of one datagram."""
    while len(data) >= _HEADER.size:
        length, kind, _flags, _sequence, port = _HEADER.unpack_from(data)
        yield Message(kind, port, data[_HEADER.size : length])
        data = data[_aligned(length) :]


def find_attribute(attributes: bytes, wanted: int) -> bytes | None:
    """Give the value of the first attribute of this type, or None."""
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind & _TYPE_MASK == wanted:
            return attributes[_ATTRIBUTE.size : length]
        attributes = attributes[_aligned(length) :]
    return None


def exchange(protocol: int, *messages: bytes) -> None:
    """Send these messages as one datagram and wait for the kernel's verdict on them.

    The last one that asks to be acknowledged is what is waited for. Raises OSError with the first
    error that the kernel answers.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as line:
        line.bind((0, 0))
        line.send(b"".join(messages))
        # The kernel has answered all of it before it returns from the call.
        line.settimeout(0)
        while True:
            try:
                _raise_error(line.recv(_RECEIVE_BYTES))
            except BlockingIOError:
                return


def list_messages(protocol: int, request: bytes) -> Iterator[Message]:
    """Give all that the kernel answers to a request for a list; raises OSError."""
    length, kind, flags, sequence, port = _HEADER.unpack_from(request)
    header = _HEADER.pack(length, kind, flags | _DUMP, sequence, port)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as line:
        line.bind((0, 0))
        line.settimeout(_LIST_SECONDS)
        line.send(header + request[_HEADER.size :])
        while True:
            data = line.recv(_RECEIVE_BYTES)
            _raise_error(data)
            for message in parse_messages(data):
                if message.kind == _DONE:
                    return
                yield message


def _raise_error(data: bytes) -> None:
    for message in parse_messages(data):
        if message.kind == _ERROR:
            (code,) = struct.unpack_from("=i", message.body)
            if code:
                raise OSError(-code, os.strerror(-code))


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _pad(data: bytes) -> bytes:
    return data + bytes(_aligned(len(data)) - len(data))
