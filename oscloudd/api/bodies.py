"""What follows a request: a file whose size was said, or pieces of one whose size nobody knew.

Begins when the daemon asks for it. Where pieces come from a pipe, its end is said: a client that is
gone is not taken for a file that has come to its end.
"""

from collections.abc import AsyncIterator

import msgspec

from oscloudd.api.connection import Connection
from oscloudd.errors import InvalidArgumentError, UnavailableError

# What clients send at once is theirs to choose, within this.
MAX_PIECE_BYTES = 1 << 20
_MAX_LINE_BYTES = 200


class _PieceParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int


class _Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The line before a piece; the last piece has no bytes."""

    jsonrpc: str
    method: str
    params: _PieceParams


async def receive_body(
    connection: Connection, size_bytes: int | None, most_bytes: int
) -> AsyncIterator[bytes]:
    """Ask for a file and give it as it comes: `size_bytes` of it, or for None what pieces there
    are.

    Raises UnavailableError when the client ends, or says nothing for long, before that is all, and
    InvalidArgumentError for pieces that are none, or more than `most_bytes` in all.
    """
    connection.begin_body()
    size = b"null" if size_bytes is None else b"%d" % size_bytes
    connection.write_line(b'{"jsonrpc":"2.0","method":"send","params":{"size":%s}}' % size)
    if size_bytes is not None:
        async for chunk in _take(connection, size_bytes, f"of {size_bytes} "):
            yield chunk
        return
    received_bytes = 0
    while piece_bytes := _parse_piece(await _read_line(connection, received_bytes)):
        async for chunk in _take(connection, piece_bytes, before_bytes=received_bytes):
            yield chunk
        received_bytes += piece_bytes
        if received_bytes > most_bytes:
            raise InvalidArgumentError(f"it has more than {most_bytes} bytes")


async def _take(
    connection: Connection, size_bytes: int, of: str = "", *, before_bytes: int = 0
) -> AsyncIterator[bytes]:
    left = size_bytes
    while left:
        chunk = await connection.read_some(left)
        if not chunk:
            raise _ended(before_bytes + size_bytes - left, of)
        left -= len(chunk)
        yield chunk


async def _read_line(connection: Connection, received_bytes: int) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = await connection.read_some(1)
        if not byte:
            raise _ended(received_bytes)
        line += byte
        if len(line) > _MAX_LINE_BYTES:
            raise _no_piece()
    return bytes(line)


def _parse_piece(line: bytes) -> int:
    try:
        piece = msgspec.json.decode(line, type=_Piece)
    except msgspec.DecodeError as error:
        raise _no_piece() from error
    if piece.method != "piece" or not 0 <= piece.params.size <= MAX_PIECE_BYTES:
        raise _no_piece()
    return piece.params.size


def _no_piece() -> InvalidArgumentError:
    return InvalidArgumentError(
        f"what the client sends is no piece of a file, of at most {MAX_PIECE_BYTES} bytes"
    )


def _ended(received_bytes: int, of: str = "") -> UnavailableError:
    return UnavailableError(
        f"the file ended after {received_bytes} {of}bytes", hint="send it again"
    )
