"""What a saved guest with cloud-init does to become a clone, on a tree that stands for its disk."""

import json
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from oscloudd.guest.identity import GuestIdentity, build_instance_document, encode_for_clone
from oscloudd.guest.warm_agent import (
    Guest,
    build_card,
    build_link_commands,
    parse_document,
)
from oscloudd.guest.warm_seed import build_warm_seed_files
from oscloudd.host.keys import HostKey

OURS = "ssh-ed25519 AAAA"
INSTANCE = "iid-saved"
IDENTITY = GuestIdentity(
    hostname="my-web",
    address="192.168.0.2",
    prefix_length=16,
    gateway="192.168.0.1",
    mac="52:54:00:00:00:02",
    address6="fd12:3456:789a::2/64",
    gateway6="fd12:3456:789a::1",
    dns=("192.168.0.1", "192.0.2.53"),
    root_password_hash="$6$salt$it's",
    authorized_keys=("ssh-ed25519 BBBB its owner's", "ssh-rsa CCCC"),
    host_key=HostKey("PRIVATE\nKEY\n", "ssh-ed25519 DDDD"),
    machine_id="0" * 32,
)
FILES = {
    "etc/hostname": "oscloud-nobody\n",
    "etc/hosts": "127.0.1.1 oscloud-nobody oscloud-nobody\n127.0.0.1 localhost\n",
    "etc/machine-id": "1" * 32 + "\n",
    "etc/ssh/ssh_host_ed25519_key": "NOBODY'S",
    "etc/ssh/ssh_host_ed25519_key.pub": f"{OURS}\n",
    "etc/ssh/sshd_config": "#PasswordAuthentication yes\nUsePAM yes\n",
    "etc/ssh/sshd_config.d/50-cloud-init.conf": "PasswordAuthentication yes\n",
    "etc/cloud/cloud.cfg.d/05_logging.cfg": "",
    "root/.ssh/authorized_keys": f"# theirs\n{OURS}\n",
    "home/debian/.ssh/authorized_keys": f'command="echo no" {OURS}\nssh-rsa EEEE vendor\n',
    "home/other/.ssh/authorized_keys": "ssh-rsa EEEE vendor\n",
    "var/lib/systemd/random-seed": "seed",
    "var/lib/cloud/data/instance-id": f"{INSTANCE}\n",
    "var/lib/cloud/data/previous-instance-id": "NO_PREVIOUS_INSTANCE_ID\n",
    "var/lib/cloud/data/set-hostname": '{"hostname": "oscloud-nobody"}',
    f"var/lib/cloud/instances/{INSTANCE}/sem/config_ssh": "",
    f"var/lib/oscloud/{INSTANCE}": "",
    "run/cloud-init/.instance-id": f"{INSTANCE}\n",
    "run/cloud-init/instance-data.json": json.dumps(
        {"v1": {"instance_id": INSTANCE, "local_hostname": "oscloud-nobody"}}
    ),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "var/lib/cloud/instance").symlink_to(f"/var/lib/cloud/instances/{INSTANCE}")
    homes = ("/root", "/home/debian", "/home/other", "/nonexistent", "/root")
    users = [SimpleNamespace(pw_dir=home) for home in homes]
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    return tmp_path


@pytest.fixture
def guest(root: Path) -> Guest:
    guest = Guest(root, INSTANCE)
    guest.forget_itself()
    return guest


def read(guest: Guest, name: str) -> str:
    return (guest.root / name).read_text()


def test_what_is_saved_is_nobody(guest: Guest) -> None:
    assert read(guest, "etc/machine-id") == ""
    assert not list((guest.root / "etc/ssh").glob("ssh_host_*"))
    assert not (guest.root / "var/lib/systemd/random-seed").exists()
    assert read(guest, "root/.ssh/authorized_keys") == "# theirs\n"
    assert read(guest, "home/debian/.ssh/authorized_keys") == "ssh-rsa EEEE vendor\n"


def test_a_clone_has_its_names(guest: Guest) -> None:
    guest.take_names("my-web", "2" * 32)
    assert read(guest, "etc/hostname") == "my-web\n"
    assert read(guest, "etc/machine-id") == "2" * 32 + "\n"
    assert read(guest, "etc/hosts") == "127.0.1.1 my-web my-web\n127.0.0.1 localhost\n"
    assert json.loads(read(guest, "var/lib/cloud/data/set-hostname")) == {"hostname": "my-web"}


def test_it_lets_in_its_owners_where_the_image_does(guest: Guest) -> None:
    keys = ["ssh-ed25519 BBBB its owner's", "ssh-rsa CCCC"]
    guest.let_in(keys, by_password=True)
    assert read(guest, "root/.ssh/authorized_keys") == "\n".join(["# theirs", *keys, ""])
    meant = [*(f'command="echo no" {key}' for key in keys), "ssh-rsa EEEE vendor", ""]
    assert read(guest, "home/debian/.ssh/authorized_keys") == "\n".join(meant)
    assert read(guest, "home/other/.ssh/authorized_keys") == "ssh-rsa EEEE vendor\n"
    config = "etc/ssh/sshd_config.d/50-cloud-init.conf"
    assert read(guest, config) == FILES[config]


def test_one_without_keys_and_password_lets_nobody_in(guest: Guest) -> None:
    guest.let_in([], by_password=False)
    assert read(guest, "root/.ssh/authorized_keys") == "# theirs\n"
    config = read(guest, "etc/ssh/sshd_config.d/50-cloud-init.conf")
    assert config == "PasswordAuthentication no\n"
    assert read(guest, "etc/ssh/sshd_config") == FILES["etc/ssh/sshd_config"]


def test_its_host_key_is_for_its_sshd_only(guest: Guest) -> None:
    guest.take_host_key("PRIVATE", "PUBLIC")
    key = guest.root / "etc/ssh/ssh_host_ed25519_key"
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("PRIVATE", 0o600)
    assert read(guest, "etc/ssh/ssh_host_ed25519_key.pub") == "PUBLIC"


def test_the_next_boot_is_no_first_one(guest: Guest) -> None:
    guest.take_instance("an-uuid")
    cloud = guest.root / "var/lib/cloud"
    assert read(guest, "var/lib/cloud/data/instance-id") == "an-uuid\n"
    assert (cloud / "instance").readlink() == Path("/var/lib/cloud/instances/an-uuid")
    assert [path.name for path in (cloud / "instances").iterdir()] == ["an-uuid"]
    assert (cloud / "instances/an-uuid/sem/config_ssh").exists()
    assert (guest.root / "var/lib/oscloud/an-uuid").exists()
    assert "boot" in read(guest, "etc/cloud/cloud.cfg.d/99-oscloud-clone.cfg")
    assert read(guest, "run/cloud-init/.instance-id") == "an-uuid\n"
    shown = json.loads(read(guest, "run/cloud-init/instance-data.json"))
    assert shown["v1"]["instance_id"] == "an-uuid"


def test_it_reads_what_the_host_writes() -> None:
    lines = encode_for_clone(build_instance_document(IDENTITY, "an-uuid"))
    told = parse_document("".join(f"{line}\n" for line in lines))
    assert told["hostname"] == "my-web"
    assert told["authorized_keys"].splitlines() == list(IDENTITY.authorized_keys)
    assert told["root_password_hash"] == IDENTITY.root_password_hash
    assert told["host_key_ed25519"] == IDENTITY.host_key.private
    assert told["instance_id"] == "an-uuid"
    assert len(bytes.fromhex(told["entropy"])) == 64
    assert {"machine_id", "time", "boot_id"} <= told.keys()
    assert build_card(told).splitlines() == [
        "[Match]",
        "MACAddress=52:54:00:00:00:02",
        "",
        "[Network]",
        "Address=192.168.0.2/16",
        "Gateway=192.168.0.1",
        "Address=fd12:3456:789a::2/64",
        "Gateway=fd12:3456:789a::1",
        "DNS=192.168.0.1",
        "DNS=192.0.2.53",
        "IPv6AcceptRA=no",
    ]
    commands = build_link_commands(told).splitlines()
    # Nobody may reach it before the address is its own.
    assert commands.index("link set dev eth0 address 52:54:00:00:00:02") < commands.index(
        "address add 192.168.0.2/16 broadcast + dev eth0"
    )
    assert commands[-2:] == [
        "address add fd12:3456:789a::2/64 dev eth0 nodad",
        "route add ::/0 via fd12:3456:789a::1 proto static",
    ]


def test_the_making_is_told_what_the_agent_looks_for() -> None:
    files = build_warm_seed_files("52:54:00:00:00:01", HostKey("PRIVATE", OURS))
    meta = json.loads(files["meta-data"])
    assert meta["public-keys"] == [OURS]
    assert meta["instance-id"] not in meta["local-hostname"]
    assert meta["local-hostname"] not in meta["instance-id"]
    assert b'"ssh_pwauth":true' in files["vendor-data"].replace(b"\\", b"")
