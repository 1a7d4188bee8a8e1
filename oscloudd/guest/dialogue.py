"""The dialogue with a guest's first boot on its serial line. Blocking: runs in a worker thread.

The template's own `apply-identity` is at the other end: it says that it is ready, takes the
identity in, and says that it has applied it. sshd and the network start after that.
"""

import socket

import pexpect
from pexpect import fdpexpect

from oscloudd.errors import HostError, OperationTimeoutError
from oscloudd.guest.identity import encode_for_line

_READY = "oscloud-identity: ready"
_APPLIED = "oscloud-identity: applied"
_FAILED = "oscloud-identity: failed: ([^\r\n]*)[\r\n]"
_APPLY_SECONDS = 60.0
_TAIL_CHARACTERS = 2000


def tell_identity(line: socket.socket, document: str, *, boot_seconds: float) -> None:
    """Wait for the guest's first boot to ask who it is, and tell it.

    `boot_seconds` bounds the wait for the question. Raises OperationTimeoutError or HostError with
    the last the guest printed; the caller closes `line`.
    """
    # use_poll: select() can't take descriptors above 1023. searchwindowsize: without it every
    # read searches the whole boot log again.
    guest = fdpexpect.fdspawn(
        line,
        encoding="utf-8",
        codec_errors="replace",
        use_poll=True,
        maxread=65536,
        searchwindowsize=4096,
    )
    _expect(guest, [_READY], boot_seconds, "ask for its identity")
    if _APPLIED in guest.buffer:
        # An earlier daemon told it; said again, its secrets would be typed at a login prompt.
        return
    for text in encode_for_line(document):
        guest.send(text + "\n")
    if _expect(guest, [_APPLIED, _FAILED], _APPLY_SECONDS, "apply its identity") == 1:
        raise HostError(f"the guest could not apply its identity: {guest.match.group(1)}")


def _expect(guest: fdpexpect.fdspawn, patterns: list[str], seconds: float, what: str) -> int:
    try:
        return int(guest.expect(patterns, timeout=seconds))
    except pexpect.TIMEOUT as error:
        raise OperationTimeoutError(
            f"the guest did not {what} within {seconds:g} s", console=_tail(guest)
        ) from error
    except (pexpect.EOF, OSError) as error:
        raise HostError(
            f"the guest's serial line ended before it could {what}", console=_tail(guest)
        ) from error


def _tail(guest: fdpexpect.fdspawn) -> str:
    return str(guest.before or "")[-_TAIL_CHARACTERS:]
