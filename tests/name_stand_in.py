"""A name server of somebody else's: it has one address for whatever it is asked."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Gives each question back with an address behind it (RFC 1035 section 4.1), and no extensions.
_SERVER = """
import socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind((sys.argv[1], 53))
    print("ready", flush=True)
    while True:
        asked, client = server.recvfrom(512)
        end = asked.index(0, 12) + 5
        head = asked[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0)
        address = struct.pack("!3HIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(sys.argv[2])
        server.sendto(head + asked[12:end] + address, client)
"""


@contextmanager
def answering(namespace: str, address: str, answer: str) -> Iterator[None]:
    """Have a server at `address` in a namespace that answers with the address `answer`."""
    where = f"{address}/32"
    subprocess.run(["ip", "-n", namespace, "address", "add", where, "dev", "lo"], check=True)
    command = ["ip", "netns", "exec", namespace, sys.executable, "-I", "-c", _SERVER]
    with subprocess.Popen([*command, address, answer], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()
    subprocess.run(["ip", "-n", namespace, "address", "del", where, "dev", "lo"], check=True)
