"""The firmware of guests that boot by UEFI: OVMF, where Debian's package `ovmf` has it."""

from pathlib import Path

from oscloudd.errors import HostError

# The 4 MiB variant, which Debian's README of the package recommends for new machines.
UEFI_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
# What a machine's own variables begin as.
UEFI_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


def check_uefi() -> None:
    """Raise HostError where this host has no firmware for UEFI."""
    for path in UEFI_CODE, UEFI_VARIABLES:
        if not path.exists():
            raise HostError(
                f"a guest that boots by UEFI needs {path}", hint="install it: apt-get install ovmf"
            )
