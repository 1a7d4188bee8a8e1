"""From nothing to an ssh banner: a qemu started by hand against `vm_create`s, turn by turn.

Both have the same kernel, initrd, command line, base image, bridge, memory and virtual hardware,
and one prober watches both. The bare one boots a copy of a disk that has its identity already, as
nobody tells it one; its disk, tap and neighbour entry are made before its clock starts. So
everything that makes a new vm a vm (keys, rows, overlay, first boot) is in our first figure alone;
its second boot, by `vm_start`, is the one that is like the bare one in all but the supervision.
Clones, which begin warm, are in `warm`.
"""

import os
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import warm
from banner import BOOT_SECONDS, banner_of, wait_banner, wait_text
from daemon import Daemon, say
from machine import Figure, give_ratio, give_seconds

from oscloudctl.client import Client
from oscloudd.host.network.neighbours import delete_neighbour, set_neighbour
from oscloudd.host.network.taps import open_tap
from oscloudd.machine.arguments import Descriptors, MachineSpec, build_arguments

RATIO_AIM = 1.05
WARM_RATIO_AIM = 0.033


@dataclass(frozen=True)
class Bare:
    """What a bare qemu needs: taken from a vm that was made, stopped and deleted."""

    spec: MachineSpec
    template: Path
    disk: Path
    address: str
    bridge: str
    kernel: str
    initrd: str


@dataclass(frozen=True)
class Ours:
    """Seconds of one of our vms: of its first boot, by stages, and of its second."""

    banner: float
    stages: dict[str, float]
    banner_again: float


@dataclass(frozen=True)
class Turn:
    """One of each kind, one after the other; without a pool there is nothing from it."""

    bare: float
    ours: Ours
    clone: warm.Clone
    pooled: warm.Clone | None


def measure(image: str, runs: int) -> tuple[dict[str, str], list[Figure]]:
    """Boot every kind in turn; give facts for the head of the table, and its lines."""
    daemon = Daemon("boot")
    daemon.prepare()
    daemon.take_template(image)
    with daemon.running() as client:
        if client.call("template_info", {"template": image})["state"] != "READY":
            say(f"Building the template {image}")
            client.call("template_build", {"template": image}, timeout_seconds=3600)
        info = client.call("daemon_info")
        bare = prepare_bare(daemon, client, image)
        say(f"Making a warm image of {image}")
        warm.make_image(client, image)
    turns = [take_turn(daemon, bare, image, number) for number in range(runs)]
    with daemon.running() as client:
        clones = [turn.clone for turn in turns]
        say("Booting one bare qemu and two at once, twice")
        more = [describe_side_by_side(image, bare, daemon.directory)]
        first = IPv4Address(bare.address) + 300
        more += warm.measure(client, image, daemon.state, first, clones)
    facts = {"qemu": str(info["qemu_version"]), "accelerator": str(info["accelerator"])}
    if not warm.HAS_POOL:
        facts["pool"] = "this version keeps no spare clones: nothing was measured from a pool"
    return facts, [*describe(image, turns), *more]


def take_turn(daemon: Daemon, bare: Bare, image: str, number: int) -> Turn:
    """Boot one of each kind; the daemon that keeps spare clones is not the one of the others."""
    with daemon.running() as client:
        bare_seconds = boot_bare(bare, daemon.directory)
        ours = boot_ours(client, image, _address_of(bare, 100 + number))
        clone = warm.boot_clone(client, image, _address_of(bare, 200 + number))
    pooled = None
    if warm.HAS_POOL:
        with daemon.running(pool=warm.POOL) as client:
            warm.wait_spares(client, image)
            pooled = warm.boot_clone(client, image, _address_of(bare, 250 + number))
    last = "" if pooled is None else f", from the pool {pooled.answer:.2f} s"
    say(
        f"  {number + 1}: bare {bare_seconds:.2f} s, new {ours.banner:.2f} s,"
        f" again {ours.banner_again:.2f} s, warm {clone.answer:.2f} s{last}"
    )
    return Turn(bare_seconds, ours, clone, pooled)


def describe(image: str, turns: list[Turn]) -> list[Figure]:
    bare = [turn.bare for turn in turns]
    ours = [turn.ours for turn in turns]
    banners, again = [boot.banner for boot in ours], [boot.banner_again for boot in ours]
    clones = [turn.clone for turn in turns]
    pooled = [turn.pooled for turn in turns if turn.pooled is not None]
    warm_answers = [clone.answer for clone in clones]
    return [
        give_seconds(f"{image}: bare qemu to ssh banner", bare),
        give_seconds(f"{image}: cold vm_create to ssh banner", banners),
        *(
            give_seconds(
                f"    of these until stage {stage!r}", [boot.stages[stage] for boot in ours]
            )
            for stage in ours[0].stages
        ),
        give_seconds(f"{image}: vm_start of it again to ssh banner", again),
        *warm.describe(f"{image}: warm vm_create", clones, "1.0 s"),
        *(warm.describe(f"{image}: vm_create from the pool", pooled, "0.6 s") if pooled else []),
        give_ratio(f"{image}: cold vm_create / bare, medians", banners, bare, RATIO_AIM),
        give_ratio(f"{image}: vm_start / bare, medians", again, bare, RATIO_AIM),
        give_ratio(f"{image}: warm vm_create / bare, medians", warm_answers, bare, WARM_RATIO_AIM),
    ]


def describe_side_by_side(image: str, bare: Bare, directory: Path) -> Figure:
    """Measure what a second processor is worth here, which no number of vms at once can pass.

    Two processors of a virtual machine may be one core's two threads.
    """
    # A machine that others use, too, is at times faster or slower for a minute.
    counts = (1, 2, 2, 1)
    seconds = [boot_side_by_side(bare, directory, count) for count in counts]
    alone, both = (seconds[0] + seconds[3]) / 2, (seconds[1] + seconds[2]) / 2
    what = (
        f"{image}: two bare qemus at once ({both:.2f} s) / one after the other ({2 * alone:.2f} s)"
    )
    return Figure(what, f"1/{2 * alone / both:.2f}")


def prepare_bare(daemon: Daemon, client: Client, image: str) -> Bare:
    """Let a vm take its identity in, and keep its disk."""
    params = {"name": "model", "image": image, "warm": "off"}
    vm = client.call("vm_create", params, timeout_seconds=BOOT_SECONDS)
    client.call("vm_stop", {"vm": vm["id"], "timeout": 60}, timeout_seconds=90)
    disk = daemon.directory / "model.qcow2"
    shutil.copyfile(daemon.state / f"disks/{vm['disk']}/disk.qcow2", disk)
    bridge = client.call("network_info", {"network": vm["network"]})["bridge"]
    client.call("vm_delete", {"vm": vm["id"]})
    template = daemon.state / "templates" / image
    declared: dict[str, Any] = tomllib.loads((template / "template.toml").read_text())
    spec = MachineSpec(
        name="bare", uuid=vm["uuid"], memory_bytes=vm["mem_size"], cpus=vm["cpus"],
        accelerator=vm["accelerator"], mac=vm["mac"], cmdline=declared["boot"]["cmdline"],
    )  # fmt: skip
    kernel, initrd = declared["boot"]["kernel"], declared["boot"]["initrd"]
    return Bare(spec, template, disk, vm["ip"], bridge, kernel, initrd)


def boot_bare(bare: Bare, directory: Path) -> float:
    """Boot a bare qemu; give the seconds until its sshd greets."""
    set_neighbour(bare.bridge, IPv4Address(bare.address), bare.spec.mac)
    try:
        with _running(bare, directory, "bare0") as (begin, _console):
            return wait_banner(bare.address) - begin
    finally:
        delete_neighbour(bare.bridge, IPv4Address(bare.address))


def boot_side_by_side(bare: Bare, directory: Path, count: int) -> float:
    """Boot so many bare ones at once; give the seconds until each shows its login prompt.

    They all have one address, so that none can be asked over the network.
    """
    with ExitStack() as stack:
        machines = [
            stack.enter_context(_running(bare, directory, f"bare{number}"))
            for number in range(count)
        ]
        for _begin, console in machines:
            wait_text(console, b"login:")
        return time.monotonic() - machines[0][0]


@contextmanager
def _running(bare: Bare, directory: Path, name: str) -> Iterator[tuple[float, Path]]:
    """Run a fresh copy of the disk under a qemu of our own, as root and unsupervised.

    Gives the moment of its start, and what its console is written to.
    """
    disk, console = directory / f"{name}.qcow2", directory / f"log/{name}.console.log"
    shutil.copyfile(bare.disk, disk)
    console.unlink(missing_ok=True)
    with _qemu_arguments(replace(bare, disk=disk), console, name) as (argv, numbers):
        begin = time.monotonic()
        with (directory / f"log/{name}.log").open("ab") as log:
            qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=numbers
            )
        try:
            yield begin, console
        finally:
            qemu.kill()
            qemu.wait(30)
            disk.unlink()


@contextmanager
def _qemu_arguments(
    bare: Bare, console: Path, tap_name: str
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            descriptor = os.open(path, flags, 0o600)
            stack.callback(os.close, descriptor)
            return descriptor

        def listening() -> int:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind("")  # unix(7): autobind gives it an abstract address
            listener.listen()
            return listener.fileno()

        tap = open_tap(tap_name, bare.bridge)
        stack.callback(os.close, tap)
        descriptors = Descriptors(
            monitor=listening(),
            serial=listening(),
            channel=listening(),
            console_log=opened(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            disk=opened(bare.disk, os.O_RDWR),
            base=opened(bare.template / "disk.qcow2", os.O_RDONLY),
            kernel=opened(bare.template / bare.kernel, os.O_RDONLY),
            initrd=opened(bare.template / bare.initrd, os.O_RDONLY),
            tap=tap,
        )
        argv = build_arguments(bare.spec, descriptors)
        # Nobody would tell it to go on, and the sandbox is our addition.
        sandbox = argv.index("-sandbox")
        del argv[sandbox : sandbox + 2]
        argv.remove("-S")
        yield argv, descriptors.numbers()


def boot_ours(client: Client, image: str, address: str) -> Ours:
    """Make a vm, stop it, start it again, delete it."""
    stages: dict[str, float] = {}

    def note(progress: dict[str, Any]) -> None:
        stages.setdefault(progress["stage"], time.monotonic() - begin)

    begin = time.monotonic()
    with banner_of(address) as seen:
        params = {"name": "ours", "image": image, "ip": address, "warm": "off"}
        vm = client.call("vm_create", params, on_progress=note, timeout_seconds=BOOT_SECONDS)
    banner = seen[0] - begin
    client.call("vm_stop", {"vm": vm["id"], "timeout": 60}, timeout_seconds=90)
    begin_again = time.monotonic()
    with banner_of(address) as seen:
        client.call("vm_start", {"vm": vm["id"]}, timeout_seconds=BOOT_SECONDS)
    client.call("vm_delete", {"vm": vm["id"], "force": True})
    return Ours(banner, stages, seen[0] - begin_again)


def _address_of(bare: Bare, number: int) -> str:
    return str(IPv4Address(bare.address) + number)
