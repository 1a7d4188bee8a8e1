"""Prefixes for networks of guests by IPv6: drawn, since nobody gives them out (RFC 4193)."""

import secrets
from ipaddress import IPv6Network

_GLOBAL_ID_BITS = 40
# fd00::/8: the prefixes that are drawn by whoever uses them.
_DRAWN = 0xFD << 120


def draw_subnet6() -> IPv6Network:
    """Draw a /64: fd, 40 random bits, and the first of the 65,536 subnets these have."""
    return IPv6Network((_DRAWN | secrets.randbits(_GLOBAL_ID_BITS) << 80, 64))
