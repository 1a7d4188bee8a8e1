"""From nothing to an ssh banner: a qemu started by hand against `vm_create`, turn by turn.

Both have the same kernel, initrd, command line, base image, bridge, memory and virtual hardware,
and one prober watches both. The bare one boots a copy of a disk that has its identity already, as
nobody tells it one; its disk, tap and neighbour entry are made before its clock starts. So
everything that makes a new vm a vm (keys, rows, overlay, first boot) is in our figure alone.
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


def measure(image: str, runs: int) -> tuple[dict[str, str], list[Figure]]:
    """Boot both kinds in turn; give facts for the head of the table, and its lines."""
    daemon = Daemon("boot")
    daemon.prepare()
    daemon.take_template(image)
    bare_seconds, our_seconds, answer_seconds = [], [], []
    with daemon.running() as client:
        if client.call("template_info", {"template": image})["state"] != "READY":
            say(f"Building the template {image}")
            client.call("template_build", {"template": image}, timeout_seconds=3600)
        info = client.call("daemon_info")
        bare = prepare_bare(daemon, client, image)
        for number in range(runs):
            bare_seconds.append(boot_bare(bare, daemon.directory))
            banner, answer = boot_ours(client, image, _address_of(bare, 100 + number))
            our_seconds.append(banner)
            answer_seconds.append(answer)
            say(f"  {number + 1}: bare {bare_seconds[-1]:.2f} s, ours {banner:.2f} s")
    facts = {"qemu": str(info["qemu_version"]), "accelerator": str(info["accelerator"])}
    ratio = statistics.median(our_seconds) / statistics.median(bare_seconds)
    return facts, [
        _seconds(f"{image}: bare qemu to ssh banner", bare_seconds),
        _seconds(f"{image}: vm_create to ssh banner", our_seconds),
        _seconds(f"{image}: vm_create to its answer", answer_seconds),
        Figure(f"{image}: ours / bare, medians", f"{ratio:.3f}", f"{RATIO_AIM}"),
    ]


def prepare_bare(daemon: Daemon, client: Client, image: str) -> Bare:
    """Let a vm take its identity in, and keep its disk."""
    vm = client.call("vm_create", {"name": "model", "image": image}, timeout_seconds=_BOOT_SECONDS)
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


def boot_ours(client: Client, image: str, address: str) -> tuple[float, float]:
    """Make a vm; give the seconds to its banner and those to the daemon's answer."""
    seen: list[float] = []
    begin = time.monotonic()
    prober = threading.Thread(target=lambda: seen.append(wait_banner(address)))
    prober.start()
    params = {"name": "ours", "image": image, "ip": address}
    vm = client.call("vm_create", params, timeout_seconds=_BOOT_SECONDS)
    answered = time.monotonic()
    prober.join(_BOOT_SECONDS)
    client.call("vm_delete", {"vm": vm["id"], "force": True})
    return seen[0] - begin, answered - begin


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
