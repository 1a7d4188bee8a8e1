"""SSH keys: ours are fresh and whole, strangers' are checked to the last field."""

import asyncio
import base64
import subprocess
from pathlib import Path

import pytest

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.keys import check_public_key, make_host_key


def encode(*fields: bytes) -> str:
    data = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return base64.b64encode(data).decode()


ED25519 = encode(b"ssh-ed25519", b"k" * 32)


def test_a_host_key_fits_together_and_differs_each_time(tmp_path: Path) -> None:
    key, other = (asyncio.run(make_host_key(tmp_path)) for _ in range(2))
    path = tmp_path / "key"
    path.write_text(key.private)
    path.chmod(0o600)
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", path], check=True, capture_output=True, text=True
    )
    assert derived.stdout.strip() == key.public
    assert len(key.public.split()) == 2
    assert check_public_key(key.public) == key.public
    assert key.public != other.public


@pytest.mark.parametrize("key_type", ["rsa", "ecdsa", "ed25519"])
def test_what_ssh_keygen_makes_is_taken(tmp_path: Path, key_type: str) -> None:
    path = tmp_path / "key"
    comment = 'me@home "quoted" $(touch x) é'
    subprocess.run(
        ["ssh-keygen", "-q", "-t", key_type, "-N", "", "-C", comment, "-f", path], check=True
    )
    line = path.with_suffix(".pub").read_text()
    assert check_public_key(line) == line.strip()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (f"ssh-ed25519 {ED25519}\nssh-ed25519 {ED25519}", "line break"),
        (f"ssh-ed25519 {ED25519} a\x1b[0m", "control character"),
        (f"ssh-ed25519 {ED25519} a\u2028b", "control character"),
        (f"ssh-dss {ED25519}", "no type of key"),
        (f'command="sh" ssh-ed25519 {ED25519}', "no type of key"),
        (f"ssh-rsa {encode(b'ssh-ed25519', b'a', b'b')}", "but holds 'ssh-ed25519'"),
        ("ssh-ed25519", "cut off"),
        ("ssh-ed25519 !!!!", "not base64"),
        ("ssh-ed25519 ключ", "not base64"),
        (f"ssh-ed25519 {ED25519[:40]}", "cut off"),
        (f"ssh-ed25519 {encode(b'ssh-ed25519', b'')}", "cut off"),
        (f"ssh-ed25519 {encode(b'ssh-ed25519', b'k' * 32, b'more')}", "cut off"),
        (f"ssh-ed25519 {ED25519} {'x' * 9000}", "longer than"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "no type of key"),
    ],
)
def test_anything_else_is_refused_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        check_public_key(line)
    assert caught.value.details["parameter"] == "ssh_key"
    assert len(caught.value.message) < 200
