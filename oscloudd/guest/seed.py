"""The NoCloud seed: the identity of a guest whose image brings cloud-init.

What the host wants is vendor data, as is the convention: the user data are the user's alone, in any
form that cloud-init knows, and prevail over it. Format: cloud-init's documentation, "NoCloud" data
source, "Networking config Version 2" and "Vendor data".
"""

import base64
import shlex
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pycdlib

from oscloudd.errors import InvalidArgumentError
from oscloudd.guest.hooks import Hooks
from oscloudd.guest.identity import GREETING, GuestIdentity

# What user data may begin with, from cloud-init's documentation, "User data formats".
_USER_DATA_BEGINNINGS = (
    "#!",
    "#cloud-config",
    "#cloud-config-archive",
    "#cloud-boothook",
    "#include",
    "#include-once",
    "#part-handler",
    "## template: jinja",
    "Content-Type: multipart/",
    "MIME-Version:",
)
_NO_USER_DATA = "#cloud-config\n{}\n"


def check_user_data(text: str) -> str:
    """Give user data back if cloud-init will know what they are; raises InvalidArgumentError.

    Else it ignores them, and says so where hardly anybody looks.
    """
    first, _, _ = text.lstrip().partition("\n")
    if text and not first.lower().startswith(tuple(map(str.lower, _USER_DATA_BEGINNINGS))):
        raise InvalidArgumentError(
            f"user_data begin with {first!r:.60}, which tells cloud-init nothing",
            hint="let the first line be #cloud-config, or #!/bin/sh for a script; MIME parts begin "
            "with Content-Type: multipart/mixed",
            parameter="user_data",
        )
    return text


def build_seed_files(
    identity: GuestIdentity, instance_id: str, user_data: str, hooks: Hooks, agent: str = ""
) -> dict[str, bytes]:
    """Give the seed's files by name. JSON is YAML, so the values need no quoting of ours.

    `agent` is the program that waits in a guest to be saved and cloned; see `warm_seed`.
    """
    meta = {
        "instance-id": instance_id,
        "local-hostname": identity.hostname,
        # For the image's own user and, as root is not disabled, for root; beside the user's keys.
        "public-keys": [*identity.authorized_keys],
    }
    vendor = [
        {"type": "text/cloud-config", "content": _json(_cloud_config(identity))},
        {"type": "text/cloud-boothook", "content": _boothook(identity, hooks, agent)},
    ]
    if script := hooks.script():
        vendor.append({"type": "text/x-shellscript", "content": script})
    return {
        "meta-data": _json(meta).encode(),
        "network-config": _json(_network_config(identity)).encode(),
        "vendor-data": ("#cloud-config-archive\n" + _json(vendor)).encode(),
        "user-data": (user_data or _NO_USER_DATA).encode(),
    }


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


def _cloud_config(identity: GuestIdentity) -> dict[str, Any]:
    access = {} if identity.keeps_access else {"ssh_pwauth": bool(identity.root_password_hash)}
    return {
        "manage_etc_hosts": True,
        "disable_root": False,
        **access,
        # Both are known here, and would push what went wrong off the end of the console.
        "no_ssh_fingerprints": True,
        "ssh": {"emit_keys_to_console": False},
        "ssh_keys": {
            "ed25519_private": identity.host_key.private,
            "ed25519_public": f"{identity.host_key.public}\n",
        },
    }


def _boothook(identity: GuestIdentity, hooks: Hooks, agent: str) -> str:
    # root's password is not in our cloud-config: that has a place for a list only, and where it is
    # in use cloud-init ignores a "password" of the user's.
    variables = {
        "root_password_hash": identity.root_password_hash,
        # A disk that has been another's has its machine-id, which no new instance-id renews, and
        # lets its owner in.
        "machine_id": identity.machine_id if identity.is_copy else "",
        "forget_access": "1" if identity.is_copy and not identity.keeps_access else "",
        "greeting": GREETING,
        "files": base64.b64encode(hooks.files).decode(),
        "agent": base64.b64encode(agent.encode()).decode(),
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
    return "".join(["#!/bin/sh\n", *lines, Path(__file__).with_name("boothook.sh").read_text()])


def _network_config(identity: GuestIdentity) -> dict[str, Any]:
    first = {
        **_card("eth0", identity.mac, identity.addresses),
        "routes": [{"to": "default", "via": identity.gateway}],
        "nameservers": {"addresses": [*identity.dns]},
    }
    if identity.address6:
        first["routes"].append({"to": "::/0", "via": identity.gateway6})
    others = {
        f"eth{number}": _card(f"eth{number}", nic.mac, nic.addresses)
        for number, nic in enumerate(identity.other_nics, 1)
    }
    return {"version": 2, "ethernets": {"eth0": first, **others}}


def _card(name: str, mac: str, addresses: list[str]) -> dict[str, Any]:
    return {
        "match": {"macaddress": mac},
        "set-name": name,
        "addresses": addresses,
        # Nobody advertises routes here, and networkd would have the boot wait 12 s for it.
        "accept-ra": False,
    }


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
