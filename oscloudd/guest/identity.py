"""Who a guest is, and the document that tells it so. Pure, but for drawing the random parts.

The document is lines `name=value`, each value base64 so that no value can break a line. It is
kept in the database until the guest has taken it in, since it may have to be told again.
"""

import base64
import secrets
import time
from dataclasses import dataclass

from oscloudd.host.keys import HostKeys

GREETING = "Powered by OS Cloud"

# What RNDADDENTROPY of Linux takes for a full pool (random(4): 256 bits), twice over.
_ENTROPY_BYTES = 64
_LINE_LENGTH = 76


@dataclass(frozen=True)
class GuestIdentity:
    """All that makes one guest different from another of the same template."""

    hostname: str
    address: str
    prefix_length: int
    gateway: str
    mac: str
    dns: tuple[str, ...]
    root_password: str
    authorized_keys: tuple[str, ...]
    host_keys: HostKeys
    machine_id: str


def hostname_of(name: str) -> str:
    """Give the hostname of the vm called `name`: RFC 952 knows neither `_` nor a final `-`."""
    return name.lower().replace("_", "-").rstrip("-")


def make_machine_id() -> str:
    """Draw a machine id: 32 hexadecimal digits, a valid version 4 UUID as machine-id(5) asks."""
    digits = list(secrets.token_hex(16))
    digits[12] = "4"
    digits[16] = "89ab"[int(digits[16], 16) & 3]
    return "".join(digits)


def build_document(identity: GuestIdentity) -> str:
    """Write the identity down, without what must be fresh whenever it is told."""
    values = {
        "hostname": identity.hostname,
        "address": identity.address,
        "prefix_length": str(identity.prefix_length),
        "gateway": identity.gateway,
        "mac": identity.mac,
        "dns": " ".join(identity.dns),
        "root_password": identity.root_password,
        "authorized_keys": "".join(f"{key}\n" for key in identity.authorized_keys),
        "host_key_ed25519": identity.host_keys.ed25519_private,
        "host_key_ed25519_public": f"{identity.host_keys.ed25519_public}\n",
        "host_key_ecdsa": identity.host_keys.ecdsa_private,
        "host_key_ecdsa_public": f"{identity.host_keys.ecdsa_public}\n",
        "machine_id": identity.machine_id,
        "greeting": GREETING,
    }
    return "".join(_line(name, value.encode()) for name, value in values.items())


def encode_for_line(document: str) -> list[str]:
    """Give the lines to send: the document with fresh entropy and the time, base64, then a dot."""
    fresh = _line("entropy", secrets.token_bytes(_ENTROPY_BYTES))
    fresh += _line("time", str(int(time.time())).encode())
    text = base64.b64encode((document + fresh).encode()).decode()
    return [*(text[at : at + _LINE_LENGTH] for at in range(0, len(text), _LINE_LENGTH)), "."]


def _line(name: str, value: bytes) -> str:
    return f"{name}={base64.b64encode(value).decode()}\n"


# The answer to a first boot that is to become nobody: a machine to be saved and cloned.
WARM_DOCUMENT = _line("warm", b"1")
