"""The user's ssh keys: which public keys a new vm gets, which private ones `vm-ssh` offers.

Owns $XDG_DATA_HOME/oscloud/id_ed25519, made only for a user who has no key in ~/.ssh.
"""

import os
import subprocess
from pathlib import Path

from oscloudd.errors import HostError, InvalidArgumentError

_PUBLIC_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")
_KEYGEN_TIMEOUT_SECONDS = 30


def own_key_path() -> Path:
    """Give the path of the private key this program makes for whoever has none."""
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data_home) / "oscloud" / "id_ed25519"


def list_user_keys() -> list[Path]:
    """Give the public key files in ~/.ssh; certificates are no keys a guest could take."""
    found = sorted((Path.home() / ".ssh").glob("id_*.pub"))
    return [path for path in found if not path.name.endswith("-cert.pub")]


def ensure_default_keys() -> list[str]:
    """Give the user's public keys; make a key first if there is none."""
    files = list_user_keys()
    if not files:
        files = [_ensure_own_key()]
    return [read_public_key(str(path)) for path in files]


def list_identities() -> list[Path]:
    """Give the private keys to offer, or none where ssh's own choice is right.

    Once one is named ssh no longer tries ~/.ssh by itself, so those are named beside our own.
    """
    own = own_key_path()
    if not own.exists():
        return []
    beside = [path.with_suffix("") for path in list_user_keys()]
    return [own, *(path for path in beside if path.exists())]


def read_public_key(given: str) -> str:
    """Give the public key in the file `given`, or `given` itself if it is one.

    Raises InvalidArgumentError for a file that can't be read or holds something else.
    """
    if given.startswith(_PUBLIC_KEY_TYPES) and " " in given:
        return given.strip()
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InvalidArgumentError(
            f"can't read the ssh key {given}: {reason}",
            hint="name the file of a public key, such as ~/.ssh/id_ed25519.pub",
        ) from error
    if "PRIVATE KEY" in text:
        raise InvalidArgumentError(
            f"{given} is a private key, which stays with you", hint=f"use {given}.pub"
        )
    if not text.startswith(_PUBLIC_KEY_TYPES):
        raise InvalidArgumentError(
            f"{given} holds no ssh public key", hint="name a file such as ~/.ssh/id_ed25519.pub"
        )
    return text


def _ensure_own_key() -> Path:
    private = own_key_path()
    public = private.with_name(private.name + ".pub")
    if public.exists() and private.exists():
        return public
    private.parent.mkdir(parents=True, exist_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "oscloud", "-f", str(private)]
    try:
        subprocess.run(
            argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=_KEYGEN_TIMEOUT_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise HostError(
            "you have no ssh key, and there is no ssh-keygen to make one",
            hint="sudo apt install openssh-client, or give --ssh-key FILE, or --no-ssh-key",
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise HostError(f"ssh-keygen could not make {private}: {error}") from error
    return public
