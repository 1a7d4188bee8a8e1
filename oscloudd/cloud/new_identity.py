"""Who a new vm is: all that its guest is told, made of what the vm was given.

What it was given is in `taken`; how a guest is told is in `guest/identity` and `guest/seed`.
"""

from dataclasses import dataclass

from oscloudd.cloud.allocation import mac_of
from oscloudd.cloud.networks import NetworkRecord
from oscloudd.cloud.taken import Given
from oscloudd.guest.identity import GuestIdentity, GuestNic, hostname_of, make_machine_id
from oscloudd.host.keys import HostKey


@dataclass(frozen=True)
class Access:
    """Who is let in; `is_kept` where that is for the disk to say, which is a copy of another vm's.

    `is_copy` is a disk that has somebody's identity already, whoever it lets in.
    """

    password_hash: str = ""  # as in shadow(5); "" locks it
    ssh_keys: tuple[str, ...] = ()
    is_kept: bool = False
    is_copy: bool = False


def draw_identity(
    name: str,
    network: NetworkRecord,
    given: Given,
    key: HostKey,
    access: Access,
    *,
    uuid_hex: str,
    resolvers: tuple[str, ...],
    has_ipv6: bool,
) -> GuestIdentity:
    """Give the identity of a vm of this name, whose first card is in `network`."""
    return GuestIdentity(
        hostname=hostname_of(name),
        address=given.ip,
        prefix_length=network.subnet.prefixlen,
        gateway=network.gateway,
        address6=network.address6(given.ip) if has_ipv6 else "",
        gateway6=network.gateway6 or "",
        mac=mac_of(uuid_hex),
        dns=resolvers,
        root_password_hash=access.password_hash,
        authorized_keys=access.ssh_keys,
        host_key=key,
        machine_id=make_machine_id(),
        keeps_access=access.is_kept,
        is_copy=access.is_copy,
        other_nics=tuple(
            GuestNic(
                nic.mac,
                nic.ip,
                nic.network.subnet.prefixlen,
                nic.network.address6(nic.ip) if has_ipv6 else "",
            )
            for nic in given.others
        ),
    )
