"""Checksums of files: one given by hand, or the list a vendor publishes beside its images."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oscloudd.errors import InvalidArgumentError

Algorithm = Literal["sha256", "sha512"]

# Hexadecimal digits, by which lists without a name for it tell the algorithm.
_ALGORITHMS: dict[int, Algorithm] = {64: "sha256", 128: "sha512"}
# sha256sum(1), also with --tag, the form of BSD: Debian and Ubuntu have one, Fedora the other.
_GNU_LINE = re.compile(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{128}) [ *](?:\./)?(.+)")
_BSD_LINE = re.compile(r"SHA(?:256|512) \((?:\./)?(.+)\) = ([0-9a-fA-F]{64}|[0-9a-fA-F]{128})")


@dataclass(frozen=True)
class Checksum:
    """What a file's digest must be: hexadecimal, in lower case."""

    algorithm: Algorithm
    digest: str

    def __str__(self) -> str:
        return f"{self.algorithm.upper()} {self.digest}"


def parse_checksum(text: str, *, parameter: str) -> Checksum:
    """Read a SHA256 or SHA512 in hexadecimal; raises InvalidArgumentError naming `parameter`."""
    digest = text.strip().lower()
    algorithm = _ALGORITHMS.get(len(digest))
    if algorithm is None or re.fullmatch("[0-9a-f]+", digest) is None:
        raise InvalidArgumentError(
            f"{parameter} {text!r:.150} is no checksum",
            hint="give the 64 hexadecimal digits that sha256sum prints, or the 128 of sha512sum",
            parameter=parameter,
        )
    return Checksum(algorithm, digest)


def parse_checksums(text: str) -> dict[str, Checksum]:
    """Read a SHA256SUMS, SHA512SUMS or CHECKSUM file: checksums by file name.

    Lines of any other form are passed over, a signature's and comments among them. Of a file that
    has two, the longer counts.
    """
    found: dict[str, Checksum] = {}
    for line in map(str.strip, text.splitlines()):
        if (match := _GNU_LINE.fullmatch(line)) is not None:
            digest, name = match.groups()
        elif (match := _BSD_LINE.fullmatch(line)) is not None:
            name, digest = match.groups()
        else:
            continue
        if name not in found or len(found[name].digest) < len(digest):
            found[name] = Checksum(_ALGORITHMS[len(digest)], digest.lower())
    return found


def checksum_of(path: Path, algorithm: Algorithm) -> Checksum:
    """Compute a file's checksum; blocks. Raises OSError when it can't be read."""
    with path.open("rb") as file:
        return Checksum(algorithm, hashlib.file_digest(file, algorithm).hexdigest())
