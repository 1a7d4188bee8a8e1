"""When a guest can be used: its address answers, a port of it accepts, its sshd greets."""

import asyncio
import errno
import os
import time
from dataclasses import dataclass

from oscloudd.errors import OperationTimeoutError

SSH_PORT = 22

# A booting guest drops what comes before its network is up, and the kernel sends a SYN again
# only after 1 s (RFC 6298, initial timeout), so an attempt is given up well before that.
_ATTEMPT_SECONDS = 0.2
# A busy emulated guest takes seconds from accepting to greeting.
_BANNER_SECONDS = 20.0

# A refusal comes at once, and a guest that refuses will listen any moment: no busy loop, though.
_REFUSED_SECONDS = 0.05
# After a minute of refusals nobody is at the point of listening.
_IMPATIENT_SECONDS = 60.0
_LATER_REFUSED_SECONDS = 0.5


@dataclass(frozen=True)
class Sign:
    """What a guest is to show from outside.

    `kind` is "ssh" (its sshd greets), "port" (it accepts connections) or "address" (it accepts or
    refuses one, so that its network is up: a guest whose firewall drops them shows nothing).
    """

    kind: str
    port: int = SSH_PORT

    def __str__(self) -> str:
        return f"port:{self.port}" if self.kind == "port" else self.kind


SSH = Sign("ssh")
ADDRESS = Sign("address")


@dataclass(frozen=True)
class _Seen:
    """What one attempt has shown: an answer when it was the sign, a sentence when it was not."""

    what: str
    answer: str | None = None
    is_refused: bool = False


async def wait_ssh_banner(address: str, *, timeout_seconds: float) -> str:
    """Wait for an ssh banner (RFC 4253 section 4.2) at `address` and give it.

    Raises OperationTimeoutError.
    """
    return await wait_sign(address, SSH, timeout_seconds=timeout_seconds)


async def wait_sign(address: str, sign: Sign, *, timeout_seconds: float) -> str:
    """Wait until the guest at `address` shows a sign, and give the banner if it is one.

    There is no event to wait for: the guest tells nobody when it listens. Raises
    OperationTimeoutError with what was seen last.
    """
    seen = _Seen("nobody has been asked yet")
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                seen = await _try_once(address, sign)
                if seen.answer is not None:
                    return seen.answer
                if seen.is_refused:
                    is_late = time.monotonic() - began > _IMPATIENT_SECONDS
                    await asyncio.sleep(_LATER_REFUSED_SECONDS if is_late else _REFUSED_SECONDS)
    except TimeoutError as error:
        what = "sshd" if sign.kind == "ssh" else "guest"
        raise OperationTimeoutError(
            f"no {what} answered at {address} port {sign.port} within {timeout_seconds:g} s:"
            f" {seen.what}"
        ) from error


async def _try_once(address: str, sign: Sign) -> _Seen:
    try:
        async with asyncio.timeout(_ATTEMPT_SECONDS):
            reader, writer = await asyncio.open_connection(address, sign.port)
    except TimeoutError:
        return _Seen("nothing came back")
    except OSError as error:
        if sign.kind == "address" and isinstance(error, ConnectionRefusedError):
            return _Seen("", answer="")
        # asyncio puts words of its own in place of the kernel's.
        return _Seen(os.strerror(error.errno or errno.EIO).lower(), is_refused=True)
    try:
        if sign.kind != "ssh":
            return _Seen("", answer="")
        async with asyncio.timeout(_BANNER_SECONDS):
            line = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        # Reset, silent, or endless: what answers there is no sshd, or one of a guest that reboots.
        return _Seen("it accepted and did not greet")
    finally:
        writer.close()
    if line.startswith(b"SSH-"):
        return _Seen("", answer=line.decode("ascii", "replace").strip())
    return _Seen("it accepted and greeted as no sshd does")
