"""Hearing from a guest's cloud-init how it has ended. Blocking: for a worker thread.

The guest's side is `boothook.sh`. It begins before the guest's network and sshd do, so one that
says nothing once its sshd has answered has no cloud-init at work: its image has none, or the user
data have disabled ours.
"""

import socket

import msgspec
import pexpect
from pexpect import fdpexpect

from oscloudd.errors import HostError, OperationTimeoutError

_SAYS = "oscloud-cloud-init: "
_ENDED = "ended: ([^\r\n]*)[\r\n]"
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
    guest = fdpexpect.fdspawn(
        channel, encoding="utf-8", codec_errors="replace", use_poll=True, searchwindowsize=4096
    )
    try:
        guest.send("\n")  # one that has said it before says it again
        if guest.expect([_SAYS, pexpect.TIMEOUT], timeout=_FIRST_WORD_SECONDS) == 1:
            return ""
        guest.expect(_ENDED, timeout=seconds)
    except pexpect.TIMEOUT as error:
        raise OperationTimeoutError(f"cloud-init did not end within {seconds:g} s") from error
    except (pexpect.EOF, OSError) as error:
        raise HostError("the guest's channel ended before its cloud-init did") from error
    return parse_result(guest.match.group(1))


def parse_result(text: str) -> str:
    """Give what result.json says of errors, or all of it where that can't be read."""
    try:
        return "; ".join(msgspec.json.decode(text, type=_Result).v1.errors)
    except msgspec.MsgspecError:
        return text
