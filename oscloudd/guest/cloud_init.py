"""Hearing from a guest's cloud-init how it has ended. Blocking: for a worker thread.

The guest's side is `boothook.sh`. It begins before the guest's network and sshd do, so one that
says nothing once its sshd has answered has no cloud-init at work: its image has none, or the user
data have disabled ours.
"""

import re
import select
import socket
import time

import msgspec

from oscloudd.errors import HostError, OperationTimeoutError

_SAYS = re.compile(rb"oscloud-cloud-init: ")
_ENDED = re.compile(rb"oscloud-cloud-init: ended: ([^\r\n]*)[\r\n]")
# Twice what boothook.sh makes of a line. What a guest says besides must not fill our memory.
_MOST_BYTES = 8192
# An emulated guest wakes late: it says every second that it is at work.
_FIRST_WORD_SECONDS = 10.0


class _Outcome(msgspec.Struct, frozen=True):
    errors: list[str] = []


class _Result(msgspec.Struct, frozen=True):
    """/run/cloud-init/result.json: cloud-init's documentation, "Status"."""

    v1: _Outcome


def wait_cloud_init(channel: socket.socket, *, seconds: float) -> str:
    """Wait until cloud-init has ended; give its own words on what went wrong, or "".

    Also "" for a guest that has none at work. Raises OperationTimeoutError or HostError.
    """
    guest = _Guest(channel)
    guest.ask()
    if guest.wait(_SAYS, _FIRST_WORD_SECONDS) is None:
        return ""
    ended = guest.wait(_ENDED, seconds)
    if ended is None:
        raise OperationTimeoutError(f"cloud-init did not end within {seconds:g} s")
    return parse_result(ended.group(1).decode("utf-8", "replace"))


def parse_result(text: str) -> str:
    """Give what result.json says of errors, or all of it where that can't be read.

    It is shown on terminals, so what they would obey is replaced by "?".
    """
    try:
        words = "; ".join(msgspec.json.decode(text, type=_Result).v1.errors)
    except msgspec.MsgspecError:
        words = text
    return "".join(character if character.isprintable() else "?" for character in words)


class _Guest:
    """The guest's end, and the last it has said."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._said = b""

    def ask(self) -> None:
        """Have a guest that has said how cloud-init has ended say it again."""
        try:
            self._channel.sendall(b"\n")
        except OSError as error:
            raise _lost() from error

    def wait(self, pattern: re.Pattern[bytes], seconds: float) -> re.Match[bytes] | None:
        """Read until the guest has said this; None when the time is over."""
        deadline = time.monotonic() + seconds
        while (found := pattern.search(self._said)) is None:
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0 or not self._poll.poll(left_seconds * 1000):
                return None
            self._said = (self._said + self._read())[-_MOST_BYTES:]
        return found

    def _read(self) -> bytes:
        try:
            data = self._channel.recv(_MOST_BYTES)
        except OSError as error:
            raise _lost() from error
        if not data:
            raise _lost()
        return data


def _lost() -> HostError:
    return HostError("the guest's channel ended before its cloud-init did")
