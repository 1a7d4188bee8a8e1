"""Hashes of passwords, made here: a guest under emulation needs 50 ms for one, the host 2."""

import ctypes
import secrets
import string
from functools import cache

from oscloudd.errors import HostError

# Not yescrypt, Debian's own choice: an emulated guest takes a second to check one at each login.
_SHA512_PREFIX = "$6$"
_SALT_ALPHABET = string.ascii_letters + string.digits + "./"
_SALT_LENGTH = 16
# sizeof(struct crypt_data) of libxcrypt, crypt.h.
_WORK_BYTES = 32768


def hash_password(password: str) -> str:
    """Give the crypt(5) hash of a password, for a shadow file; "" for "", which locks it.

    Raises HostError when this host's libcrypt can't make one.
    """
    if not password:
        return ""
    salt = "".join(secrets.choice(_SALT_ALPHABET) for _ in range(_SALT_LENGTH))
    work = ctypes.create_string_buffer(_WORK_BYTES)
    setting = (_SHA512_PREFIX + salt).encode()
    made = _libcrypt().crypt_rn(password.encode(), setting, work, ctypes.c_int(_WORK_BYTES))
    if made is None:
        raise HostError("the root password can't be hashed: libcrypt knows no SHA-512 (crypt(5))")
    return str(made.decode("ascii"))


@cache
def _libcrypt() -> ctypes.CDLL:
    # The standard library's own crypt is gone from Python 3.13 on.
    try:
        library = ctypes.CDLL("libcrypt.so.1")
    except OSError as error:
        raise HostError("libcrypt.so.1 is missing", hint="apt install libcrypt1") from error
    library.crypt_rn.restype = ctypes.c_char_p
    return library
