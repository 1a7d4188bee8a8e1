"""Saving and restoring: a real qemu with a guest of one sector, the fake for its misbehaviours."""

import asyncio
import dataclasses
import hashlib
import os
import signal
import subprocess
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_qemu import install_fake_qemu

from oscloudd.errors import HostError
from oscloudd.host.processes import find_process
from oscloudd.host.users import QemuUser
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.qemu import Qemu
from oscloudd.machine.sealed_memory import (
    load_memory,
    make_memory,
    memory_path,
    seal_memory,
    write_memory,
)
from oscloudd.machine.warm import identify_binary, recipe_key, resize_disk, restore, save

LIMIT_SECONDS = 90
MEMORY_BYTES = 32 << 20
DISK_BYTES = 1 << 20
USER = QemuUser("nobody", 65534, 65534, ())

# A boot sector: says R, then answers each byte on the serial line with that byte and with how many
# there have been, which it counts in its memory.
SECTOR = bytes.fromhex(
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "c606000630"  # mov byte [0x600], '0'
    "b052 e81b00"  # mov al, 'R'; call put
    "bafd03 ec a801 74fb"  # next: mov dx, 0x3fd; in al, dx; test al, 1; jz -5
    "baf803 ec e80c00"  # mov dx, 0x3f8; in al, dx; call put
    "fe060006"  # inc byte [0x600]
    "a00006 e80200"  # mov al, [0x600]; call put
    "ebe5"  # jmp next
    "baf803 ee c3"  # put: mov dx, 0x3f8; out dx, al; ret
).ljust(510, b"\0") + bytes.fromhex("55aa")


class Hall:
    """Machines and the files they stand on; ends what a scene has forgotten."""

    def __init__(self, root: Path, binary: str) -> None:
        self.root = root
        self.binary = binary
        self.machines: list[Qemu] = []
        self.base = root / "base.raw"
        self.base.write_bytes(bytes(DISK_BYTES))
        self.frozen = self.overlay("frozen", self.base, "raw")
        sector = root / "sector"
        sector.write_bytes(SECTOR)
        writing = ["qemu-io", "-f", "qcow2", "-c", f"write -q -s {sector} 0 512", str(self.frozen)]
        subprocess.run(writing, check=True)
        self.state = root / "state"
        self.memory = make_memory(MEMORY_BYTES)

    def overlay(self, name: str, below: Path, form: str, size_bytes: int = DISK_BYTES) -> Path:
        path = self.root / f"{name}.qcow2"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", str(below), str(path)]
        subprocess.run([*argv, str(size_bytes)], check=True)
        return path

    async def launch(self, name: str, *, files: Mapping[str, Path], **changes: Any) -> Qemu:
        place = self.root / name
        place.mkdir(exist_ok=True)
        logs = (place / "run", place / "qemu.log", place / "console.log")
        spec = MachineSpec(
            name=name, uuid=str(uuid.uuid4()), memory_bytes=MEMORY_BYTES, cpus=1,
            accelerator="tcg", mac="", binary=self.binary, base_format="raw",
        )  # fmt: skip
        spec = dataclasses.replace(spec, **changes)
        every = {"base": self.base, "memory": memory_path(self.memory), **files}
        given = MachineFiles(*logs, **every)
        machine = await launch(spec, given, USER, lambda _name, _data: None)
        self.machines.append(machine)
        return machine

    async def template(self) -> None:
        """Boot a machine, talk to it once, save it, end it, seal its memory."""
        machine = await self.launch("template", files={"disk": self.frozen}, memory_shared=True)
        await machine.resume()
        await self.expect(machine, b"R")
        assert await self.say(machine, b"t") == b"t1"
        with self.state.open("wb") as state:
            await save(machine, state.fileno())
        await machine.stop(force=True)
        seal_memory(self.memory)

    async def clone(self, name: str, **changes: Any) -> Qemu:
        """Start a clone and give it the saved state."""
        disk = self.overlay(name, self.frozen, "qcow2", 4 * DISK_BYTES)
        files = {"disk": disk, "frozen": self.frozen}
        machine = await self.launch(name, files=files, **{"incoming": True, **changes})
        with self.state.open("rb") as state:
            await restore(machine, state.fileno(), timeout_seconds=5)
        return machine

    async def say(self, machine: Qemu, byte: bytes) -> bytes:
        """Send a byte and give the two that come back."""
        attachment = machine.console.attach()
        await machine.console.write(byte)
        answer = b""
        while len(answer) < 2:
            answer += await attachment.read()
        attachment.close()
        return answer

    async def expect(self, machine: Qemu, text: bytes) -> None:
        attachment = machine.console.attach(with_history=True)
        seen = b""
        while not seen.endswith(text):
            piece = await attachment.read()
            assert piece, seen
            seen += piece
        attachment.close()

    async def end(self) -> None:
        for machine in self.machines:
            identity = machine.identity
            await machine.close()
            if find_process(identity.pid) == identity:
                os.kill(identity.pid, signal.SIGKILL)
        os.close(self.memory)

    def memory_digest(self) -> str:
        return hashlib.sha256(os.pread(self.memory, MEMORY_BYTES, 0)).hexdigest()


def run(hall: Hall, scene: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        try:
            await asyncio.wait_for(scene, LIMIT_SECONDS)
        finally:
            await hall.end()

    asyncio.run(whole())


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    tmp_path.chmod(0o700)
    return Hall(tmp_path, "qemu-system-x86_64")


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with install_fake_qemu() as path:
        yield str(path)


def test_clones_go_on_where_a_guest_was_saved_each_for_itself(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        assert SECTOR not in hall.state.read_bytes()
        before = hall.memory_digest()
        first, second = await hall.clone("first"), await hall.clone("second")
        for machine in (first, second):
            assert await machine.status() == "paused"
            await machine.resume()
        assert await hall.say(first, b"a") == b"a2"
        assert await hall.say(first, b"b") == b"b3"
        assert await hall.say(second, b"c") == b"c2"
        assert hall.memory_digest() == before

    run(hall, scene())


def test_a_clone_started_again_without_memory_boots_from_its_own_disk(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        machine = await hall.clone("web")
        await machine.resume()
        await machine.stop(force=True)
        files = {"disk": hall.root / "web.qcow2", "frozen": hall.frozen}
        place = hall.root / "web"
        every = MachineFiles(
            place / "run", place / "qemu.log", place / "console.log", base=hall.base, **files
        )
        spec = MachineSpec("web", str(uuid.uuid4()), MEMORY_BYTES, 1, "tcg", "", base_format="raw")
        again = await launch(spec, every, USER, lambda _name, _data: None)
        hall.machines.append(again)
        await again.resume()
        await hall.expect(again, b"R")
        assert await hall.say(again, b"a") == b"a1"

    run(hall, scene())


def test_a_clones_disk_can_be_larger(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        machine = await hall.clone("web")
        await resize_disk(machine, 4 * DISK_BYTES)
        nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
        assert (sizes["disk"], sizes["frozen"]) == (4 * DISK_BYTES, DISK_BYTES)

    run(hall, scene())


def test_no_clone_can_change_the_memory_it_came_from(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        machine = await hall.clone("web")
        held = Path(f"/proc/{machine.identity.pid}/fd")
        path = next(link for link in held.iterdir() if "guest memory" in str(link.readlink()))
        for flags in (os.O_RDWR, os.O_WRONLY):
            descriptor = os.open(path, flags)
            with pytest.raises(PermissionError):
                os.pwrite(descriptor, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    run(hall, scene())


@pytest.mark.parametrize("kept", [0, 1, 100, -4096, -1])
def test_a_state_cut_short_is_refused(hall: Hall, kept: int) -> None:
    async def scene() -> None:
        await hall.template()
        hall.state.write_bytes(hall.state.read_bytes()[:kept])
        with pytest.raises(HostError, match="migrate-incoming failed"):
            await hall.clone("web")

    run(hall, scene())


@pytest.mark.parametrize(
    "changes", [{"cpus": 2}, {"machine_type": "pc-q35-7.1"}], ids=["cpus", "machine_type"]
)
def test_a_state_of_another_machine_is_refused(hall: Hall, changes: dict[str, Any]) -> None:
    async def scene() -> None:
        await hall.template()
        with pytest.raises(HostError, match="migrate-incoming failed") as caught:
            await hall.clone("web", **changes)
        assert "load of migration failed" in caught.value.details["output"]

    run(hall, scene())


def test_a_memory_of_another_size_is_refused(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        for size in (MEMORY_BYTES // 2, 2 * MEMORY_BYTES):
            with pytest.raises(HostError, match="bytes, and the machine's memory"):
                await hall.clone(f"web{size}", memory_bytes=size)

    run(hall, scene())


def test_a_cold_machine_takes_no_state(hall: Hall) -> None:
    async def scene() -> None:
        await hall.template()
        with pytest.raises(HostError, match="migrate-incoming failed"):
            await hall.clone("web", incoming=False)

    run(hall, scene())


@pytest.mark.parametrize("fault", ["restore_fails", "restore_hangs"])
def test_the_fake_qemu_fails_as_the_real_one_can(tmp_path: Path, fake: str, fault: str) -> None:
    hall = Hall(tmp_path, fake)

    async def scene() -> None:
        machine = await hall.launch("template", files={"disk": hall.frozen}, memory_shared=True)
        with hall.state.open("wb") as state:
            await save(machine, state.fileno())
        await machine.stop(force=True)
        await hall.clone("web")
        files = {"disk": hall.root / "web.qcow2", "frozen": hall.frozen}
        bad = await hall.launch(f"x-{fault}", files=files, incoming=True)
        with hall.state.open("rb") as state, pytest.raises(HostError):
            await restore(bad, state.fileno(), timeout_seconds=0.3)

    run(hall, scene())


def test_a_memory_is_the_same_after_it_was_on_disk(tmp_path: Path) -> None:
    size = 8 << 20
    memory, path = make_memory(size), tmp_path / "memory"
    for offset in (0, (1 << 20) - 100, 5 << 20, size - 1):
        os.pwrite(memory, b"x" * min(300, size - offset), offset)
    os.pwrite(memory, bytes(1 << 20), 3 << 20)
    digest = write_memory(memory, path)
    assert path.stat().st_blocks * 512 <= 64 << 10
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = load_memory(path, size, digest)
    assert os.pread(loaded, size, 0) == os.pread(memory, size, 0)
    with pytest.raises(PermissionError):
        os.pwrite(loaded, b"x", 0)
    os.close(loaded)
    os.close(memory)


def test_a_damaged_memory_is_not_loaded(tmp_path: Path) -> None:
    size, path = 4 << 20, tmp_path / "memory"
    with pytest.raises(HostError, match="can't be opened"):
        load_memory(path, size, "")
    memory = make_memory(size)
    os.pwrite(memory, b"x" * 8192, 1 << 20)
    digest = write_memory(memory, path)
    os.close(memory)
    good = path.read_bytes()
    for offset in (0, 1 << 20, size - 1):
        path.write_bytes(good[:offset] + b"y" + good[offset + 1 :])
        with pytest.raises(HostError, match="is not what was written"):
            load_memory(path, size, digest)
    path.write_bytes(good[:-4096])
    with pytest.raises(HostError, match="bytes, and the machine's memory"):
        load_memory(path, size, digest)


SPEC = MachineSpec(
    "web", str(uuid.uuid4()), 1 << 30, 1, "tcg", "52:54:00:a8:00:02", cmdline="quiet"
)
BINARY: dict[str, str | int] = {"path": "/usr/bin/qemu", "version": "7.2", "size_bytes": 1}


def key(spec: MachineSpec = SPEC, **changes: Any) -> str:
    given = {"with_tap": True, "binary": BINARY, "contents": {"disk": "abc"}, **changes}
    return recipe_key(spec, **given)


def test_a_recipe_has_what_makes_the_hardware_and_nothing_of_one_machine() -> None:
    own: dict[str, Any] = {
        "name": "db",
        "uuid": str(uuid.uuid4()),
        "mac": "52:54:00:00:00:01",
        "incoming": True,
    }
    assert key(dataclasses.replace(SPEC, **own)) == key()
    changes: list[dict[str, Any]] = [
        {"memory_bytes": 2 << 30}, {"cpus": 2}, {"machine_type": "pc-q35-8.0"},
        {"cmdline": ""}, {"accelerator": "kvm"}, {"base_format": "raw"},
    ]  # fmt: skip
    others = {key(dataclasses.replace(SPEC, **change)) for change in changes}
    others |= {
        key(with_tap=False), key(with_seed=True), key(contents={"disk": "x"}),
        key(binary={**BINARY, "size_bytes": 2}),
    }  # fmt: skip
    assert len(others - {key()}) == len(changes) + 4


def test_a_binary_is_known_by_its_file(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "link").symlink_to(program)
    first = identify_binary(str(tmp_path / "link"), "7.2")
    assert (first["path"], first["size_bytes"]) == (str(program), 10)
    os.utime(program, (1, 1))
    assert identify_binary(str(program), "7.2") != first
    with pytest.raises(HostError):
        identify_binary(str(tmp_path / "none"), "7.2")
