"""The unprivileged user qemu runs as."""

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from oscloudd.errors import HostError

PREFERRED_USER = "oscloud-qemu"
FALLBACK_USER = "nobody"
_KVM_DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class QemuUser:
    """A user, its primary group, and the groups a qemu of ours has besides."""

    name: str
    uid: int
    gid: int
    extra_groups: tuple[int, ...]


def resolve_qemu_user(configured: str, *, kvm_device: Path = _KVM_DEVICE) -> QemuUser:
    """Give the user qemu runs as: the configured one, else oscloud-qemu, else nobody.

    Raises HostError when there is no such user, or when it would be root.
    """
    for name in (configured,) if configured else (PREFERRED_USER, FALLBACK_USER):
        entry = _find_user(name)
        if entry is not None:
            break
    else:
        raise HostError(
            f"there is no user {name!r} to run qemu as",
            hint=f"adduser --system --group {PREFERRED_USER}, or set [qemu] user in oscloud.toml",
        )
    if entry.pw_uid == 0:
        raise HostError(
            f"qemu can't run as {name!r}: that is root",
            hint="name an unprivileged user in [qemu] user, or leave it empty",
        )
    return QemuUser(name, entry.pw_uid, entry.pw_gid, _kvm_groups(kvm_device))


def _find_user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _kvm_groups(kvm_device: Path) -> tuple[int, ...]:
    """Give the group that may open the device, unless it is root's."""
    try:
        status = os.stat(kvm_device)  # noqa: PTH116 - one call, both answers
    except OSError:
        return ()
    if status.st_gid == 0 or not status.st_mode & stat.S_IRGRP:
        return ()
    try:
        grp.getgrgid(status.st_gid)
    except KeyError:
        return ()
    return (status.st_gid,)
