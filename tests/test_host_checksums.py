"""Checksums as people and vendors write them."""

import hashlib
from pathlib import Path

import pytest

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.checksums import Checksum, checksum_of, parse_checksum, parse_checksums

SHORT, LONG = "ab" * 32, "cd" * 64

UBUNTU = f"""\
{SHORT.upper()} *a.img
{SHORT}  b c.img
short  d.img
"""
DEBIAN = f"""\
{LONG}  debian-12-genericcloud-amd64.json
{LONG}  ./debian-12-genericcloud-amd64.qcow2
"""
FEDORA = f"""\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

# Fedora-Cloud-Base-Generic-1.2.x86_64.qcow2: 541065216 bytes
SHA256 (Fedora-Cloud-Base-Generic-1.2.x86_64.qcow2) = {SHORT}
MD5 (Fedora-Cloud-Base-Generic-1.2.x86_64.qcow2) = {"0" * 32}
-----BEGIN PGP SIGNATURE-----

iQIzBAEBCAAdFiEE
=abcd
-----END PGP SIGNATURE-----
"""


def test_ubuntus_list_has_names_with_blanks_and_both_modes() -> None:
    short = Checksum("sha256", SHORT)
    assert parse_checksums(UBUNTU) == {"a.img": short, "b c.img": short}


def test_debians_list_is_of_sha512() -> None:
    found = parse_checksums(DEBIAN)
    assert found["debian-12-genericcloud-amd64.qcow2"] == Checksum("sha512", LONG)
    assert len(found) == 2


def test_fedoras_list_is_signed_and_names_the_algorithm() -> None:
    name = "Fedora-Cloud-Base-Generic-1.2.x86_64.qcow2"
    assert parse_checksums(FEDORA) == {name: Checksum("sha256", SHORT)}


def test_of_two_for_one_file_the_longer_counts() -> None:
    for lines in ((f"{SHORT}  a", f"SHA512 (a) = {LONG}"), (f"{LONG}  a", f"SHA256 (a) = {SHORT}")):
        assert parse_checksums("\n".join(lines)) == {"a": Checksum("sha512", LONG)}


def test_one_given_by_hand_tells_its_algorithm_by_its_length() -> None:
    assert parse_checksum(f" {SHORT.upper()}\n", parameter="sha256") == Checksum("sha256", SHORT)
    assert parse_checksum(LONG, parameter="sha256") == Checksum("sha512", LONG)


@pytest.mark.parametrize(
    "text", ["", SHORT[1:], SHORT + "a", "g" * 64, f"sha256:{SHORT}", "ü" * 64]
)
def test_what_is_no_checksum_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sha256 .* is no checksum") as refused:
        parse_checksum(text, parameter="sha256")
    assert refused.value.details["parameter"] == "sha256"


def test_it_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    digest = hashlib.sha512(b"content").hexdigest()
    assert checksum_of(tmp_path / "file", "sha512") == Checksum("sha512", digest)
