"""How fast a daemon with many vms answers, and what it weighs."""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from daemon import OSCLOUDCTL, Daemon
from machine import Figure

from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Network, Vm

FEW = 5
_CALLS = {"vm_info": 1000, "vm_list": 200}
_COMMANDS = 10
_AIMS = {"vm_info": "0.3 ms", "vm_list": "5 ms", "command": "80 ms", "memory": "64 MiB"}
_FIRST_SERIAL_PORT = 30000
_KEYS = "ssh-ed25519 " + "A" * 68


def measure(rows: int) -> list[Figure]:
    """Measure with few vms, then with `rows`."""
    daemon = Daemon("rows")
    daemon.prepare()
    with daemon.running():
        pass  # it makes its database
    insert_vms(daemon, 1, FEW)
    with daemon.running():
        few = time_command(daemon)
    insert_vms(daemon, FEW + 1, rows)
    with daemon.running():
        at_rest = memory_mib(daemon.pid, "VmRSS")
        info = time_calls(daemon, "vm_info", {"vm": f"row-{rows // 2 + 1}"})
        listed = time_calls(daemon, "vm_list", {})
        many = time_command(daemon)
        memory = memory_mib(daemon.pid, "VmRSS")
        peak = memory_mib(daemon.pid, "VmHWM")
    return [
        *_latency("vm_info", rows, info),
        *_latency("vm_list", rows, listed),
        Figure(f"oscloudctl vm-list, {FEW} vms, median of {_COMMANDS}", few, _AIMS["command"]),
        Figure(f"oscloudctl vm-list, {rows} vms, median of {_COMMANDS}", many),
        Figure(f"daemon's RSS with {rows} vms, before any call", f"{at_rest:.1f} MiB"),
        Figure(
            f"daemon's RSS with {rows} vms, after all these", f"{memory:.1f} MiB", _AIMS["memory"]
        ),
        Figure(f"daemon's peak RSS with {rows} vms", f"{peak:.1f} MiB"),
    ]


def insert_vms(daemon: Daemon, first: int, last: int) -> None:
    """Put stopped vms into the database of a daemon that does not run."""

    async def insert() -> None:
        database = Database(daemon.state / "oscloud.db")
        await database.open()
        await database.run(lambda: [_insert_vm(number) for number in range(first, last + 1)])
        await database.close()

    asyncio.run(insert())


def _insert_vm(number: int) -> None:
    now = time.time()
    disk = Disk.create(
        name=f"row-{number}", size=10 << 30, template_name="debian_12", created_at=now
    )
    Vm.create(
        name=f"row-{number}", uuid=str(uuid.uuid4()), disk=disk, network=Network.get(),
        mem_size=1 << 30, cpus=1, ip=f"192.168.{number // 250}.{number % 250 + 2}",
        mac=f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}", tap_interface_idx=number,
        qemu_serial_port=_FIRST_SERIAL_PORT + number, state="STOPPED", wanted_state="STOPPED",
        host_keys=_KEYS, owner_uid=0, created_at=now,
    )  # fmt: skip


def time_calls(daemon: Daemon, method: str, params: dict[str, Any]) -> list[float]:
    """Give the milliseconds of each of many calls on one connection."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    line = json.dumps(request).encode() + b"\n"
    directory = os.open(daemon.socket.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as connection:
        # An address holds 108 bytes at most (unix(7)), and a checkout may lie deep.
        connection.connect(f"/proc/self/fd/{directory}/{daemon.socket.name}")
        connection.settimeout(30)
        _ask(connection, line)
        taken = [_ask(connection, line) for _ in range(_CALLS[method])]
    os.close(directory)
    return taken


def _ask(connection: socket.socket, line: bytes) -> float:
    begin = time.perf_counter()
    connection.sendall(line)
    answer = bytearray()
    while not answer.endswith(b"\n"):
        received = connection.recv(1 << 20)
        if not received:
            raise ConnectionResetError
        answer += received
    taken = time.perf_counter() - begin
    if b'"result"' not in answer[:200]:
        raise RuntimeError(f"no result: {bytes(answer[:500])!r}")
    return taken * 1000


def time_command(daemon: Daemon) -> str:
    """Run the command line as a process; give the median of its milliseconds."""
    environment = {**os.environ, "OSCLOUD_SOCKET": str(daemon.socket)}
    taken = []
    for _ in range(_COMMANDS + 1):
        begin = time.perf_counter()
        subprocess.run([OSCLOUDCTL, "vm-list"], env=environment, check=True, capture_output=True)
        taken.append((time.perf_counter() - begin) * 1000)
    return f"{statistics.median(taken[1:]):.0f} ms"  # the first fills caches


def memory_mib(pid: int, field: str) -> float:
    """Give a field of the process's status that is in KiB (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) / 1024


def _latency(method: str, rows: int, taken: list[float]) -> list[Figure]:
    p99 = sorted(taken)[len(taken) * 99 // 100]
    what = f"{method} with {rows} vms, {len(taken)} calls"
    return [
        Figure(f"{what}, median", f"{statistics.median(taken):.3f} ms", _AIMS[method]),
        Figure(f"{what}, p99", f"{p99:.3f} ms"),
    ]
