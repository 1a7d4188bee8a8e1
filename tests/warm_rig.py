"""Saved guests and their clones without a daemon, in a network of the calling thread's own.

`run_in_own_network` gives the thread; a `Rig` owns the machines, and ends them by pid.
"""

import asyncio
import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
import tomllib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from guest_cloud import kept_template
from kept import KEPT, ROOT, keep

from oscloudd.guest import identity
from oscloudd.guest.dialogue import let_rest, postpone_identity, tell_clone
from oscloudd.guest.identity import GuestIdentity, build_document, make_machine_id
from oscloudd.guest.readiness import wait_ssh_banner
from oscloudd.host.images import create_overlay
from oscloudd.host.keys import make_host_key
from oscloudd.host.network.taps import open_tap
from oscloudd.host.passwords import hash_password
from oscloudd.host.users import resolve_qemu_user
from oscloudd.machine import warm
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.sealed_memory import make_memory, memory_path, seal_memory

BRIDGE = "br0"
HOST = "192.168.77.1"
MEMORY_BYTES = 256 << 20
BOOT_SECONDS = 300.0
CLONE_SECONDS = 60.0
DAY_SECONDS = 86400
PASSWORD = 'it\'s $1 & "so\\on"'

_CLONE_NEWNET = 0x40000000


def run_in_own_network(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine in a thread with a new network namespace, which goes away with it."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            for command in (
                "link set lo up",
                f"link add {BRIDGE} type bridge",
                f"address add {HOST}/24 dev {BRIDGE}",
                f"link set {BRIDGE} up",
            ):
                subprocess.run(["ip", *command.split()], check=True)
            results.append(asyncio.run(work()))  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ensure_built(template: str) -> Path:
    """Give the directory of a template as its build makes it; kept until its sources change."""

    def build(directory: Path) -> None:
        directory.mkdir()
        command = [ROOT / "templates" / template / "build", directory]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return keep(KEPT / "built" / kept_template(template).name, build)


@dataclass
class Guest:
    """A machine of the rig and who it is."""

    number: int
    identity: GuestIdentity
    qemu: Qemu

    @property
    def address(self) -> str:
        return self.identity.address


class Rig:
    """One saved machine of a template, and guests that begin where it stood."""

    def __init__(self, template: str, built: Path) -> None:
        self.built = built
        declared = tomllib.loads((ROOT / "templates" / template / "template.toml").read_text())
        self.cmdline = declared["boot"]["cmdline"]
        self.root = Path(tempfile.mkdtemp(prefix="oscloud-warm-"))
        self.root.chmod(0o755)
        self.user = resolve_qemu_user("")
        self.key = self.root / "key"
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a test's", "-f", self.key]
        subprocess.run(argv, check=True)
        self.memory = make_memory(MEMORY_BYTES)
        self.frozen = self.root / "frozen.qcow2"
        self.state = self.root / "state"
        self.running: list[Qemu] = []

    async def close(self) -> None:
        for qemu in list(self.running):
            await self.end(qemu)
        os.close(self.memory)
        shutil.rmtree(self.root)

    async def end(self, qemu: Qemu) -> None:
        if not qemu.exited.done():
            await qemu.stop(force=True)
        await qemu.close()
        self.running.remove(qemu)

    async def save(self) -> None:
        """Boot the template to where its clones begin, and save it, its clock a day behind."""
        await create_overlay(self.frozen, self.built / "disk.qcow2", "qcow2", 1 << 30)
        qemu = await self._launch(1, self.frozen, warm_memory=True, shared=True)
        yesterday = SimpleNamespace(time=lambda: time.time() - DAY_SECONDS)
        line = qemu.console.attach_socket(with_history=True)
        with line, qemu.open_channel(), patch.object(identity, "time", yesterday):
            await qemu.resume()
            await asyncio.to_thread(postpone_identity, line, boot_seconds=BOOT_SECONDS)
        with self.state.open("wb") as state:
            await warm.save(qemu, state.fileno())
        await self.end(qemu)
        seal_memory(self.memory)

    async def clone(self, number: int, *, disk_bytes: int) -> Guest:
        """Start a clone, tell it who it is, and wait for its sshd."""
        identity = await self._identity(number)
        await create_overlay(self.disk(number), self.frozen, "qcow2", disk_bytes)
        qemu = await self._launch(
            number, self.disk(number), warm_memory=True, incoming=True, frozen=self.frozen
        )
        with self.state.open("rb") as state:
            await warm.restore(qemu, state.fileno())
        await warm.resize_disk(qemu, disk_bytes)
        with qemu.open_channel() as channel:
            await qemu.resume()
            document = build_document(identity)
            await asyncio.to_thread(tell_clone, channel, document, seconds=CLONE_SECONDS)
            await wait_ssh_banner(identity.address, timeout_seconds=CLONE_SECONDS)
            await asyncio.to_thread(let_rest, channel)
        return Guest(number, identity, qemu)

    async def start_cold(self, guest: Guest) -> None:
        """Start a clone's disk again, without the memory it began with."""
        disk = self.disk(guest.number)
        guest.qemu = await self._launch(guest.number, disk, frozen=self.frozen)
        await guest.qemu.resume()
        await wait_ssh_banner(guest.address, timeout_seconds=BOOT_SECONDS)

    def disk(self, number: int) -> Path:
        return self.root / f"disk{number}.qcow2"

    def printed(self, guest: Guest) -> str:
        """Give all that a guest has printed on its serial line."""
        return (self.root / f"console{guest.number}").read_text(errors="replace")

    async def ssh(self, guest: Guest, command: str, *, check: bool = True) -> bytes:
        """Run a command in the guest, logged in by key; only the host keys it was told count."""
        known = self.root / f"known{guest.number}"
        known.write_text(f"{guest.address} {guest.identity.host_key.public}\n")
        process = await asyncio.create_subprocess_exec(
            *("ssh", "-F", "none", "-i", str(self.key), "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=/dev/null"),
            *("-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=20"),
            *(f"root@{guest.address}", command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(CLONE_SECONDS):
            output, errors = await process.communicate()
        assert not check or process.returncode == 0, (command, output[-2000:], errors)
        return output

    async def _identity(self, number: int) -> GuestIdentity:
        # One of two is told what a daemon without IPv6 would tell it.
        address6, gateway6 = (
            (f"fd00:77::{number:x}/64", "fd00:77::1") if number % 2 == 0 else ("", "")
        )
        return GuestIdentity(
            hostname=f"vm{number}",
            address=f"192.168.77.{number}",
            prefix_length=24,
            gateway=HOST,
            mac=_mac(number),
            dns=(HOST, "192.0.2.53"),
            root_password_hash=hash_password(PASSWORD),
            authorized_keys=(self.key.with_suffix(".pub").read_text().strip(),),
            host_key=await make_host_key(self.root),
            machine_id=make_machine_id(),
            address6=address6,
            gateway6=gateway6,
        )

    async def _launch(
        self,
        number: int,
        disk: Path,
        *,
        frozen: Path | None = None,
        warm_memory: bool = False,
        shared: bool = False,
        incoming: bool = False,
    ) -> Qemu:
        spec = MachineSpec(
            name=f"vm{number}",
            uuid=str(uuid.uuid4()),
            memory_bytes=MEMORY_BYTES,
            cpus=1,
            accelerator="tcg",
            mac=_mac(number),
            machine_type="pc-q35-7.2",
            cmdline=self.cmdline,
            memory_shared=shared,
            incoming=incoming,
        )
        files = MachineFiles(
            run_directory=self.root / f"run{number}",
            qemu_log=self.root / f"log{number}",
            console_log=self.root / f"console{number}",
            disk=disk,
            base=self.built / "disk.qcow2",
            frozen=frozen,
            kernel=self.built / "vmlinuz",
            initrd=self.built / "initrd.img",
            memory=memory_path(self.memory) if warm_memory else None,
        )
        tap = open_tap(f"tap{number}", BRIDGE)
        try:
            qemu = await launch(spec, files, self.user, lambda *_: None, tap_fd=tap)
        finally:
            os.close(tap)
        self.running.append(qemu)
        return qemu


def _mac(number: int) -> str:
    return f"52:54:00:00:77:{number:02x}"
