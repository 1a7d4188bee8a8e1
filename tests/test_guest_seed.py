"""The NoCloud seed, as cloud-init reads it."""

import json

from oscloudd.guest.identity import GuestIdentity
from oscloudd.guest.seed import build_seed_files
from oscloudd.host.keys import HostKey


def config_of(*, keeps_access: bool) -> dict[str, object]:
    identity = GuestIdentity(
        hostname="copy",
        address="10.0.0.2",
        prefix_length=24,
        gateway="10.0.0.1",
        mac="52:54:00:00:00:02",
        dns=(),
        root_password_hash="",
        authorized_keys=(),
        host_key=HostKey("private", "public"),
        machine_id="0" * 32,
        keeps_access=keeps_access,
    )
    text = build_seed_files(identity, "i-2", "")["user-data"].decode()
    config: dict[str, object] = json.loads(text.partition("\n")[2])
    return config


def test_a_copy_keeps_who_may_log_in_and_gets_a_machine_id() -> None:
    config = config_of(keeps_access=True)
    assert "ssh_pwauth" not in config
    assert {"path": "/etc/machine-id", "content": "0" * 32 + "\n"} in list(config["write_files"])  # type: ignore[call-overload]
    assert config_of(keeps_access=False)["ssh_pwauth"] is False
