"""What a qemu binary says about itself."""

import re
from dataclasses import dataclass

from oscloudd.errors import HostError
from oscloudd.host.commands import run

_ANSWER_SECONDS = 20.0
_Q35 = re.compile(r"^q35\s.*\(alias of (\S+)\)", re.MULTILINE)


@dataclass(frozen=True)
class QemuVersion:
    """`version` is its first line of words, e.g. "QEMU emulator version 7.2.22 (Debian …)".

    `machine_type` is the versioned name of q35, e.g. "pc-q35-7.2": the same virtual hardware for
    as long as a vm lives, whatever qemu is installed later.
    """

    version: str
    machine_type: str


async def inspect_qemu(binary: str) -> QemuVersion:
    """Ask a qemu for its version and its machine type; raise HostError when it can't be run."""
    words = await run([binary, "-version"], timeout_seconds=_ANSWER_SECONDS)
    machines = await run([binary, "-machine", "help"], timeout_seconds=_ANSWER_SECONDS)
    q35 = _Q35.search(machines)
    if not words.strip() or q35 is None:
        raise HostError(
            f"{binary} is not a qemu for PCs", hint="set [qemu] binary to qemu-system-x86_64"
        )
    return QemuVersion(words.splitlines()[0].strip(), q35[1])
