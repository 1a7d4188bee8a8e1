"""The NoCloud seed: the identity of a guest whose image brings cloud-init.

Format: cloud-init's documentation, "NoCloud" data source and "Networking config Version 2".
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pycdlib

from oscloudd.guest.identity import GREETING, GuestIdentity


def build_seed_files(identity: GuestIdentity, instance_id: str, user_data: str) -> dict[str, bytes]:
    """Give the seed's files by name. JSON is YAML, so the values need no quoting of ours.

    A `user_data` of the user's own is joined to ours as a part of a cloud-config archive.
    """
    meta = {"instance-id": instance_id, "local-hostname": identity.hostname}
    ours = "#cloud-config\n" + _json(_cloud_config(identity))
    files = {
        "meta-data": _json(meta).encode(),
        "network-config": _json(_network_config(identity)).encode(),
        "user-data": ours.encode(),
    }
    if user_data:
        archive = [_archive_part(ours), _archive_part(user_data)]
        files["user-data"] = ("#cloud-config-archive\n" + _json(archive)).encode()
    return files


def write_seed(path: Path, files: dict[str, bytes]) -> None:
    """Write the ISO 9660 image cloud-init looks for, by its label CIDATA. Blocking."""
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for number, (name, content) in enumerate(files.items()):
        image.add_fp(
            BytesIO(content),
            len(content),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    image.write(str(path))
    image.close()


def _archive_part(text: str) -> dict[str, str]:
    kind = "text/x-shellscript" if text.startswith("#!") else "text/cloud-config"
    return {"type": kind, "content": text}


def _cloud_config(identity: GuestIdentity) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hostname": identity.hostname,
        "manage_etc_hosts": True,
        "disable_root": False,
        # "default" keeps the image's own user beside root.
        "users": ["default", {"name": "root", "ssh_authorized_keys": [*identity.authorized_keys]}],
        "ssh_authorized_keys": [*identity.authorized_keys],
        "ssh_deletekeys": True,
        "ssh_keys": {
            "ed25519_private": identity.host_key.private,
            "ed25519_public": identity.host_key.public,
        },
        "growpart": {"mode": "auto", "devices": ["/"]},
        "resize_rootfs": True,
        "write_files": [
            {
                "path": "/etc/update-motd.d/99-os-cloud-welcome",
                "permissions": "0755",
                "content": f"#!/bin/sh\necho '{GREETING}'\n",
            },
            {
                "path": "/etc/ssh/sshd_config.d/10-oscloud.conf",
                "permissions": "0600",
                "content": "PermitRootLogin yes\n",
            },
        ],
    }
    if identity.keeps_access:
        # A new instance-id renews all but this.
        machine_id = {"path": "/etc/machine-id", "content": f"{identity.machine_id}\n"}
        config["write_files"].append(machine_id)
        return config
    config["ssh_pwauth"] = bool(identity.root_password_hash)
    if identity.root_password_hash:
        users = [{"name": "root", "password": identity.root_password_hash, "type": "hash"}]
        config["chpasswd"] = {"expire": False, "users": users}
    return config


def _network_config(identity: GuestIdentity) -> dict[str, Any]:
    return {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": identity.mac},
                "set-name": "eth0",
                "addresses": [f"{identity.address}/{identity.prefix_length}"],
                "routes": [{"to": "default", "via": identity.gateway}],
                "nameservers": {"addresses": [*identity.dns]},
            }
        },
    }


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
