"""Who a guest is, and the document that tells it so. Pure, but for drawing the random parts.

The document is lines `name=value`, each value base64 so that no value can break a line. It is
kept in the database until the guest has taken it in, since it may have to be told again.
"""

import base64
import secrets
import shlex
import time
import uuid
from dataclasses import dataclass

from oscloudd.host.keys import HostKey

GREETING = "Powered by OS Cloud"

# What RNDADDENTROPY of Linux takes for a full pool (random(4): 256 bits), twice over.
_ENTROPY_BYTES = 64
_LINE_LENGTH = 76


@dataclass(frozen=True)
class GuestNic:
    """A network card beside the first one: no route goes out there but to its own network."""

    mac: str
    address: str
    prefix_length: int
    address6: str = ""  # with its prefix length; "" where it has none

    @property
    def addresses(self) -> list[str]:
        """Its addresses with their prefix lengths."""
        return _with_prefixes(self)


@dataclass(frozen=True)
class GuestIdentity:
    """All that makes one guest different from another of the same template."""

    hostname: str
    address: str
    prefix_length: int
    gateway: str
    mac: str
    dns: tuple[str, ...]
    root_password_hash: str  # as in shadow(5); "" locks it
    authorized_keys: tuple[str, ...]
    host_key: HostKey
    machine_id: str
    address6: str = ""  # with its prefix length; "" where it has none
    gateway6: str = ""
    keeps_access: bool = False  # password and keys are those its disk has already
    is_copy: bool = False  # its disk has another's identity, access included unless that is kept
    other_nics: tuple[GuestNic, ...] = ()

    @property
    def addresses(self) -> list[str]:
        """Those of its first card, with their prefix lengths."""
        return _with_prefixes(self)


def _with_prefixes(card: GuestNic | GuestIdentity) -> list[str]:
    address = f"{card.address}/{card.prefix_length}"
    return [address, card.address6] if card.address6 else [address]


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
        "root_password_hash": identity.root_password_hash,
        "authorized_keys": "".join(f"{key}\n" for key in identity.authorized_keys),
        "host_key_ed25519": identity.host_key.private,
        "host_key_ed25519_public": f"{identity.host_key.public}\n",
        "machine_id": identity.machine_id,
        "greeting": GREETING,
    }
    if identity.address6:
        values |= {"address6": identity.address6, "gateway6": identity.gateway6}
    if identity.keeps_access:
        values["keep_access"] = "1"
    if identity.other_nics:
        lines = (" ".join((nic.mac, *nic.addresses)) + "\n" for nic in identity.other_nics)
        values["other_nics"] = "".join(lines)
    return "".join(_line(name, value.encode()) for name, value in values.items())


def build_instance_document(identity: GuestIdentity, instance_id: str) -> str:
    """Write the same down for a clone of an image with cloud-init, which has an instance-id."""
    return build_document(identity) + _line("instance_id", instance_id.encode())


def encode_for_line(document: str) -> list[str]:
    """Give the lines to send: the document with fresh entropy and the time, base64, then a dot."""
    return _encode(document + "".join(_line(name, value) for name, value in _draw_fresh()))


def encode_for_clone(document: str) -> list[str]:
    """Give the same for a clone, which has not booted and gets a boot id, too.

    Its shell reads the lines as a script, up to `return`: decoding each value by itself costs an
    emulated guest half a second.
    """
    pairs = (line.split("=", 1) for line in document.splitlines())
    values = [(name, base64.b64decode(value)) for name, value in pairs]
    values += [*_draw_fresh(), ("boot_id", str(uuid.uuid4()).encode())]
    return [*(f"{name}={shlex.quote(value.decode())}" for name, value in values), "return"]


def _draw_fresh() -> list[tuple[str, bytes]]:
    entropy = secrets.token_hex(_ENTROPY_BYTES)
    return [("entropy", entropy.encode()), ("time", str(int(time.time())).encode())]


def _encode(text: str) -> list[str]:
    encoded = base64.b64encode(text.encode()).decode()
    return [*(encoded[at : at + _LINE_LENGTH] for at in range(0, len(encoded), _LINE_LENGTH)), "."]


def _line(name: str, value: bytes) -> str:
    return f"{name}={base64.b64encode(value).decode()}\n"


# The answer to a first boot that is to become nobody: a machine to be saved and cloned.
WARM_DOCUMENT = _line("warm", b"1")

# For a clone that is to be somebody later, and does now what takes an emulated guest longer the
# first time.
REHEARSAL_DOCUMENT = _line("rehearse", b"1")
