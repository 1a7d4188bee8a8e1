"""Sizes and names as users write them, turned into numbers and checked words.

Pure functions, known by every room; they import nothing of ours but the errors.
"""

import re

from oscloudd.errors import InvalidArgumentError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)")

_RATE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_RATE = re.compile(r"([0-9]{1,13})([KMG]?)", re.ASCII)
_LEAST_RATE, _MOST_RATE = 64 * 10**3, 10**12

# 2^63 - 1: the largest INTEGER of SQLite and the largest offset qemu-img takes.
MAX_SIZE_BYTES = (1 << 63) - 1

# 2^63 has 19 digits. A longer text is nobody's id, and Python refuses to read one of 4,300.
_ID_DIGITS = 20

# One DNS label (RFC 1035, 63 octets) plus the underscore of the original's own `my_vm`.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
_NAME = re.compile(NAME_PATTERN, re.ASCII)


def parse_size(value: int | str, *, parameter: str) -> int:
    """Give the bytes meant by `value`: an integer is bytes, a string takes K, M, G or T (binary).

    Raises InvalidArgumentError naming `parameter` for anything else, zero and negatives included.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _bad_size(value, parameter)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().upper().removesuffix("IB").removesuffix("B"))
        if match is None:
            raise _bad_size(value, parameter)
        value = int(match[1]) * _UNITS[match[2]]
    if not 0 < value <= MAX_SIZE_BYTES:
        raise _bad_size(value, parameter)
    return value


def _bad_size(value: object, parameter: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{parameter} {value!r:.60} is not a size",
        hint='give bytes as a number, or a string such as "512M" or "10G"',
        parameter=parameter,
    )


def parse_rate(value: int | str, *, parameter: str) -> int:
    """Give the bits a second meant by `value`; a string takes K, M or G, decimal as networks' are.

    Raises InvalidArgumentError naming `parameter` for anything below 64K or above 1000G.
    """
    match = _RATE.fullmatch(str(value).strip().upper())
    rate = int(match[1]) * _RATE_UNITS[match[2]] if match is not None else 0
    if isinstance(value, bool) or not _LEAST_RATE <= rate <= _MOST_RATE:
        raise InvalidArgumentError(
            f"{parameter} {value!r:.60} is no rate",
            hint='bits a second between 64K and 1000G, such as "100M"',
            parameter=parameter,
        )
    return rate


def format_size(size_bytes: int) -> str:
    """Write bytes the way `parse_size` reads them, in the largest unit that fits."""
    for unit in ("T", "G", "M", "K"):
        scale = _UNITS[unit]
        if size_bytes >= scale:
            whole, rest = divmod(size_bytes, scale)
            return f"{whole}{unit}" if rest == 0 else f"{size_bytes / scale:.1f}{unit}"
    return str(size_bytes)


def parse_key(key: int | str) -> int | str:
    """Give what names an object: an id where the text is all digits, else a name."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < _ID_DIGITS:
        return int(key)
    return key


def is_possible_id(key: int) -> bool:
    """Tell whether the database can hold this number at all."""
    return 0 < key <= MAX_SIZE_BYTES


def check_name(value: str, *, parameter: str = "name") -> str:
    """Give `value` back if it can name an object; raise InvalidArgumentError otherwise.

    A name of digits alone is refused: it could not be told from an id.
    """
    if _NAME.match(value) is None or value.endswith("\n"):
        raise InvalidArgumentError(
            f"{parameter} {value!r:.80} can't be used",
            hint="use 1 to 63 letters, digits, _ or -, the first a letter or a digit",
            parameter=parameter,
        )
    if value.isdigit():
        raise InvalidArgumentError(
            f"{parameter} {value!r} is all digits and would be taken for an id",
            hint="put a letter in it",
            parameter=parameter,
        )
    return value
