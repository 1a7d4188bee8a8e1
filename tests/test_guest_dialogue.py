"""The dialogue with a first boot, with the test as the guest at the other end of the line."""

import socket
import threading

import pytest

from oscloudd.errors import HostError
from oscloudd.guest.dialogue import let_rest, tell_clone, tell_identity, wait_warm

READY = b"[    0.1] Linux\r\noscloud-identity: ready\r\n"
APPLIED = b"oscloud-identity: applied\r\n"


def read_document(guest: socket.socket) -> bytes:
    seen = b""
    while not seen.endswith(b"\n.\n"):
        received = guest.recv(4096)
        assert received, seen
        seen += received
    return seen


def test_a_guest_that_asks_is_told() -> None:
    host, guest = socket.socketpair()
    guest.settimeout(10)
    with host, guest:
        teller = threading.Thread(
            target=lambda: tell_identity(host, "hostname=d2Vi\n", boot_seconds=10)
        )
        teller.start()
        guest.sendall(READY)
        assert read_document(guest)
        guest.sendall(APPLIED)
        teller.join(10)
        assert not teller.is_alive()


def test_a_guest_that_an_earlier_daemon_has_told_is_not_told_again() -> None:
    host, guest = socket.socketpair()
    with host, guest:
        guest.sendall(READY + APPLIED + b"\r\nweb login: ")
        tell_identity(host, "hostname=d2Vi\n", boot_seconds=10)
        guest.setblocking(False)
        with pytest.raises(BlockingIOError):
            guest.recv(1)


def test_a_clone_that_says_all_at_once_is_heard_twice() -> None:
    host, guest = socket.socketpair()
    with host, guest:
        guest.sendall(b"oscloud-identity: applied\noscloud-identity: kept\n")
        tell_clone(host, "hostname=d2Vi\n", seconds=10)
        host.settimeout(10)
        let_rest(host)


def test_a_guest_that_can_not_take_it_says_why() -> None:
    host, guest = socket.socketpair()
    with host, guest:
        guest.sendall(READY)
        answer = threading.Timer(0.2, guest.sendall, [b"oscloud-identity: failed: no space\r\n"])
        answer.start()
        with pytest.raises(HostError, match="no space"):
            tell_identity(host, "hostname=d2Vi\n", boot_seconds=10)
        answer.join()


def test_a_guest_that_comes_to_where_its_clones_are_told_says_so_unasked() -> None:
    host, guest = socket.socketpair()
    with host, guest:
        guest.sendall(b"nobody login: \r\noscloud-identity: warm\r\n")
        wait_warm(host, boot_seconds=10)
        guest.sendall(b"oscloud-identity: failed: cloud-init failed: no\r\n")
        with pytest.raises(HostError, match="clone: cloud-init failed: no"):
            wait_warm(host, boot_seconds=10)
        guest.setblocking(False)
        with pytest.raises(BlockingIOError):
            guest.recv(1)
