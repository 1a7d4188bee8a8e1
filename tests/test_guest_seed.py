"""The seed of a guest with cloud-init: what is in it, what is refused, and what comes back."""

import json
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pycdlib
import pytest

from oscloudd.errors import HostError, InvalidArgumentError, OperationTimeoutError
from oscloudd.guest import cloud_init
from oscloudd.guest.cloud_init import parse_result, wait_cloud_init
from oscloudd.guest.hooks import Hooks
from oscloudd.guest.identity import GuestIdentity, GuestNic
from oscloudd.guest.seed import build_seed_files, check_user_data, write_seed
from oscloudd.host.keys import HostKey

IDENTITY = GuestIdentity(
    hostname="my-web",
    address="192.168.0.2",
    prefix_length=16,
    gateway="192.168.0.1",
    mac="52:54:00:00:00:02",
    dns=("192.168.0.1", "192.0.2.53"),
    root_password_hash="$6$salt$it's",
    authorized_keys=("ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"),
    host_key=HostKey("PRIVATE\n", "ssh-ed25519 CCCC"),
    machine_id="0" * 32,
)
NO_HOOKS = Hooks()


def seed(
    identity: GuestIdentity = IDENTITY, user_data: str = "", hooks: Hooks = NO_HOOKS
) -> dict[str, str]:
    files = build_seed_files(identity, "an-uuid", user_data, hooks)
    return {name: content.decode() for name, content in files.items()}


def vendor_parts(files: dict[str, str]) -> dict[str, str]:
    beginning, _, archive = files["vendor-data"].partition("\n")
    assert beginning == "#cloud-config-archive"
    return {part["type"]: part["content"] for part in json.loads(archive)}


def vendor_config(files: dict[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(vendor_parts(files)["text/cloud-config"])
    return config


def test_the_seed_says_who_the_guest_is() -> None:
    files = seed()
    assert json.loads(files["meta-data"]) == {
        "instance-id": "an-uuid",
        "local-hostname": "my-web",
        "public-keys": ["ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"],
    }
    card = json.loads(files["network-config"])["ethernets"]["eth0"]
    assert card["match"] == {"macaddress": "52:54:00:00:00:02"}
    assert card["addresses"] == ["192.168.0.2/16"]
    assert card["routes"] == [{"to": "default", "via": "192.168.0.1"}]
    assert card["nameservers"] == {"addresses": ["192.168.0.1", "192.0.2.53"]}
    assert card["accept-ra"] is False
    dual = replace(IDENTITY, address6="fd00:a::2/64", gateway6="fd00:a::1")
    card = json.loads(seed(dual)["network-config"])["ethernets"]["eth0"]
    assert card["addresses"] == ["192.168.0.2/16", "fd00:a::2/64"]
    assert card["routes"][1:] == [{"to": "::/0", "via": "fd00:a::1"}]
    keys = vendor_config(files)["ssh_keys"]
    assert keys == {"ed25519_private": "PRIVATE\n", "ed25519_public": "ssh-ed25519 CCCC\n"}


def test_the_seed_names_every_card() -> None:
    others = (GuestNic("52:54:00:00:00:03", "10.20.0.2", 24),)
    files = seed(replace(IDENTITY, other_nics=others))
    cards = json.loads(files["network-config"])["ethernets"]
    assert cards["eth0"] == json.loads(seed()["network-config"])["ethernets"]["eth0"]
    assert cards["eth1"] == {
        "match": {"macaddress": "52:54:00:00:00:03"},
        "set-name": "eth1",
        "addresses": ["10.20.0.2/24"],
        "accept-ra": False,
    }


def test_a_password_is_asked_for_only_where_there_is_one() -> None:
    assert vendor_config(seed())["ssh_pwauth"] is True
    assert vendor_config(seed(replace(IDENTITY, root_password_hash="")))["ssh_pwauth"] is False


def test_a_copy_keeps_who_may_log_in_and_gets_a_machine_id() -> None:
    copy = replace(
        IDENTITY, root_password_hash="", authorized_keys=(), keeps_access=True, is_copy=True
    )
    assert "ssh_pwauth" not in vendor_config(seed(copy))
    assert f"machine_id={'0' * 32}\n" in vendor_parts(seed(copy))["text/cloud-boothook"]
    assert "machine_id=''\n" in vendor_parts(seed())["text/cloud-boothook"]


@pytest.mark.parametrize("user_data", ["#cloud-config\nusers: []\n", "#!/bin/sh\ntrue\n"])
def test_user_data_are_left_as_they_are(user_data: str) -> None:
    with_them = seed(user_data=user_data)
    assert with_them.pop("user-data") == user_data
    without = seed()
    assert without.pop("user-data").startswith("#cloud-config\n")
    assert with_them == without


def test_our_config_has_no_list_that_one_of_the_users_could_replace() -> None:
    values = vendor_config(seed()).values()
    assert not [value for value in values if isinstance(value, list)]


def test_the_boothook_is_a_script_that_knows_its_values(tmp_path: Path) -> None:
    hook = vendor_parts(seed())["text/cloud-boothook"]
    assert hook.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n"], input=hook, text=True, check=True)
    assignments = [line for line in hook.splitlines() if line.startswith("root_password_hash=")]
    assert shlex.split(assignments[0]) == ["root_password_hash=$6$salt$it's"]


def test_a_templates_commands_come_after_whose_its_files_are() -> None:
    hooks = Hooks(owners=(("/srv/a b", "debian:users"),), commands=("one", "two; three"))
    script = vendor_parts(seed(hooks=hooks))["text/x-shellscript"]
    assert script == "#!/bin/sh\nset -e\nchown -h debian:users '/srv/a b'\none\ntwo; three\n"
    assert "text/x-shellscript" not in vendor_parts(seed())


def test_the_image_has_the_files_under_their_own_names(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    write_seed(path, build_seed_files(IDENTITY, "an-uuid", "#!/bin/sh\n", NO_HOOKS))
    image = pycdlib.PyCdlib()
    image.open(str(path))
    names = {child.rock_ridge.name() for child in image.list_children(rr_path="/")}
    assert names >= {b"meta-data", b"network-config", b"user-data", b"vendor-data"}
    assert image.pvd.volume_identifier.strip() == b"cidata"
    image.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#cloud-config\n",
        "\n#Cloud-Config\n{}",
        "#!/bin/sh\n",
        "#cloud-boothook\n",
        "#include\nhttp://192.0.2.1/\n",
        "## template: jinja\n#cloud-config\n",
        'Content-Type: multipart/mixed; boundary="="\nMIME-Version: 1.0\n',
        "MIME-Version: 1.0\nContent-Type: multipart/mixed\n",
    ],
)
def test_what_cloud_init_knows_is_taken(text: str) -> None:
    assert check_user_data(text) == text


@pytest.mark.parametrize("text", ["packages: [vim]\n", "echo hello\n", "# cloud-config\n", "\n\n"])
def test_what_cloud_init_would_ignore_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="tells cloud-init nothing"):
        check_user_data(text)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ('{"v1": {"datasource": "DataSourceNoCloud", "errors": []}}', ""),
        ('{"v1": {"errors": ["(\'runcmd\', 1)", "second"]}}', "('runcmd', 1); second"),
        ('{"v1": {"errors": ["cut of', '{"v1": {"errors": ["cut of'),
        ("[]", "[]"),
        ('{"v1": {"errors": ["\\u001b]0;mine\\u0007"]}}', "?]0;mine?"),
        ("\x1b]0;mine\x07", "?]0;mine?"),
    ],
)
def test_the_result_of_cloud_init_is_read(result: str, words: str) -> None:
    assert parse_result(result) == words


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The host's end of a channel and the guest's."""
    ends = socket.socketpair()
    with ends[0], ends[1]:
        yield ends


Ends = tuple[socket.socket, socket.socket]


def test_the_end_of_cloud_init_is_waited_for(line: Ends) -> None:
    host, guest = line
    guest.sendall(b"oscloud-cloud-init: running\n" * 3)
    guest.sendall(b'oscloud-cloud-init: ended: {"v1": {"errors": ["bad yaml"]}}\n')
    assert wait_cloud_init(host, seconds=60) == "bad yaml"
    assert guest.recv(10) == b"\n"


def test_a_guest_without_cloud_init_is_not_waited_for(
    line: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_init, "_FIRST_WORD_SECONDS", 0.01)
    assert wait_cloud_init(line[0], seconds=60) == ""


def test_cloud_init_that_does_not_end_is_given_up(line: Ends) -> None:
    line[1].sendall(b"oscloud-cloud-init: running\n")
    with pytest.raises(OperationTimeoutError, match=r"did not end within 0\.01 s"):
        wait_cloud_init(line[0], seconds=0.01)


def test_a_guest_that_says_too_much_is_not_kept(line: Ends) -> None:
    host, guest = line
    kept = cloud_init._Guest(host)
    for _ in range(20):
        guest.sendall(b"x" * 4096)
        assert kept.wait(re.compile(b"never"), 0.01) is None
    assert len(kept._said) == cloud_init._MOST_BYTES
    guest.sendall(b"oscloud-cloud-init: ended: {}\n")
    assert wait_cloud_init(host, seconds=60) == "{}"


def test_a_channel_that_ends_is_no_success(line: Ends) -> None:
    line[1].sendall(b"oscloud-cloud-init: running\n")
    line[1].shutdown(socket.SHUT_WR)
    with pytest.raises(HostError, match="channel ended"):
        wait_cloud_init(line[0], seconds=60)
