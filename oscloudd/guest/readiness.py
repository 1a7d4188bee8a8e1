"""When a guest can be logged into: its sshd greets on its own address."""

import asyncio

from oscloudd.errors import OperationTimeoutError

SSH_PORT = 22

# A booting guest drops what comes before its network is up, and the kernel sends a SYN again
# only after 1 s (RFC 6298, initial timeout), so an attempt is given up well before that.
_ATTEMPT_SECONDS = 0.2
# A busy emulated guest takes seconds from accepting to greeting.
_BANNER_SECONDS = 20.0

# A refusal comes at once, and a guest that refuses will listen any moment: no busy loop, though.
_REFUSED_SECONDS = 0.05


async def wait_ssh_banner(address: str, *, timeout_seconds: float) -> str:
    """Wait for an ssh banner (RFC 4253 section 4.2) at `address` and give it.

    There is no event to wait for: the guest tells nobody when its sshd listens. Raises
    OperationTimeoutError.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                banner = await _try_once(address)
                if banner is not None:
                    return banner
    except TimeoutError as error:
        raise OperationTimeoutError(
            f"no sshd answered at {address} port {SSH_PORT} within {timeout_seconds:g} s"
        ) from error


async def _try_once(address: str) -> str | None:
    try:
        async with asyncio.timeout(_ATTEMPT_SECONDS):
            reader, writer = await asyncio.open_connection(address, SSH_PORT)
    except TimeoutError:
        return None
    except OSError:
        await asyncio.sleep(_REFUSED_SECONDS)
        return None
    try:
        async with asyncio.timeout(_BANNER_SECONDS):
            line = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        # Reset, silent, or endless: what answers there is no sshd, or one of a guest that reboots.
        return None
    finally:
        writer.close()
    return line.decode("ascii", "replace").strip() if line.startswith(b"SSH-") else None
