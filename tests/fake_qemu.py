#!/usr/bin/python3 -I
"""A qemu that runs no machine: a real process with qemu's arguments, monitor and serial socket.

Its misbehaviour is chosen by name, through the machine's name (`-name guest=x-hang_on_quit`: the
part after the last `-`) or FAKE_QEMU. The daemon runs it as an unprivileged user: copy it to a
directory that user can search (`install_fake_qemu` does), and make `[qemu] binary` point at it.

    (none)             boots at once, takes an identity over the serial line, prints `login:`
    exit_at_start      prints a reason on standard error and exits with status 1
    slow_start         takes half a second before it serves its sockets
    no_greeting        accepts on the monitor and says nothing
    garbage_monitor    answers the first command after the handshake with something that isn't JSON
    deaf_monitor       answers the handshake and query-uuid, and nothing after that
    hang_on_quit       ignores `quit`; the power button too
    ignore_powerdown   ignores the power button
    crash_after_cont   dies of SIGSEGV as soon as it is let run
    shutdown_after_cont  powers itself off as soon as it is let run
    identity_fails     answers an identity with `oscloud-identity: failed: no space left`
    crash_when_told    dies of SIGSEGV when it is a clone and is told who it is
    identity_silent    never asks for an identity, nor prints anything
    chatty             prints four MiB on the serial line before the login prompt
    restore_fails      says why on standard error and ends when it is to take a saved state
    restore_hangs      begins to take a saved state and never comes to its end
    save_fails         says that it could not write its guest out: the disk is full
    keeps_disks        never lets go of a disk or a card that is to be unplugged
    disk_fails         takes no disk that is to be plugged in
    nic_fails          takes no network card that is to be plugged in
    save_hangs         begins to write its guest out and goes on with that until it is told to stop

Told to put its identity off (a document with the name `warm`), the guest waits again, can be
saved there, and goes on from there in a machine of the same shape that is started `-incoming`.

A guest that has its identity writes to its disk whenever it is let run, so that a state that was
saved before goes with it no more: a machine that is given one nonetheless says so and ends. What
it has in memory, made up at its boot, is told by `x-memory`.
"""

import base64
import json
import os
import re
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# What a guest has on its disk: it has its identity, or has run since it was restored, and what it
# has written does not go with the saved memory any more.
MARK = b"fake guest has its identity"
RAN = b"fake guest ran when resumed"
# What a guest prints whose memory and disk are of two machines.
TORN = "EXT4-fs error: the disk is not the one that this memory knows"
# Behind the mark: how often it has run since, and the uuid of who it is.
RUNS = b"%08d"
BLOCK_BYTES = len(MARK) + 8 + 36
# Where on the disk that is.
MARK_OFFSET = 512 << 10

VERSION = "QEMU emulator version 7.2.22 (fake)"


@contextmanager
def install_fake_qemu() -> Iterator[Path]:
    """Copy this program to where every user can run it; give the copy's path."""
    directory = Path(tempfile.mkdtemp(prefix="fake-qemu-"))
    directory.chmod(0o755)
    try:
        copy = directory / "qemu-system-x86_64"
        shutil.copyfile(__file__, copy)
        copy.chmod(0o755)
        yield copy
    finally:
        shutil.rmtree(directory)


class Port:
    """A listening socket that serves one client at a time, as qemu's do."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        descriptor: int,
        on_data: Callable[[bytes], None],
        on_open: Callable[[], None] = lambda: None,
    ) -> None:
        self.selector = selector
        self.listener = socket.socket(fileno=descriptor)
        self.listener.listen(1)  # as qemu does; it makes SO_PEERCRED name this process
        self.client: socket.socket | None = None
        self.on_data = on_data
        self.on_open = on_open
        self.descriptors: list[int] = []
        selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def accept(self) -> None:
        self.client, _ = self.listener.accept()
        self.selector.unregister(self.listener)
        self.selector.register(self.client, selectors.EVENT_READ, self.read)
        self.on_open()

    def read(self) -> None:
        assert self.client is not None
        try:
            data, descriptors, *_ = socket.recv_fds(self.client, 65536, 8)
            self.descriptors += descriptors
        except OSError:
            data = b""
        if data:
            self.on_data(data)
            return
        self.selector.unregister(self.client)
        self.client.close()
        self.client = None
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)

    def send(self, data: bytes) -> None:
        if self.client is not None:
            with suppress(OSError):
                self.client.sendall(data)


class RefusedError(Exception):
    """A command that qemu does not carry out."""


class FakeQemu:
    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.name = self.value("-name").removeprefix("guest=").split(",")[0]
        chosen = self.name.rpartition("-")[2] if "-" in self.name else ""
        self.fault = os.environ.get("FAKE_QEMU") or chosen
        self.status = "prelaunch" if "-S" in arguments else "running"
        if "-incoming" in arguments:
            self.status = "inmigrate"
        self.given: dict[str, Any] = {}
        self.state_files: dict[str, int] = {}
        self.top = "disk"
        self.frozen: list[int] = []
        self.migration = "none"
        self.sets: dict[int, list[int]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.netdevs: dict[str, int] = {}
        self.plugged: dict[str, dict[str, Any]] = {}
        self.memory = self.open_memory()
        self.booted = False
        self.in_memory = ""
        self.identity_lines: list[str] | None = None
        self.is_warm = False
        self.has_cloud_init = False
        self.typed = b""
        self.told = b""
        self.commands = b""

    # What is on the command line

    def value(self, option: str, default: str = "") -> str:
        arguments = self.arguments
        return arguments[arguments.index(option) + 1] if option in arguments else default

    def chardev(self, name: str) -> dict[str, str]:
        for option, value in zip(self.arguments, self.arguments[1:], strict=False):
            fields = dict(field.split("=", 1) for field in value.split(",") if "=" in field)
            if option == "-chardev" and fields.get("id") == name:
                return fields
        raise SystemExit(f"fake qemu: no -chardev with id={name}")

    def descriptor(self, set_id: str) -> int | None:
        """Give the first descriptor of a set, `/dev/fdset/N`."""
        for option, value in zip(self.arguments, self.arguments[1:], strict=False):
            given = re.fullmatch(r"fd=(\d+),set=(\d+)", value)
            if option == "-add-fd" and given and set_id == f"/dev/fdset/{given[2]}":
                return int(given[1])
        return None

    def disk(self) -> int:
        """Give the descriptor of the disk itself, which a guest keeps its identity on."""
        if self.top != "disk":
            return self.descriptor_of(self.top)
        return self.files()["disk-file"]

    def descriptor_of(self, node: str) -> int:
        """Give the first descriptor of the set that a node's file is in, of those given later."""
        number = int(self.nodes[f"{node}-file"]["filename"].removeprefix("/dev/fdset/"))
        return self.sets[number][0]

    def files(self) -> dict[str, int]:
        nodes = [json.loads(v) for v in self.arguments if v.startswith('{"driver":"file"')]
        found = {node["node-name"]: self.descriptor(node["filename"]) for node in nodes}
        return {name: number for name, number in found.items() if number is not None}

    def layers(self) -> list[int]:
        """Give the descriptors of what the disk stands on, the top first."""
        started = [number for name, number in self.files().items() if name.startswith("layer")]
        return [*reversed(self.frozen), *reversed(started)]

    def marked(self) -> int:
        """Give the uppermost file that has a mark; the disk where none has."""
        chain = [self.disk(), *self.layers()]
        return next((each for each in chain if self.mark_in(each) in (MARK, RAN)), chain[0])

    def open_memory(self) -> int | None:
        """Open the memory file as qemu 7.2 does, by its name and read-write."""
        objects = [json.loads(v) for v in self.arguments if v.startswith('{"qom-type"')]
        paths = [found["mem-path"] for found in objects if "mem-path" in found]
        try:
            return os.open(paths[0], os.O_RDWR) if paths else None
        except OSError as error:
            sys.exit(f"qemu-system-x86_64: can't open backing store {paths[0]}: {error.strerror}")

    def shape(self) -> dict[str, Any]:
        """Give what a saved machine and the one that goes on must have in common."""
        options = ("-machine", "-m", "-smp", "-cpu", "-accel")
        # What a kernel was started with is in its memory.
        return {"saved": True, **{option: self.value(option) for option in options}}

    # The life of it

    def run(self) -> None:
        if self.fault == "exit_at_start":
            sys.exit("qemu-system-x86_64: fake: could not open disk image: it is on strike")
        if self.fault == "slow_start":
            time.sleep(0.5)
        selector = selectors.DefaultSelector()
        self.console_log = self.descriptor(self.chardev("serial").get("logfile", ""))
        descriptors = [int(self.chardev(name)["fd"]) for name in ("monitor", "serial", "channel")]
        self.monitor = Port(selector, descriptors[0], self.read_monitor, self.greet)
        self.serial = Port(selector, descriptors[1], self.read_serial)
        self.channel = Port(selector, descriptors[2], self.read_channel)
        signal.signal(signal.SIGTERM, lambda *_: self.end("host-signal"))
        if self.status == "running":
            self.boot()
        while True:
            for key, _ in selector.select():
                key.data()

    def end(self, reason: str) -> None:
        self.event("SHUTDOWN", {"guest": reason.startswith("guest"), "reason": reason})
        os._exit(0)

    # The monitor

    def greet(self) -> None:
        if self.fault != "no_greeting":
            version = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "fake"}
            self.send({"QMP": {"version": version, "capabilities": ["oob"]}})

    def read_monitor(self, data: bytes) -> None:
        *lines, self.commands = (self.commands + data).split(b"\n")
        for line in lines:
            self.answer(json.loads(line))

    def send(self, message: dict[str, Any]) -> None:
        self.monitor.send(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        stamp = {"seconds": 0, "microseconds": 0}
        self.send({"event": name, "timestamp": stamp, **({"data": data} if data else {})})

    def answer(self, request: dict[str, Any]) -> None:
        command, number = request["execute"], request.get("id")
        if command not in ("qmp_capabilities", "query-uuid"):
            if self.fault == "deaf_monitor":
                return
            if self.fault == "garbage_monitor":
                self.monitor.send(b"\x00\x01 not a monitor {{{\r\n")
                return
        handler = getattr(self, "do_" + command.replace("-", "_"), None)
        if handler is None:
            desc = f"The command {command} has not been found"
            self.send({"error": {"class": "CommandNotFound", "desc": desc}, "id": number})
            return
        self.given = request.get("arguments", {})
        try:
            result = handler()
        except RefusedError as error:
            self.send({"error": {"class": "GenericError", "desc": str(error)}, "id": number})
            return
        self.send({"return": {} if result is None else result, "id": number})
        then = getattr(self, "after_" + command.replace("-", "_"), None)
        if then is not None:
            then()

    def do_qmp_capabilities(self) -> None:
        return None

    def do_query_uuid(self) -> dict[str, str]:
        return {"UUID": self.value("-uuid")}

    def do_query_name(self) -> dict[str, str]:
        return {"name": self.name}

    def do_query_version(self) -> dict[str, Any]:
        return {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "fake"}

    def do_query_status(self) -> dict[str, Any]:
        running = self.status == "running"
        return {"status": self.status, "running": running, "singlestep": False}

    def do_cont(self) -> None:
        if self.status != "running" and self.is_somebody():
            self.write_runs(self.runs() + 1)
        self.status = "running"
        self.event("RESUME")

    def after_cont(self) -> None:
        self.boot()

    def do_stop(self) -> None:
        if self.status == "running":
            self.status = "paused"
            self.event("STOP")

    def do_x_memory(self) -> str:
        """What no qemu has: what its guest remembers."""
        return self.in_memory

    def do_x_disk_full(self) -> None:
        """What no qemu has: a write of the guest meets a full disk."""
        self.event("BLOCK_IO_ERROR", {"action": "stop", "nospace": True, "operation": "write"})
        self.status = "io-error"
        self.event("STOP")

    def do_query_block(self) -> list[dict[str, Any]]:
        disk = {"qdev": "/machine/peripheral/disk0/x", "inserted": {"node-name": self.top}}
        return [{"io-status": "nospace" if self.status == "io-error" else "ok", **disk}]

    def do_query_named_block_nodes(self) -> list[dict[str, str]]:
        return [{"node-name": name} for name in self.nodes]

    def do_blockdev_snapshot(self) -> None:
        assert self.given["node"] == self.top, self.given
        assert self.given["overlay"] in self.nodes, self.given
        self.frozen.append(self.disk())
        self.top = self.given["overlay"]

    def do_system_reset(self) -> None:
        self.event("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def do_system_powerdown(self) -> None:
        self.event("POWERDOWN")

    def after_system_powerdown(self) -> None:
        if self.fault not in ("ignore_powerdown", "hang_on_quit"):
            self.end("guest-shutdown")

    def do_quit(self) -> None:
        return None

    def after_quit(self) -> None:
        if self.fault != "hang_on_quit":
            self.end("host-qmp-quit")

    # Saving and restoring

    def do_migrate_set_capabilities(self) -> None:
        return None

    def do_migrate_set_parameters(self) -> None:
        return None

    def do_getfd(self) -> None:
        self.state_files[self.given["fdname"]] = self.monitor.descriptors.pop(0)

    def do_query_migrate(self) -> dict[str, str]:
        if self.migration == "failed":
            return {"status": "failed", "error-desc": "fake: No space left on device"}
        return {"status": self.migration}

    def do_query_memdev(self) -> list[dict[str, str]]:
        objects = [json.loads(v) for v in self.arguments if v.startswith('{"qom-type"')]
        found = [each["id"] for each in objects if "memory-backend" in each["qom-type"]]
        return [{"id": name} for name in found or ["pc.ram"]]

    def do_migrate(self) -> None:
        if self.status == "postmigrate":
            raise RefusedError("Can't migrate the vm that was paused due to previous migration")

    def after_migrate(self) -> None:
        if self.status == "postmigrate":
            return
        self.migrated("setup", "active")
        if self.fault == "save_fails":
            self.migrated("failed")
        if self.fault in ("save_fails", "save_hangs"):
            return
        state = json.dumps(
            {
                **self.shape(),
                "warm": self.is_warm,
                "booted": self.booted,
                "memory": self.in_memory,
                "runs": self.runs(),
            }
        )
        os.write(self.state_files.pop(self.given["uri"].removeprefix("fd:")), state.encode())
        self.status = "postmigrate"
        self.migrated("completed")

    def do_migrate_cancel(self) -> None:
        if self.migration == "active":
            self.migrated("cancelling", "cancelled")

    def do_migrate_incoming(self) -> None:
        return None

    def after_migrate_incoming(self) -> None:
        self.migrated("setup", "active")
        if self.fault == "restore_hangs":
            return
        data = os.read(self.state_files.pop(self.given["uri"].removeprefix("fd:")), 65536)
        try:
            state = json.loads(data)
        except ValueError:
            state = {}
        if self.fault == "restore_fails" or {**state, **self.shape()} != state:
            self.migrated("failed")
            sys.exit("qemu-system-x86_64: load of migration failed: Invalid argument")
        if not state["warm"] and state["runs"] != self.runs():
            self.migrated("failed")
            sys.exit("qemu-system-x86_64: fake: THE DISK IS ANOTHER than when this was saved")
        self.booted, self.is_warm = state["booted"], state["warm"]
        if self.is_warm and self.read_mark() in (MARK, RAN):
            self.print(f"{TORN}\n")
        self.in_memory = state["memory"]
        self.status = "paused"
        self.migrated("completed")

    def migrated(self, *statuses: str) -> None:
        for self.migration in statuses:
            self.event("MIGRATION", {"status": self.migration})

    # Disks and network cards plugged in and out

    def do_add_fd(self) -> dict[str, int]:
        number, descriptor = self.given["fdset-id"], self.monitor.descriptors.pop(0)
        self.sets.setdefault(number, []).append(descriptor)
        return {"fdset-id": number, "fd": descriptor}

    def do_remove_fd(self) -> None:
        if self.given["fdset-id"] not in self.sets:
            raise RefusedError("File descriptor named 'fdset-id' not found")
        for descriptor in self.sets.pop(self.given["fdset-id"]):
            os.close(descriptor)

    def do_blockdev_add(self) -> None:
        name = self.given["node-name"]
        below = [self.given[key] for key in ("file", "backing") if self.given.get(key)]
        if name in self.nodes:
            raise RefusedError(f"Duplicate nodes with node-name='{name}'")
        if not set(below) <= self.nodes.keys():
            raise RefusedError(f"Cannot find device='' nor node-name='{below}'")
        if self.fault == "disk_fails" and self.given["driver"] != "file":
            raise RefusedError("fake: Could not open the image")
        self.nodes[name] = self.given

    def do_blockdev_del(self) -> None:
        name = self.given["node-name"]
        if name not in self.nodes:
            raise RefusedError(f"Failed to find node with node-name='{name}'")
        users = [*self.nodes.values(), *self.plugged.values()]
        if any(
            name in (user.get("file"), user.get("backing"), user.get("drive")) for user in users
        ):
            raise RefusedError(f"Node {name} is in use")
        del self.nodes[name]

    def do_device_add(self) -> None:
        if self.given["bus"] not in self.ports():
            raise RefusedError(f"Bus '{self.given['bus']}' not found")
        behind = self.given.get("drive", self.given.get("netdev"))
        if behind not in {*self.nodes, *self.netdevs} or self.given["id"] in self.plugged:
            raise RefusedError("fake: no such drive, or a device that is there already")
        if self.fault == "nic_fails" and "netdev" in self.given:
            raise RefusedError("fake: no card can be plugged in")
        self.plugged[self.given["id"]] = self.given

    def do_device_del(self) -> None:
        if self.given["id"] not in self.plugged:
            raise RefusedError(f"Device '{self.given['id']}' not found")

    def after_device_del(self) -> None:
        if self.fault != "keeps_disks" and self.given["id"] in self.plugged:
            del self.plugged[self.given["id"]]
            path = f"/machine/peripheral/{self.given['id']}"
            self.event("DEVICE_DELETED", {"path": f"{path}/virtio-backend"})
            self.event("DEVICE_DELETED", {"device": self.given["id"], "path": path})

    def do_qom_list(self) -> list[dict[str, str]]:
        assert self.given["path"] == "/machine/peripheral"
        return [{"name": name, "type": "child"} for name in (*self.ports(), *self.plugged)]

    def ports(self) -> list[str]:
        devices = [json.loads(value) for value in self.arguments if value.startswith('{"driver"')]
        return [each["id"] for each in devices if each["driver"] == "pcie-root-port"]

    def do_netdev_add(self) -> None:
        name, descriptor = self.given["id"], self.state_files.pop(self.given["fd"], None)
        if name in self.netdevs or descriptor is None:
            raise RefusedError("fake: no such descriptor, or a backend that is there already")
        self.netdevs[name] = descriptor

    def do_netdev_del(self) -> None:
        descriptor = self.netdevs.pop(self.given["id"], None)
        if descriptor is None:
            raise RefusedError(f"Device '{self.given['id']}' not found")
        os.close(descriptor)

    def do_closefd(self) -> None:
        descriptor = self.state_files.pop(self.given["fdname"], None)
        if descriptor is None:
            raise RefusedError(f"File descriptor named '{self.given['fdname']}' not found")
        os.close(descriptor)

    def do_block_resize(self) -> None:
        name = self.given["node-name"]
        descriptor = self.disk() if name == self.top else self.descriptor_of(name)
        # Where a qcow2 says how large its disk is.
        os.pwrite(descriptor, self.given["size"].to_bytes(8, "big"), 24)

    # The guest

    def boot(self) -> None:
        if "-incoming" in self.arguments and self.read_mark() != MARK:
            self.write_mark(RAN)
        if self.booted or self.fault == "identity_silent":
            return
        self.booted = True
        self.in_memory = os.urandom(8).hex()
        if self.fault == "crash_after_cont":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "shutdown_after_cont":
            self.end("guest-shutdown")
        self.print("Linux version 0.0-fake\n")
        if "seed-file" in self.files():
            self.read_seed()
        elif self.is_somebody():
            self.login()
        else:
            self.identity_lines = []
            self.print("oscloud-identity: ready\n")

    def read_seed(self) -> None:
        """Be who the seed says, or wait to be told where it has a program for that."""
        seed = os.pread(self.files()["seed-file"], 1 << 20, 0)
        if re.search(rb"agent=[^']", seed):
            self.is_warm = True
            self.print("oscloud-identity: warm\n")
            return
        self.write_mark(MARK)
        self.has_cloud_init = True
        self.login()

    def read_mark(self) -> bytes:
        return self.mark_in(self.marked())

    def is_somebody(self) -> bool:
        """Tell whether the guest has its identity; that of a copy's original is not its own."""
        told = re.search(r"oscloud\.identity=(\S+)", self.value("-append"))
        is_its_own = told is None or self.who_it_is() == told[1].encode()
        return is_its_own and self.read_mark() == MARK

    def who_it_is(self) -> bytes:
        return read_block(self.marked())[-36:]

    def mark_in(self, file: int) -> bytes:
        return read_block(file)[: len(MARK)]

    def write_mark(self, mark: bytes) -> None:
        write_block(self.disk(), mark + RUNS % 0 + self.value("-uuid").encode())

    def runs(self) -> int:
        """Give how often the guest has run since it has its identity."""
        block = read_block(self.marked())
        return int(block[len(MARK) :][:8]) if block.startswith(MARK) else 0

    def do_x_runs(self) -> int:
        """What no qemu has: what its guest has written to its disk."""
        return self.runs()

    def write_runs(self, number: int) -> None:
        write_block(self.disk(), MARK + RUNS % number + self.who_it_is())

    def login(self) -> None:
        if self.fault == "chatty":
            for _ in range(4096):
                self.print("x" * 1022 + "\n")
        self.print(f"\n{self.name} login: ")

    def print(self, text: str) -> None:
        data = text.replace("\n", "\r\n").encode()
        if self.console_log is not None:
            os.write(self.console_log, data)
        self.serial.send(data)

    def read_serial(self, data: bytes) -> None:
        if self.identity_lines is None:
            self.print(data.decode("utf-8", "replace").replace("\r", "\n"))  # the echo
            return
        *lines, self.typed = (self.typed + data.replace(b"\r", b"\n")).split(b"\n")
        for line in lines:
            self.take_identity(line.decode("ascii", "replace").strip())

    def take_identity(self, line: str) -> None:
        if self.identity_lines is None or not line:
            return
        if line != ".":
            self.identity_lines.append(line)
            return
        if is_postponement(self.identity_lines):
            self.identity_lines, self.is_warm = None, True
            self.print("oscloud-identity: postponed\n")
            self.print("oscloud-identity: warm\n")
            return
        self.identity_lines = None
        if self.fault == "identity_fails":
            self.print("oscloud-identity: failed: no space left\n")
            return
        self.write_mark(MARK)
        self.print("oscloud-identity: applied\n")
        self.login()

    def read_channel(self, data: bytes) -> None:
        """Take what a clone is told: a document, which ends with "return", or to rest.

        A guest that has booted with cloud-init is asked how that has ended.
        """
        if self.has_cloud_init:
            self.channel.send(b'oscloud-cloud-init: ended: {"v1": {"errors": []}}\n')
            return
        self.told += data
        if self.told == b"rest\n":
            self.told = b""
            self.write_mark(MARK)
            self.channel.send(b"oscloud-identity: kept\n")
            return
        if not self.is_warm or not self.told.endswith(b"\nreturn\n"):
            return
        if b"rehearse=" in self.told:
            self.told = b""
            self.print("oscloud-identity: rehearsed\n")
            return
        if self.fault == "crash_when_told":
            os.kill(os.getpid(), signal.SIGSEGV)
        self.told, self.is_warm = b"", False
        if self.fault == "identity_fails":
            self.channel.send(b"oscloud-identity: failed: no space left\n")
            return
        self.channel.send(b"oscloud-identity: applied\n")
        self.login()


# A qcow2, as far as one block of it takes (docs/interop/qcow2.txt of qemu).


def read_block(file: int) -> bytes:
    """Give what a qcow2 has at MARK_OFFSET of what its guest sees; nothing where it lacks that."""
    table, entry_bytes = find_table(file)
    if not table:
        return b""
    place = table + (MARK_OFFSET >> 16) * entry_bytes
    entry, bitmap = struct.unpack(">QQ", os.pread(file, 16, place))
    has_it = bool(bitmap & 1) if entry_bytes == 16 else True
    data = entry & OFFSET_MASK
    return os.pread(file, BLOCK_BYTES, data) if data and has_it else b""


def write_block(file: int, content: bytes) -> None:
    """Write to a qcow2 at MARK_OFFSET of what its guest sees."""
    table, entry_bytes = find_table(file)
    if not table:
        table = add_cluster(file)
        os.pwrite(file, struct.pack(">Q", table | COPIED), header_field(file, 40))
    place = table + (MARK_OFFSET >> 16) * entry_bytes
    entry, bitmap = struct.unpack(">QQ", os.pread(file, 16, place))
    data = entry & OFFSET_MASK or add_cluster(file)
    os.pwrite(file, content.ljust(2048, b"\0"), data)
    os.pwrite(file, struct.pack(">Q", data | COPIED), place)
    if entry_bytes == 16:  # one bit for each 2 KiB, and another if those are zeros
        bits = (bitmap | 1) & ~(1 << 32)
        os.pwrite(file, struct.pack(">Q", bits), place + 8)


OFFSET_MASK, COPIED = 0x00FFFFFFFFFFFE00, 1 << 63


def find_table(file: int) -> tuple[int, int]:
    """Give where the first table of clusters (L2) is, if anywhere, and an entry's bytes."""
    if os.pread(file, 4, 0) != b"QFI\xfb":
        return 0, 8
    first = header_field(file, header_field(file, 40))
    is_extended = header_field(file, 72) & 1 << 4
    return first & OFFSET_MASK, 16 if is_extended else 8


def header_field(file: int, offset: int) -> int:
    number: int = struct.unpack(">Q", os.pread(file, 8, offset))[0]
    return number


def add_cluster(file: int) -> int:
    """Have a qcow2 one cluster longer, with all that tells that it is in use; give where it is."""
    offset = (os.fstat(file).st_size + 65535) >> 16 << 16
    os.ftruncate(file, offset + 65536)
    counts = header_field(file, header_field(file, 48))
    os.pwrite(file, b"\0\1", counts + (offset >> 16) * 2)
    return offset


def is_postponement(lines: list[str]) -> bool:
    """Tell whether a document, as it comes over the line, has the name `warm`."""
    try:
        document = base64.b64decode("".join(lines)).split()
    except ValueError:
        return False
    return any(line.startswith(b"warm=") for line in document)


def main() -> None:
    if sys.argv[1:2] in (["-version"], ["--version"]):
        print(VERSION)
    elif sys.argv[1:] == ["-machine", "help"]:
        print("q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)")
    else:
        FakeQemu(sys.argv[1:]).run()


if __name__ == "__main__":
    main()
