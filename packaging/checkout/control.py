"""The checkout's own command line, `.venv/bin/oscloudctl`, as `make up` and `make down` use it."""

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from checkout import SOCKET, VENV
from stages import CheckoutError

PROGRAM = VENV / "bin/oscloudctl"

# NotFoundError's exit status.
_NOT_FOUND = 3


def call(*arguments: str) -> Any:
    """Run oscloudctl with `--json` and give what it answers, None where nothing has that name."""
    done = subprocess.run(
        [str(PROGRAM), *arguments, "--json"],
        env=_environment(), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode == _NOT_FOUND:
        return None
    if done.returncode != 0:
        message, _, hint = done.stderr.strip().removeprefix("Error: ").partition("\nHint: ")
        raise CheckoutError(message or f"oscloudctl {' '.join(arguments)} failed", hint)
    return json.loads(done.stdout)


def control(*arguments: str) -> None:
    """Run oscloudctl with only its progress and errors shown; raise CheckoutError if it fails."""
    status = _run_shown(arguments, stdout=subprocess.DEVNULL)
    if status != 0:
        raise CheckoutError(f"oscloudctl {arguments[0]} failed with status {status}")


def show_info(vm: str) -> None:
    """Print the vm's info as the command line does."""
    _run_shown(["vm-info", vm], stdout=None)


def _run_shown(arguments: Sequence[str], stdout: int | None) -> int:
    return subprocess.run(
        [str(PROGRAM), *arguments],
        env=_environment(), stdin=subprocess.DEVNULL, stdout=stdout, check=False,
    ).returncode  # fmt: skip


def _environment() -> dict[str, str]:
    return {**os.environ, "OSCLOUD_SOCKET": str(SOCKET)}
