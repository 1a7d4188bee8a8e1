"""Addresses by DHCP, for guests that ask: each its own, which the database has given it, for life.

A network's name server, a dnsmasq, hands them out. It reads who is to have which from a directory
when it is told to, and remembers whom it has told until that one's address is released here.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

# RFC 2131 section 2 and RFC 2132 section 9: what tells a server that an address is free again.
_SERVER_PORT = 67
_BOOT_REQUEST, _ETHERNET, _MAC_BYTES = 1, 1, 6
_HEADER = struct.Struct("!4B I 2H 4s 4s 4s 4s 16s 64s 128s 4s")
_MAGIC = bytes((99, 130, 83, 99))
_MESSAGE_TYPE, _RELEASE, _SERVER_IDENTIFIER, _END = 53, 7, 54, 255


@dataclass(frozen=True)
class NamedGuest:
    """A guest's card in a network, and what it is told; its name leads to `address6`, too."""

    mac: str
    address: str
    address6: str | None
    name: str

    @property
    def addresses(self) -> list[str]:
        """Its addresses, of either family."""
        return [self.address] if self.address6 is None else [self.address, self.address6]


def build_dhcp_options(gateway: IPv4Interface, directory: Path) -> list[str]:
    """Build the part of dnsmasq's argument vector that has it answer DHCP at `gateway`."""
    subnet = gateway.network
    return [
        # An address is given to those in the directory only, and stays theirs.
        f"--dhcp-range={subnet.network_address},static,{subnet.netmask},infinite",
        f"--dhcp-hostsfile={directory}",
        "--dhcp-authoritative",
        # A guest is told by the MAC that the firewall has it ask with, not by what it says it is.
        "--dhcp-ignore-clid",
        # Who has which address is known beforehand: no need to write it down, or to ask around.
        "--leasefile-ro",
        "--no-ping",
        # Else it would put a passing neighbour entry in the place of our permanent one (arp(7)).
        "--dhcp-broadcast",
    ]


def build_address(guest: NamedGuest) -> str:
    """Build the file that has dnsmasq give a card its address, and tell it its hostname."""
    # No tag, which would keep the router from a card beside the first: dnsmasq 2.90 frees it twice
    # at the SIGHUP after a lease, and crashes.
    return f"{guest.mac},{guest.address},{guest.name}\n"


def parse_address(text: str) -> tuple[str, str]:
    """Read the MAC and the address in what `build_address` has built; raises ValueError."""
    mac, address, _name = text.split(",")
    return mac, address


def release_address(gateway: IPv4Interface, bridge: str, mac: str, address: str) -> None:
    """Have dnsmasq forget that it gave a guest an address, so that another may have it.

    Nobody need be there; raises OSError without the bridge.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        # dnsmasq tells by the interface which of its networks is meant.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode())
        client.sendto(build_release(gateway.ip, mac, address), (str(gateway.ip), _SERVER_PORT))


def build_release(server: IPv4Address, mac: str, address: str) -> bytes:
    """Build a DHCPRELEASE of `address` by the card `mac`."""
    nobody = bytes(4)
    hardware = bytes.fromhex(mac.replace(":", ""))
    header = _HEADER.pack(
        *(_BOOT_REQUEST, _ETHERNET, _MAC_BYTES, 0), 0, 0, 0,
        *(IPv4Address(address).packed, nobody, nobody, nobody), hardware, b"", b"", _MAGIC,
    )  # fmt: skip
    options = (_MESSAGE_TYPE, 1, _RELEASE, _SERVER_IDENTIFIER, 4, *server.packed, _END)
    return header + bytes(options)
