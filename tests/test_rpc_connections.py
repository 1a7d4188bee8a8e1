"""Clients that misbehave by the thousand: what others notice, and what is held for them."""

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import Box

MIB = 1 << 20
CLIENTS = 1000
CALLS = 400
VM_LIST = b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1}\n'
HALF = b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": "'


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def descriptors(box: Box) -> int:
    assert box.daemon is not None
    return len(os.listdir(f"/proc/{box.daemon.pid}/fd"))


def connections(box: Box) -> int:
    """Count what this process and others have open at the daemon, by the kernel's word."""
    assert box.daemon is not None
    # An accepted socket belongs to the network namespace of the one that connected: ours.
    rows = [line.split() for line in Path("/proc/self/net/unix").read_text().splitlines()]
    accepted = {f"socket:[{row[6]}]" for row in rows if row[-1].endswith("/oscloudd.sock")}
    count = 0
    for descriptor in Path(f"/proc/{box.daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += os.readlink(descriptor) in accepted
    return count


def resident_bytes(box: Box) -> int:
    assert box.daemon is not None
    status = Path(f"/proc/{box.daemon.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


class Crowd:
    """A thousand clients, each bad in one of five ways, kept at it by a thread until `close`."""

    def __init__(self, path: Path, count: int = CLIENTS) -> None:
        self.sockets = [self._connect(path) for _ in range(count)]
        self._idle, self._half, self._slow, self._deaf, self._endless = (
            self.sockets[number::5] for number in range(5)
        )
        self._done = threading.Event()
        self.rounds = 0
        for client in self._half:
            client.send(HALF)
        self._thread = threading.Thread(target=self._misbehave)
        self._thread.start()

    def _connect(self, path: Path) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        client.setblocking(False)
        return client

    def _misbehave(self) -> None:
        pieces = [(client, HALF) for client in self._slow]
        pieces += [(client, VM_LIST * 50) for client in self._deaf]
        pieces += [(client, b"a" * (64 << 10)) for client in self._endless]
        sent: dict[socket.socket, int] = {}
        while not self._done.wait(0.02):
            for client, text in pieces:
                at = sent.get(client, 0)
                piece = text[at % len(HALF) :][:1] if text is HALF else text
                if text[:1] != b"a" or at < MIB - len(text):
                    with contextlib.suppress(OSError):
                        sent[client] = at + client.send(piece)
            self.rounds += 1

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        for client in self.sockets:
            client.close()


def call_among(crowd: Crowd, box: Box, expected: dict[str, object]) -> tuple[list[float], int]:
    """Give how many seconds each call took, in order of size, and the most memory seen."""
    took, most_resident = [], 0
    with box.connect() as line:
        while len(took) < CALLS or crowd.rounds < 20:
            start = time.monotonic()
            seen = line.call("vm_info", vm="vm3")
            took.append(time.monotonic() - start)
            assert (seen["uuid"], seen["pid"]) == (expected["uuid"], expected["pid"])
            most_resident = max(most_resident, resident_bytes(box))
    return sorted(took), most_resident


def test_a_thousand_bad_clients_do_not_keep_a_good_one_waiting(box: Box) -> None:
    for number in range(5):
        box.create(f"vm{number}")
    expected = box.call("vm_info", vm="vm3")
    before, resident = descriptors(box), [resident_bytes(box)]
    for _ in range(2):
        crowd = Crowd(box.socket_path)
        try:
            box.until(lambda: connections(box) == CLIENTS, "a thousand connections")
            took, most_resident = call_among(crowd, box, expected)
        finally:
            crowd.close()
        box.until(lambda: connections(box) == 0, "the end of their connections")
        # A vm that is not ready yet has one more at times: its sshd is asked for.
        assert descriptors(box) <= before + 5
        resident.append(resident_bytes(box))
        p99 = took[len(took) * 99 // 100]
        print(
            f"{len(took)} calls: median {took[len(took) // 2] * 1000:.1f} ms, "
            f"p99 {p99 * 1000:.1f} ms, longest {took[-1] * 1000:.1f} ms; "
            f"{most_resident >> 20} MiB at most, {[size >> 20 for size in resident]} around it"
        )
        assert p99 < 1.0
        assert most_resident < 400 * MIB
    assert resident[1] < resident[0] + 150 * MIB
    assert resident[2] < resident[1] + 30 * MIB  # what the first crowd left is used again
