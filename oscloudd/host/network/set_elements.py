"""Elements of the firewall's sets, put in and taken out without running `nft`.

A start or an end of one guest changes nothing else. The whole of it is `firewall.py`'s.
"""

import errno
import socket
import struct
from collections.abc import Sequence

from oscloudd.errors import HostError, NotFoundError
from oscloudd.host.network.netlink import (
    ACKNOWLEDGE,
    CREATE,
    exchange,
    pack_attribute,
    pack_message,
    pack_nested,
)
from oscloudd.host.network.ruleset import TABLE, Element

NETLINK_NETFILTER = 12
# linux/netfilter/nfnetlink.h and nf_tables.h
SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEW_ELEMENT, _DELETE_ELEMENT = SUBSYSTEM << 8 | 12, SUBSYSTEM << 8 | 14
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT, _KEY, _VALUE = 1, 1, 1
_BRIDGE_FAMILY = 7  # linux/netfilter.h NFPROTO_BRIDGE
_GENERIC = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource


def add_elements(elements: Sequence[Element]) -> None:
    """Put elements into sets of the table for frames, all or none; they may be there already.

    Raises NotFoundError when there is no such table, HostError for anything else.
    """
    _change([_pack(_NEW_ELEMENT, element) for element in elements])


def delete_elements(elements: Sequence[Element]) -> None:
    """Take elements out of sets of the table for frames; raises as `add_elements`."""
    # Deleting one that isn't there fails, adding one that is doesn't.
    packed = [
        _pack(kind, element) for kind in (_NEW_ELEMENT, _DELETE_ELEMENT) for element in elements
    ]
    _change(packed)


def _change(messages: list[bytes]) -> None:
    begin = pack_message(_BATCH_BEGIN, 0, _GENERIC.pack(0, 0, socket.htons(SUBSYSTEM)))
    end = pack_message(_BATCH_END, 0, _GENERIC.pack(0, 0, socket.htons(SUBSYSTEM)))
    try:
        exchange(NETLINK_NETFILTER, begin, *messages, end)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NotFoundError(f"there is no table bridge {TABLE}, or not all of it") from error
        raise HostError(f"the table bridge {TABLE} can't be changed: {error.strerror}") from error


def _pack(kind: int, element: Element) -> bytes:
    key = pack_nested(_KEY, pack_attribute(_VALUE, element.key))
    body = _GENERIC.pack(_BRIDGE_FAMILY, 0, 0)
    body += pack_attribute(_LIST_TABLE, _text(TABLE))
    body += pack_attribute(_LIST_SET, _text(element.set_name))
    body += pack_nested(_LIST_ELEMENTS, pack_nested(_ELEMENT, key))
    return pack_message(kind, ACKNOWLEDGE | CREATE, body)


def _text(name: str) -> bytes:
    return name.encode("ascii") + b"\0"
