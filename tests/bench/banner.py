"""When an ssh banner comes, or a login prompt: one prober for everything that is measured."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BOOT_SECONDS = 300.0
_ATTEMPT_SECONDS = 0.1
_PAUSE_SECONDS = 0.02


@contextmanager
def banner_of(address: str) -> Iterator[list[float]]:
    """Watch for the banner meanwhile; the moment is in the list when all is done."""
    seen: list[float] = []
    prober = threading.Thread(target=lambda: seen.append(wait_banner(address)), daemon=True)
    prober.start()
    yield seen
    prober.join(BOOT_SECONDS)


def wait_banner(address: str) -> float:
    """Give the moment at which an ssh banner has come from `address`."""
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 22), _ATTEMPT_SECONDS) as connection:
                connection.settimeout(10)
                if connection.recv(4) == b"SSH-":
                    return time.monotonic()
        except OSError:
            time.sleep(_PAUSE_SECONDS)  # a refusal comes at once
    raise TimeoutError(f"no sshd answered at {address} within {BOOT_SECONDS:g} s")


def wait_text(path: Path, text: bytes) -> None:
    """Wait until a file that is being written has this in it."""
    deadline = time.monotonic() + BOOT_SECONDS
    while text not in path.read_bytes():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no {text!r} after {BOOT_SECONDS:g} s")
        time.sleep(_PAUSE_SECONDS)
