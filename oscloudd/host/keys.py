"""SSH keys: a guest's own host key, made here, and the users' public keys, checked here.

Host keys are made here because ssh-keygen is slow in an emulated guest. Nothing is kept on disk.
"""

import asyncio
import base64
import binascii
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.commands import run

# The types sshd of Debian 12 takes in authorized_keys (ssh-keygen(1)), and how many fields the
# decoded key of each has (RFC 4253 section 6.6, RFC 5656 section 3.1, RFC 8709, PROTOCOL.u2f).
_FIELDS_BY_TYPE = {
    "ssh-ed25519": 2,
    "ssh-rsa": 3,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "sk-ssh-ed25519@openssh.com": 3,
    "sk-ecdsa-sha2-nistp256@openssh.com": 4,
}
# A 16384-bit RSA key, the largest ssh-keygen makes, is 2.8 kB.
_MAX_LINE_LENGTH = 8192
_HINT = "give one line of a file such as ~/.ssh/id_ed25519.pub: type, key, comment"


@dataclass(frozen=True)
class HostKey:
    """What a guest's sshd identifies itself with: an OpenSSH private key and its public line.

    It is an ed25519 one and the only one. A second of another type costs an emulated sshd 50 ms at
    each connection, and all clients of the last ten years know this type.
    """

    private: str
    public: str


class HostKeys:
    """Has a host key at hand for the next guest: making one takes 15 ms.

    They are made in files below `below`. Whoever made this closes it.
    """

    def __init__(self, below: Path) -> None:
        self._below = below
        self._next: asyncio.Task[HostKey] | None = None
        self._is_closed = False

    def prepare(self) -> None:
        """Begin to make the next key, unless there is one."""
        if self._next is None and not self._is_closed:
            self._next = asyncio.create_task(make_host_key(self._below), name="host key")

    async def take(self) -> HostKey:
        """Give a key that nobody else gets; raises HostError when ssh-keygen fails."""
        made, self._next = self._next, None
        if made is not None:
            with suppress(HostError):  # it may go better now
                return await made
        return await make_host_key(self._below)

    async def close(self) -> None:
        """Drop the key that is at hand."""
        self._is_closed = True
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


async def make_host_key(below: Path) -> HostKey:
    """Make a guest's host key, with no comment and no passphrase.

    It is in a file below `below` for a moment, which is left there when we are killed.
    """
    with tempfile.TemporaryDirectory(dir=below) as directory:
        path = Path(directory) / "key"
        await run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])
        public = path.with_suffix(".pub").read_text(encoding="ascii")
        return HostKey(path.read_text(encoding="ascii"), public.strip())


def check_public_key(text: str, *, parameter: str = "ssh_key") -> str:
    """Give one OpenSSH public key line, stripped; raise InvalidArgumentError for anything else.

    Blanks around the line, a final newline included, are taken away; options before the type, as in
    authorized_keys, are refused.
    """
    line = text.strip()
    if not line:
        raise _refusal("is empty", parameter)
    if len(line) > _MAX_LINE_LENGTH:
        raise _refusal(f"is longer than {_MAX_LINE_LENGTH} characters", parameter)
    if not line.isprintable():
        raise _refusal("has a line break or another control character in it", parameter)
    key_type, _, rest = line.partition(" ")
    if key_type not in _FIELDS_BY_TYPE:
        raise _refusal(f"starts with {key_type!r:.60}, which is no type of key", parameter)
    encoded, _, comment = rest.strip().partition(" ")
    _check_key_data(key_type, encoded, parameter)
    return " ".join(filter(None, (key_type, encoded, comment.strip())))


def _check_key_data(key_type: str, encoded: str, parameter: str) -> None:
    try:
        data = base64.b64decode(encoded.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _refusal("is not base64 after its type", parameter) from error
    fields = _split_fields(data)
    if fields is None or len(fields) != _FIELDS_BY_TYPE[key_type] or not all(fields):
        raise _refusal("is cut off or damaged", parameter)
    if fields[0] != key_type.encode():
        raise _refusal(
            f"says {key_type} but holds {fields[0].decode('ascii', 'replace')!r:.60}", parameter
        )


def _split_fields(data: bytes) -> list[bytes] | None:
    """Split the strings of RFC 4251 section 5, each behind its length; None if they don't fit."""
    fields = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) < max(end, 4):
            return None
        fields.append(data[4:end])
        data = data[end:]
    return fields


def _refusal(what: str, parameter: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{parameter} {what}", hint=_HINT, parameter=parameter)
