"""The seed of a guest with cloud-init that is to become nobody: a machine to be saved and cloned.

What it is told is what each of its clones replaces by its own; how, is in `warm_agent`, which runs
in the guest.
"""

import hashlib
from functools import cache
from pathlib import Path

from oscloudd.guest.hooks import Hooks
from oscloudd.guest.identity import GuestIdentity, make_machine_id
from oscloudd.guest.seed import build_seed_files
from oscloudd.host.keys import HostKey

_INSTANCE_ID = "iid-oscloud-saved"
_AGENT = Path(__file__).with_name("warm_agent.py")
_BOOTHOOK = Path(__file__).with_name("boothook.sh")


def build_warm_seed_files(mac: str, key: HostKey) -> dict[str, bytes]:
    """Give the seed's files by name; `key`, whose private half is nobody's, is of this seed only.

    The addresses are TEST-NET-1 (RFC 5737), for the machine has no network.
    """
    nobody = GuestIdentity(
        hostname="oscloud-nobody",
        address="192.0.2.2",
        prefix_length=24,
        gateway="192.0.2.1",
        mac=mac,
        dns=("192.0.2.1",),
        # It matches no password, and sshd asks for one.
        root_password_hash="*",
        authorized_keys=(key.public,),
        host_key=key,
        machine_id=make_machine_id(),
    )
    return build_seed_files(nobody, _INSTANCE_ID, "", Hooks(), _AGENT.read_text())


@cache
def agent_digest() -> str:
    """Give the SHA-256 of what is done in a guest that is saved: another makes another image."""
    return hashlib.sha256(_AGENT.read_bytes() + _BOOTHOOK.read_bytes()).hexdigest()
