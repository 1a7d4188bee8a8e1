"""From nothing to an ssh banner: a qemu started by hand against `vm_create`, turn by turn.

Both have the same kernel, initrd, command line, base image, bridge, memory and virtual hardware,
and one prober watches both. The bare one boots a copy of a disk that has its identity already, as
nobody tells it one; its disk, tap and neighbour entry are made before its clock starts. So
everything that makes a new vm a vm (keys, rows, overlay, first boot) is in our first figure alone;
its second boot, by `vm_start`, is the one that is like the bare one in all but the supervision.
"""

import os
import shutil
import socket
import statistics
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import warm
from daemon import Daemon, say
from machine import Figure

from oscloudctl.client import Client
from oscloudd.host.network.neighbours import delete_neighbour, set_neighbour
from oscloudd.host.network.taps import open_tap
from oscloudd.machine.arguments import Descriptors, MachineSpec, build_arguments

RATIO_AIM = 1.05

_BOOT_SECONDS = 300.0
_ATTEMPT_SECONDS = 0.1
_PAUSE_SECONDS = 0.02
_TAP = "benchtap"


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


def measure(image: str, runs: int) -> tuple[dict[str, str], list[Figure]]:
    """Make vms of all kinds in turn; give facts for the head of the table, and its lines."""
    daemon = Daemon("boot")
    daemon.prepare()
    daemon.take_template(image)
    bare_seconds: list[float] = []
    ours: list[Ours] = []
    clones: list[warm.Created] = []
    pooled: list[warm.Created] = []
    with daemon.running() as client:
        if client.call("template_info", {"template": image})["state"] != "READY":
            say(f"Building the template {image}")
            client.call("template_build", {"template": image}, timeout_seconds=3600)
        info = client.call("daemon_info")
        bare = prepare_bare(daemon, client, image)
        say("Making a warm image")
        image_seconds = warm.make_image(client, image)
    for number in range(runs):
        daemon.configure()
        with daemon.running() as client:
            bare_seconds.append(boot_bare(bare, daemon.directory))
            ours.append(boot_ours(client, image, _address_of(bare, 100 + number)))
            clones.append(warm.create_and_delete(client, image))
        # The same state with another configuration: the pool must have no part in the figure above.
        daemon.configure(pool=1)
        with daemon.running() as client:
            warm.wait_for_spare(client, image)
            pooled.append(warm.create_and_delete(client, image))
        say(
            f"  {number + 1}: bare {bare_seconds[-1]:.2f} s, new {ours[-1].banner:.2f} s,"
            f" again {ours[-1].banner_again:.2f} s, warm {clones[-1].total:.2f} s,"
            f" from the pool {pooled[-1].total:.2f} s"
        )
    say(f"Making {warm.MANY} at once")
    daemon.configure()
    single = statistics.median(clone.total for clone in clones)
    with daemon.running():
        many = warm.describe_many(daemon, *warm.create_many(daemon, image), single)
    facts = {"qemu": str(info["qemu_version"]), "accelerator": str(info["accelerator"])}
    banners, again = [boot.banner for boot in ours], [boot.banner_again for boot in ours]
    return facts, [
        _seconds(f"{image}: bare qemu to ssh banner", bare_seconds),
        _seconds(f"{image}: cold vm_create to ssh banner", banners),
        *(
            _seconds(f"    of these until stage {stage!r}", [boot.stages[stage] for boot in ours])
            for stage in ours[0].stages
        ),
        _seconds(f"{image}: vm_start of it again to ssh banner", again),
        _ratio(f"{image}: cold vm_create / bare, medians", banners, bare_seconds),
        _ratio(f"{image}: vm_start / bare, medians", again, bare_seconds),
        Figure("making a warm image", f"{image_seconds:.1f} s"),
        *warm.describe_one_by_one(clones, pooled, statistics.median(bare_seconds)),
        *many,
    ]


def prepare_bare(daemon: Daemon, client: Client, image: str) -> Bare:
    """Let a vm take its identity in, and keep its disk."""
    vm = client.call(
        "vm_create", {"name": "model", "image": image, "warm": "off"}, timeout_seconds=_BOOT_SECONDS
    )
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
    """Boot a fresh copy of the disk under a qemu of our own, as root and unsupervised."""
    disk = directory / "bare.qcow2"
    shutil.copyfile(bare.disk, disk)
    with _qemu_arguments(replace(bare, disk=disk), directory) as (argv, numbers):
        set_neighbour(bare.bridge, IPv4Address(bare.address), bare.spec.mac)
        begin = time.monotonic()
        with (directory / "log/bare.log").open("ab") as log:
            qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=numbers
            )
        try:
            return wait_banner(bare.address) - begin
        finally:
            qemu.kill()
            qemu.wait(30)
            delete_neighbour(bare.bridge, IPv4Address(bare.address))
            disk.unlink()


@contextmanager
def _qemu_arguments(bare: Bare, directory: Path) -> Iterator[tuple[list[str], tuple[int, ...]]]:
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

        tap = open_tap(_TAP, bare.bridge)
        stack.callback(os.close, tap)
        descriptors = Descriptors(
            monitor=listening(),
            serial=listening(),
            channel=listening(),
            console_log=opened(
                directory / "log/bare.console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
            ),
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
    with _banner_of(address) as seen:
        params = {"name": "ours", "image": image, "ip": address, "warm": "off"}
        vm = client.call("vm_create", params, on_progress=note, timeout_seconds=_BOOT_SECONDS)
    banner = seen[0] - begin
    client.call("vm_stop", {"vm": vm["id"], "timeout": 60}, timeout_seconds=90)
    begin_again = time.monotonic()
    with _banner_of(address) as seen:
        client.call("vm_start", {"vm": vm["id"]}, timeout_seconds=_BOOT_SECONDS)
    client.call("vm_delete", {"vm": vm["id"], "force": True})
    return Ours(banner, stages, seen[0] - begin_again)


@contextmanager
def _banner_of(address: str) -> Iterator[list[float]]:
    """Watch for the banner meanwhile; the moment is in the list when all is done."""
    seen: list[float] = []
    prober = threading.Thread(target=lambda: seen.append(wait_banner(address)), daemon=True)
    prober.start()
    yield seen
    prober.join(_BOOT_SECONDS)


def wait_banner(address: str) -> float:
    """Give the moment at which an ssh banner has come from `address`."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 22), _ATTEMPT_SECONDS) as connection:
                connection.settimeout(10)
                if connection.recv(4) == b"SSH-":
                    return time.monotonic()
        except OSError:
            time.sleep(_PAUSE_SECONDS)  # a refusal comes at once
    raise TimeoutError(f"no sshd answered at {address} within {_BOOT_SECONDS:g} s")


def _address_of(bare: Bare, number: int) -> str:
    return str(IPv4Address(bare.address) + number)


def _seconds(what: str, seconds: list[float]) -> Figure:
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return Figure(
        f"{what} (median of {len(seconds)}; {spread})", f"{statistics.median(seconds):.2f} s"
    )


def _ratio(what: str, ours: list[float], bare: list[float]) -> Figure:
    ratio = statistics.median(ours) / statistics.median(bare)
    return Figure(what, f"{ratio:.3f}", f"{RATIO_AIM}")
