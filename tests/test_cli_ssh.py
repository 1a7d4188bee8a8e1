"""`vm-ssh`: the argument vector it hands to the system's ssh, seen by an `ssh` of our own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_daemon import DEADLINE_SECONDS, VM, Oscloudctl, StubDaemon

from oscloudctl.ssh import build_arguments, build_known_hosts


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    stub = StubDaemon(tmp_path / "oscloudd.sock")
    stub.answers["vm_info"] = VM
    yield stub
    stub.close()


@pytest.fixture
def ctl(daemon: StubDaemon, tmp_path: Path) -> Oscloudctl:
    home = tmp_path / "the home"
    home.mkdir()
    return Oscloudctl(daemon, home)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which `ssh` prints its arguments as JSON."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "ssh"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def see_arguments(ctl: Oscloudctl, path: str, *arguments: str) -> list[str]:
    seen: list[str] = json.loads(ctl("vm-ssh", *arguments, PATH=path).stdout)
    return seen


def test_logs_in_as_root_and_trusts_only_the_guests_own_key(ctl: Oscloudctl, path: str) -> None:
    known = ctl.home / ".cache/oscloud/known_hosts-1-192.168.0.2"
    assert see_arguments(ctl, path, "web") == [
        "-o", "StrictHostKeyChecking=yes", "-o", f'UserKnownHostsFile="{known}"',
        "-o", "GlobalKnownHostsFile=/dev/null", "-o", "UpdateHostKeys=no",
        "-l", "root", "--", "192.168.0.2",
    ]  # fmt: skip
    assert known.read_text() == "192.168.0.2 ssh-ed25519 AAAAhost\n"
    assert [each.name for each in known.parent.iterdir()] == [known.name]


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (["ls", "-l", "/a b"], "ls -l '/a b'"),
        (["ps | wc -l"], "ps | wc -l"),
        (["--", "ls", "--help"], "ls --help"),
        (["echo", "it's", "$HOME", ""], "echo 'it'\"'\"'s' '$HOME' ''"),
        (["ls", "--user", "x", "--json"], "ls --user x --json"),
        (["grep", "--", "-x"], "grep -- -x"),
    ],
)
def test_the_command_arrives_as_typed(
    ctl: Oscloudctl, path: str, command: list[str], sent: str
) -> None:
    seen = see_arguments(ctl, path, "--user", "bob", "1", *command)
    assert seen[-5:] == ["-l", "bob", "--", "192.168.0.2", sent]


def test_offers_our_own_key_beside_the_users(
    ctl: Oscloudctl, daemon: StubDaemon, path: str
) -> None:
    daemon.answers["vm_create"] = VM
    ctl("vm-create", "web", "-q")
    own = ctl.home / ".local/share/oscloud/id_ed25519"
    assert "-i" in see_arguments(ctl, path, "web")
    (ctl.home / ".ssh").mkdir()
    for name in ("id_rsa", "id_rsa.pub", "id_token.pub"):
        (ctl.home / ".ssh" / name).touch()
    seen = see_arguments(ctl, path, "web")
    identities = [seen[at + 1] for at, word in enumerate(seen) if word == "-i"]
    assert identities == [str(own), str(ctl.home / ".ssh/id_rsa")]
    seen = see_arguments(ctl, path, "-i", "/my key", "web")
    assert [seen[at + 1] for at, word in enumerate(seen) if word == "-i"] == ["/my key"]


def test_a_guest_without_known_keys_is_trusted_once(
    ctl: Oscloudctl, daemon: StubDaemon, path: str
) -> None:
    daemon.answers["vm_info"] = {**VM, "ssh_host_keys": []}
    assert see_arguments(ctl, path, "web")[:2] == ["-o", "StrictHostKeyChecking=accept-new"]


@pytest.mark.parametrize(("state", "hint"), [("STOPPED", "vm-start"), ("PAUSED", "vm-resume")])
def test_a_vm_that_does_not_run(
    ctl: Oscloudctl, daemon: StubDaemon, path: str, state: str, hint: str
) -> None:
    daemon.answers["vm_info"] = {**VM, "state": state}
    done = ctl("vm-ssh", "web", status=5, PATH=path)
    assert f"vm web is {state}" in done.stderr
    assert f"oscloudctl {hint} web" in done.stderr


def test_no_ssh_installed(ctl: Oscloudctl) -> None:
    assert "openssh-client" in ctl("vm-ssh", "web", status=10, PATH="/nowhere").stderr


def test_the_real_ssh_understands_the_options(tmp_path: Path) -> None:
    ssh = shutil.which("ssh")
    assert ssh is not None, "openssh-client is a dependency"
    known = tmp_path / 'k "x" 100%h'
    argv = build_arguments(
        "192.168.0.2", user="root", known_hosts=known, identities=[tmp_path], command=["id"]
    )
    done = subprocess.run(
        [ssh, "-G", *argv[1:]], capture_output=True, text=True, check=True,
        timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert settings["user"] == "root"
    assert settings["hostname"] == "192.168.0.2"
    assert settings["stricthostkeychecking"] == "true"
    assert settings["userknownhostsfile"] == str(known), "as one path, nothing expanded"


def real_settings(config: Path, host: str) -> dict[str, str]:
    """Give what the system's ssh would do for a host."""
    ssh = shutil.which("ssh")
    assert ssh is not None, "openssh-client is a dependency"
    done = subprocess.run(
        [ssh, "-F", config, "-G", host], capture_output=True, text=True, check=True,
        timeout=DEADLINE_SECONDS,
    )  # fmt: skip
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_ssh_alone_finds_vms_by_name(ctl: Oscloudctl, daemon: StubDaemon, tmp_path: Path) -> None:
    other = {**VM, "id": 2, "name": "My_Db_", "ip": "192.168.0.3", "ssh_host_keys": []}
    daemon.answers["vm_list"] = [VM, other]
    config = tmp_path / "config"
    config.write_text(ctl("vm-ssh-config").stdout)
    known = ctl.home / ".cache/oscloud/known_hosts-1-192.168.0.2"
    assert known.read_text() == "192.168.0.2 ssh-ed25519 AAAAhost\n"
    web = real_settings(config, "web.oscloud")
    assert (web["hostname"], web["user"]) == ("192.168.0.2", "root")
    assert (web["stricthostkeychecking"], web["userknownhostsfile"]) == ("true", str(known))
    for name in ("my-db.oscloud", "My_Db_.oscloud"):
        db = real_settings(config, name)
        assert (db["hostname"], db["stricthostkeychecking"]) == ("192.168.0.3", "accept-new")
    assert real_settings(config, "web")["hostname"] == "web"
    assert "web.oscloud" in ctl("vm-ssh-config", "--user", "bob", "web").stdout
    assert daemon.params_of("vm_info") == [{"vm": "web"}]
    daemon.answers["vm_list"] = []
    assert ctl("vm-ssh-config").stdout == ""


def test_known_hosts_leave_comments_out() -> None:
    keys = ["ssh-ed25519 AAAA root@web", "ecdsa-sha2-nistp256 BBBB"]
    assert build_known_hosts("10.0.0.1", keys) == (
        "10.0.0.1 ssh-ed25519 AAAA\n10.0.0.1 ecdsa-sha2-nistp256 BBBB\n"
    )
