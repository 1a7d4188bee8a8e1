"""What another manager takes to start and end a machine: libvirt, where it is installed.

A libvirtd of the benchmark's own, in a mount and a process namespace: its directories under /run,
/etc and /var are empty ones in memory, so that nothing of the host's libvirt is read or written,
and its end is the end of all it has started.
"""

import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon import BENCH, say
from machine import Figure

LEAST_RUNS = 5
_START_SECONDS = 20.0
_ROUND_SECONDS = 60.0
_LOOK_SECONDS = 0.05

# libvirtd asks qemu again what it can do before every definition while it finds a /dev/kvm that
# qemu could not use: without it under emulation. libvirtd does not reap what is not its child, so
# it is not process 1 here. No helper of libvirt's is needed with these settings.
_ENTER = """
set -e
place=$1 accelerator=$2
for path in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs libvirt $path
done
mkdir /var/lib/libvirt/qemu
if [ $accelerator != kvm ]; then
    mkdir $place/dev
    for device in null zero full random urandom; do
        : >$place/dev/$device
        mount --bind /dev/$device $place/dev/$device
    done
    mount --rbind $place/dev /dev
fi
cat >/etc/libvirt/qemu.conf <<CONFIG
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
CONFIG
cat >/etc/libvirt/libvirtd.conf <<CONFIG
unix_sock_dir = "$place"
auth_unix_rw = "none"
log_outputs = "3:stderr"
CONFIG
libvirtd --config /etc/libvirt/libvirtd.conf --pid-file $place/libvirtd.pid &
wait
"""

_DOMAIN = """
<domain type='{kind}'>
  <name>bench</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='null'/>
  </devices>
</domain>
"""
_COMMANDS = ("define", "start", "destroy", "undefine")


def measure(runs: int, accelerator: str) -> list[Figure]:
    """Define, start and end a machine that stands still, so many times."""
    if not all(shutil.which(name) for name in ("libvirtd", "virsh", "unshare")):
        return [Figure("libvirt's own start and end of a machine", "libvirt is not installed")]
    try:
        with _libvirtd(accelerator) as place:
            _time_commands(place)  # the first finds out what qemu can do
            rounds = [_time_commands(place) for _ in range(runs)]
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"libvirt could not be measured: {error}; see {BENCH}/libvirt/libvirtd.log")
        return [Figure("libvirt's own start and end of a machine", "did not work")]
    totals = [sum(taken) for taken in rounds]
    what = f"libvirt: define + start paused + destroy + undefine, median of {runs}"
    return [
        Figure(what, f"{statistics.median(totals):.0f} ms"),
        *(
            Figure(f"    of these {command}", f"{statistics.median(taken):.0f} ms")
            for command, taken in zip(_COMMANDS, zip(*rounds, strict=True), strict=True)
        ),
    ]


@contextmanager
def _libvirtd(accelerator: str) -> Iterator[Path]:
    """Run a libvirtd; give the directory with its socket and the machine's description."""
    directory = BENCH / "libvirt"
    directory.mkdir(parents=True, exist_ok=True)
    # An address holds 108 bytes at most (unix(7)), and a checkout may lie deep.
    with (
        tempfile.TemporaryDirectory(prefix="oscloud-bench-") as name,
        (directory / "libvirtd.log").open("wb") as log,
    ):
        place = Path(name)
        kind = "kvm" if accelerator == "kvm" else "qemu"
        (place / "bench.xml").write_text(_DOMAIN.format(kind=kind))
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        argv = [*apart, "sh", "-c", _ENTER, "sh", name, accelerator]
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory,
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait_socket(place / "libvirt-sock", process)
            yield place
        finally:
            process.kill()  # unshare(1) lets no other signal end it; its child dies with it
            process.wait()


def _wait_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("libvirtd did not start")
        time.sleep(_LOOK_SECONDS)


def _time_commands(place: Path) -> list[float]:
    """Give the milliseconds of each command as one virsh measures them, connected already."""
    script = f"define {place}/bench.xml; start bench --paused; destroy bench; undefine bench"
    uri = f"qemu:///system?socket={place}/libvirt-sock"
    ended = subprocess.run(
        ["virsh", "--quiet", "--timing", "--connect", uri, script],
        capture_output=True, text=True, timeout=_ROUND_SECONDS, check=False,
    )  # fmt: skip
    taken = [float(text) for text in re.findall(r"Time: ([0-9.]+) ms", ended.stdout)]
    if ended.returncode != 0 or len(taken) != len(_COMMANDS):
        raise RuntimeError(f"virsh: {ended.stdout}{ended.stderr}")
    return taken
