"""The dialogue with a guest, on its serial line or its channel. Blocking: for a worker thread.

The template's own `apply-identity` is at the other end. A first boot says on the serial line that
it is ready, takes the identity in, and says that it has applied it; sshd and the network start
after that. Told to postpone it, it boots to the end and waits there, on its channel: the machine is
saved, and each clone of it takes its identity in where that one waited. The caller closes what it
has given in all cases.
"""

import socket

import pexpect
from pexpect import fdpexpect

from oscloudd.errors import HostError, OperationTimeoutError
from oscloudd.guest.identity import (
    REHEARSAL_DOCUMENT,
    WARM_DOCUMENT,
    encode_for_clone,
    encode_for_line,
)

_READY = "oscloud-identity: ready"
_APPLIED = "oscloud-identity: applied"
_POSTPONED = "oscloud-identity: postponed"
# The guest waits from here on, so the end of the line must be there, too.
_WARM = "oscloud-identity: warm\r?\n"
_FAILED = "oscloud-identity: failed: ([^\r\n]*)[\r\n]"
_KEPT = "oscloud-identity: kept\n"
_REHEARSED = "oscloud-identity: rehearsed\r?\n"
_REST = "rest"
_APPLY_SECONDS = 60.0
_TAIL_CHARACTERS = 2000


def tell_identity(line: socket.socket, document: str, *, boot_seconds: float | None) -> None:
    """Wait for the guest's first boot to ask who it is, and tell it; its disk has it then.

    `boot_seconds` bounds the wait for the question, None not at all. Raises OperationTimeoutError
    or HostError with the last the guest printed.
    """
    guest = _listen(line)
    _expect(guest, _READY, boot_seconds, "ask for its identity")
    if _APPLIED in guest.buffer:
        # An earlier daemon told it; said again, its secrets would be typed at a login prompt.
        return
    _send(guest, encode_for_line(document))
    _expect(guest, _APPLIED, _APPLY_SECONDS, "apply its identity")


def postpone_identity(line: socket.socket, *, boot_seconds: float) -> None:
    """Have the guest's first boot go on without identity, to where its clones will be told.

    It is told on its serial line, says there that it has come so far, and waits on its channel,
    which has to be open here for that. `boot_seconds` bounds the wait for the question and the boot
    after it, each. The machine may be saved when this returns. Raises like `tell_identity`.
    """
    guest = _listen(line)
    _expect(guest, _READY, boot_seconds, "ask for its identity")
    _send(guest, encode_for_line(WARM_DOCUMENT))
    _expect(guest, _POSTPONED, _APPLY_SECONDS, "postpone its identity")
    _expect(guest, _WARM, boot_seconds, "wait for the identity of a clone")


def wait_warm(line: socket.socket, *, boot_seconds: float) -> None:
    """Wait until a guest with cloud-init has come to where its clones will be told, unasked.

    Else as `postpone_identity`.
    """
    _expect(_listen(line), _WARM, boot_seconds, "wait for the identity of a clone")


def tell_clone(channel: socket.socket, document: str, *, seconds: float) -> None:
    """Tell a clone who it is; it waits for that and does not ask. Raises like `tell_identity`.

    It waits for `let_rest` then, so that whoever has waited for it can have it to himself.
    """
    # It reads no further than it has to: what comes next is somebody else's.
    guest = _listen(channel, at_once=1)
    _send(guest, encode_for_clone(document))
    _expect(guest, _APPLIED, seconds, "apply its identity")


def rehearse_clone(line: socket.socket, channel: socket.socket, *, seconds: float) -> None:
    """Have a clone greet itself: the code it has for that is translated then. Raises the same."""
    _send(_listen(channel), encode_for_clone(REHEARSAL_DOCUMENT))
    _expect(_listen(line), _REHEARSED, seconds, "greet itself")


def let_rest(channel: socket.socket) -> None:
    """Let a clone that was told do what nobody waits for, and wait until its disk has its identity.

    That may be never: it may end before, and the next boot of its disk asks again. Raises
    HostError.
    """
    guest = _listen(channel)
    _send(guest, [_REST])
    _expect(guest, _KEPT, None, "keep its identity")


def _listen(line: socket.socket, *, at_once: int = 65536) -> fdpexpect.fdspawn:
    # use_poll: select() can't take descriptors above 1023. searchwindowsize: without it every
    # read searches the whole boot log again.
    return fdpexpect.fdspawn(
        line,
        encoding="utf-8",
        codec_errors="replace",
        use_poll=True,
        maxread=at_once,
        searchwindowsize=4096,
    )


def _send(guest: fdpexpect.fdspawn, lines: list[str]) -> None:
    guest.send("".join(f"{text}\n" for text in lines))


def _expect(guest: fdpexpect.fdspawn, pattern: str, seconds: float | None, what: str) -> None:
    """Wait for the pattern; raise HostError when the guest says that it has failed."""
    try:
        found = guest.expect([pattern, _FAILED], timeout=seconds)
    except pexpect.TIMEOUT as error:
        raise OperationTimeoutError(
            f"the guest did not {what} within {seconds:g} s", console=_tail(guest)
        ) from error
    except (pexpect.EOF, OSError) as error:
        raise HostError(
            f"the guest's serial line ended before it could {what}", console=_tail(guest)
        ) from error
    if found == 1:
        raise HostError(f"the guest could not {what}: {guest.match.group(1)}")


def _tail(guest: fdpexpect.fdspawn) -> str:
    return str(guest.before or "")[-_TAIL_CHARACTERS:]
