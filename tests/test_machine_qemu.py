"""Launching, adopting and ending a qemu: the fake for its misbehaviours, the real one besides."""

import asyncio
import base64
import dataclasses
import os
import signal
import subprocess
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_qemu import install_fake_qemu

from oscloudd.errors import HostError, InvalidStateError, NotFoundError, OperationTimeoutError
from oscloudd.host.processes import ExitStatus, find_process, find_processes_in
from oscloudd.host.users import QemuUser
from oscloudd.machine import qemu as qemu_module
from oscloudd.machine.arguments import MachineSpec
from oscloudd.machine.ending import EndingKind, describe_ending
from oscloudd.machine.launch import MachineFiles, launch
from oscloudd.machine.qemu import ForeignMachineError, Qemu, adopt
from oscloudd.machine.qemu_version import inspect_qemu
from oscloudd.machine.run_directory import RunDirectory

LIMIT_SECONDS = 90
USER = QemuUser("nobody", 65534, 65534, ())


@pytest.fixture(scope="session")
def fake() -> Iterator[str]:
    with install_fake_qemu() as path:
        yield str(path)


@pytest.fixture
def files(tmp_path: Path) -> MachineFiles:
    # Longer than a socket's address may be.
    run_directory = tmp_path / ("long" * 30) / "run"
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
    return MachineFiles(run_directory, tmp_path / "qemu.log", tmp_path / "console.log", disk)


class Bench:
    """What a scene needs to start machines; ends those it has forgotten."""

    def __init__(self, binary: str, files: MachineFiles) -> None:
        self.files = files
        self.events: list[str] = []
        self.machines: list[Qemu] = []
        self.spec = MachineSpec(
            name="web",
            uuid=str(uuid.uuid4()),
            memory_bytes=64 << 20,
            cpus=1,
            accelerator="tcg",
            mac="52:54:00:a8:00:02",
            binary=binary,
        )

    def on_event(self, name: str, _data: Mapping[str, Any]) -> None:
        self.events.append(name)

    async def launch(self, fault: str = "", **limits: float) -> Qemu:
        spec = dataclasses.replace(self.spec, name=f"x-{fault}" if fault else "web")
        machine = await launch(spec, self.files, USER, self.on_event, **limits)
        self.machines.append(machine)
        return machine

    async def adopt(self, old: Qemu, **changes: Any) -> Qemu:
        given = {"uuid": self.spec.uuid, "identity": old.identity, **changes}
        machine = await adopt(self.files.run_directory, on_event=self.on_event, **given)
        self.machines.append(machine)
        return machine

    async def end(self) -> None:
        for machine in self.machines:
            identity = machine.identity
            await machine.close()
            if find_process(identity.pid) == identity:
                os.kill(identity.pid, signal.SIGKILL)


def run(bench: Bench, scene: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        try:
            await asyncio.wait_for(scene, LIMIT_SECONDS)
        finally:
            await bench.end()

    asyncio.run(whole())


@pytest.fixture
def bench(fake: str, files: MachineFiles) -> Bench:
    return Bench(fake, files)


async def read_until(machine: Qemu, text: bytes) -> bytes:
    attachment = machine.console.attach(with_history=True)
    data = b""
    while text not in data:
        piece = await attachment.read()
        assert piece, f"ended after {data[-200:]!r}"
        data += piece
    attachment.close()
    return data


async def answered(machine: Qemu, document: bytes) -> None:
    for line in base64.encodebytes(document).splitlines():
        await machine.console.write(line + b"\n")
    await machine.console.write(b".\n")


def test_a_guest_stands_still_until_it_is_let_run_and_takes_an_identity_once(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        assert await machine.status() == "prelaunch"
        await machine.resume()
        await read_until(machine, b"oscloud-identity: ready")
        await answered(machine, b"hostname=d2Vi\n")
        await read_until(machine, b"login: ")
        assert b"login: " in bench.files.console_log.read_bytes()
        assert (await machine.stop()).kind is EndingKind.GUEST_SHUTDOWN
        again = await bench.launch()
        await again.resume()
        assert b"identity" not in await read_until(again, b"login: ")

    run(bench, scene())


def test_a_failed_identity_is_reported_by_the_guest(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch("identity_fails")
        await machine.resume()
        await answered(machine, b"hostname=d2Vi\n")
        await read_until(machine, b"oscloud-identity: failed: no space left")

    run(bench, scene())


@pytest.mark.parametrize(
    ("fault", "message", "status"),
    [("exit_at_start", "it is on strike", 1), ("no_greeting", "did not answer greeting", None)],
)
def test_a_failed_launch_tells_the_story_and_leaves_nothing(
    bench: Bench, fault: str, message: str, status: int | None
) -> None:
    async def scene() -> None:
        with pytest.raises(HostError, match=message) as caught:
            await bench.launch(fault, timeout_seconds=2)
        assert caught.value.details["status"] == status
        assert caught.value.details["argv"][0] == bench.spec.binary
        assert not bench.files.run_directory.exists()

    run(bench, scene())


def test_a_missing_file_is_named(bench: Bench) -> None:
    async def scene() -> None:
        bench.files.disk.unlink()
        with pytest.raises(HostError, match=r"disk\.qcow2 can't be opened"):
            await bench.launch()

    run(bench, scene())


@pytest.mark.parametrize(
    ("fault", "force", "ending"),
    [
        ("", False, EndingKind.GUEST_SHUTDOWN),
        ("", True, EndingKind.STOPPED),
        ("ignore_powerdown", False, EndingKind.STOPPED),
        ("hang_on_quit", True, EndingKind.KILLED),
        ("deaf_monitor", True, EndingKind.KILLED),
        ("garbage_monitor", True, EndingKind.KILLED),
    ],
)
def test_the_stop_ladder_goes_as_far_as_it_must(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str, force: bool, ending: EndingKind
) -> None:
    monkeypatch.setattr(qemu_module, "QUIT_SECONDS", 0.3)

    async def scene() -> None:
        machine = await bench.launch(fault)
        assert (await machine.stop(timeout_seconds=0.3, force=force)).kind is ending
        assert find_process(machine.identity.pid) is None

    run(bench, scene())


def test_one_that_has_ended_and_is_let_go_of_is_stopped_already(bench: Bench) -> None:
    # Its end is being written down, for as long as the database takes, when the stop comes.
    async def scene() -> None:
        machine = await bench.launch("shutdown_after_cont")
        await machine.resume()
        await machine.exited
        await machine.close()
        for force in (False, True):
            assert (await machine.stop(force=force)).kind is EndingKind.GUEST_SHUTDOWN

    run(bench, scene())


def test_a_paused_guest_is_let_run_to_see_its_power_button(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        await machine.resume()
        await machine.pause()
        assert await machine.status() == "paused"
        assert (await machine.stop()).kind is EndingKind.GUEST_SHUTDOWN
        assert bench.events == ["RESUME", "STOP", "RESUME", "POWERDOWN", "SHUTDOWN"]

    run(bench, scene())


@pytest.mark.parametrize(
    ("fault", "ending", "orderly"),
    [
        ("crash_after_cont", EndingKind.CRASHED, False),
        ("shutdown_after_cont", EndingKind.GUEST_SHUTDOWN, True),
    ],
)
def test_an_end_of_its_own_is_seen_and_told(
    bench: Bench, fault: str, ending: EndingKind, orderly: bool
) -> None:
    async def scene() -> None:
        machine = await bench.launch(fault)
        await machine.resume()
        seen = await machine.exited
        assert (seen.kind, seen.is_orderly) == (ending, orderly)
        assert ("SIGSEGV" in seen.message) is not orderly

    run(bench, scene())


def test_a_monitor_that_does_not_answer_harms_nobody(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch("deaf_monitor")
        with pytest.raises(OperationTimeoutError, match="query-status"):
            await machine.status(timeout_seconds=0.2)
        assert machine.is_connected
        assert find_process(machine.identity.pid) == machine.identity

    run(bench, scene())


def test_what_is_no_monitor_ends_the_connection_and_not_the_guest(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch("garbage_monitor")
        with pytest.raises(HostError, match="lost"):
            await machine.status()
        assert not machine.is_connected
        assert find_process(machine.identity.pid) == machine.identity

    run(bench, scene())


def test_a_refused_command_says_what_qemu_said(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        with pytest.raises(HostError, match="make-tea has not been found") as caught:
            await machine.monitor.execute("make-tea")
        assert caught.value.details["qemu_class"] == "CommandNotFound"
        names = await asyncio.gather(*(machine.monitor.execute("query-name") for _ in range(50)))
        assert names == [{"name": "web"}] * 50

    run(bench, scene())


def test_a_running_qemu_is_adopted_with_its_history(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        await machine.resume()
        await read_until(machine, b"oscloud-identity: ready")
        await machine.close()
        again = await bench.adopt(machine, history=bench.files.console_log.read_bytes())
        assert await again.status() == "running"
        await read_until(again, b"oscloud-identity: ready")
        await answered(again, b"hostname=d2Vi\n")
        await read_until(again, b"login: ")
        assert (await again.stop()).kind is EndingKind.GUEST_SHUTDOWN

    run(bench, scene())


def test_an_adopted_process_that_is_killed_by_others_is_seen_to_end(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        await machine.close()
        again = await bench.adopt(machine)
        os.kill(again.identity.pid, signal.SIGKILL)
        assert not (await again.exited).is_orderly

    run(bench, scene())


def test_a_qemu_that_is_handed_over_is_found_at_its_new_place(bench: Bench) -> None:
    there = bench.files.run_directory.parent / "there"
    log = bench.files.qemu_log.with_name("there.log")
    heard: list[str] = []

    async def scene() -> None:
        machine = await bench.launch()
        await machine.resume()
        bench.files.run_directory.rename(there)
        bench.files.qemu_log.rename(log)
        log.write_text("said\n")
        before = list(bench.events)
        machine.hand_over(there, log=log, on_event=lambda name, _data: heard.append(name))
        await machine.pause()
        await machine.monitor.close()
        await machine.connect()  # its socket, by the new name
        await machine.resume()
        assert bench.events == before
        assert heard == ["STOP", "RESUME"]
        assert machine.read_log() == "said"
        assert find_processes_in(there) == [machine.identity]
        await machine.stop(force=True)

    run(bench, scene())


def test_a_stranger_is_not_adopted(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        await machine.close()
        with pytest.raises(ForeignMachineError, match="the machine is"):
            await bench.adopt(machine, uuid=str(uuid.uuid4()))
        later = dataclasses.replace(machine.identity, start_time_ticks=1)
        with pytest.raises(NotFoundError):
            await bench.adopt(machine, identity=later)
        assert find_process(machine.identity.pid) == machine.identity

    run(bench, scene())


def test_sockets_of_another_process_are_not_adopted(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        await machine.close()
        other = subprocess.Popen(["sleep", "1000"])
        identity = find_process(other.pid)
        try:
            with pytest.raises(ForeignMachineError, match=str(machine.identity.pid)):
                await bench.adopt(machine, identity=identity)
        finally:
            other.kill()
            other.wait()

    run(bench, scene())


def test_a_deaf_qemu_is_adopted_without_its_monitor_and_can_be_killed(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch("hang_on_quit")
        await machine.close()
        os.kill(machine.identity.pid, signal.SIGSTOP)
        again = await bench.adopt(machine, timeout_seconds=0.3)
        assert not again.is_connected
        with pytest.raises(HostError):
            _ = again.monitor
        assert (await again.stop(force=True)).kind is EndingKind.KILLED

    run(bench, scene())


def test_a_console_outlives_nothing(bench: Bench) -> None:
    async def scene() -> None:
        machine = await bench.launch()
        console = machine.console
        await machine.stop(force=True)
        await asyncio.wait_for(console.closed.wait(), 5)
        with pytest.raises(InvalidStateError):
            await console.write(b"anybody?")

    run(bench, scene())


def test_a_run_directory_forgets_an_earlier_qemu(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    directory.listen("qmp.sock").close()
    directory.write_pid(1)
    with pytest.raises(HostError, match=r"qmp\.sock"):
        directory.connect("qmp.sock")
    directory.prepare()
    assert list((tmp_path / "run").iterdir()) == []
    directory.remove()
    directory.remove()


def test_endings_nobody_saw_are_not_guessed() -> None:
    assert describe_ending(None, ExitStatus(), was_killed=False).kind is EndingKind.UNKNOWN
    assert describe_ending(None, ExitStatus(code=1), was_killed=False).kind is EndingKind.CRASHED
    assert describe_ending("guest-panic", ExitStatus(code=0), was_killed=False).message


def test_the_real_qemu_does_what_the_fake_one_does(files: MachineFiles) -> None:
    bench = Bench("qemu-system-x86_64", files)

    async def scene() -> None:
        version = await inspect_qemu(bench.spec.binary)
        assert version.machine_type.startswith("pc-q35-")
        bench.spec = dataclasses.replace(bench.spec, machine_type=version.machine_type)
        machine = await bench.launch()
        owner = Path(f"/proc/{machine.identity.pid}").stat().st_uid
        assert owner == USER.uid
        assert await machine.status() == "prelaunch"
        await machine.resume()
        await machine.close()
        again = await bench.adopt(machine)
        await again.pause()
        assert await again.status() == "paused"
        pid_file = bench.files.run_directory / "qemu.pid"
        assert pid_file.read_text() == f"{again.identity.pid}\n"
        assert (await again.stop(force=True)).kind is EndingKind.STOPPED
        assert find_process(again.identity.pid) is None
        assert bench.files.qemu_log.read_text() == ""

    run(bench, scene())


def test_the_real_qemu_takes_a_descriptor_over_its_monitor(files: MachineFiles) -> None:
    bench = Bench("qemu-system-x86_64", files)

    async def scene() -> None:
        machine = await bench.launch()
        with files.disk.open("rb") as disk:
            arguments = {"fdset-id": 9}
            added = await machine.monitor.execute("add-fd", arguments, descriptor=disk.fileno())
        assert added["fdset-id"] == 9

    run(bench, scene())
