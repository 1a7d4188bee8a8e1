"""Runs in a guest with cloud-init that is to be saved, and then in each clone of it; not here.

`boothook.sh` starts it in the making of a warm image, with nothing but the image's own Python. It
sees cloud-init through to its end, takes from the guest what only one may have, says on the serial
line that the machine can be saved, and waits on the channel. There each clone is told who it is, as
by `identity.encode_for_clone`. Waiting in one process for all of that is the point: a program takes
an emulated guest 40 ms and more to start.

A clone that ends before it has said `kept` is a new instance to cloud-init, and told by its seed.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import sys
import time
from functools import partial
from pathlib import Path

CHANNEL_NAME = "org.oscloud.channel.0"
SERIAL = "/dev/ttyS0"
CARD = "eth0"

# random(4): struct rand_pool_info is how many bits there are, how many bytes, and those.
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
MS_BIND = 4096

# All processors together, 100 ticks a second.
QUIET_SECONDS, QUIET_TICKS, QUIET_ATTEMPTS = 2, 6, 30
REST_SECONDS = 60.0

# Where cloud-init and the system keep a name; whatever else has it is told again by a boot.
NAMED = (
    "etc/hosts",
    "var/lib/cloud/data/set-hostname",
    "var/lib/cloud/data/previous-hostname",
    "run/cloud-init/instance-data.json",
    "run/cloud-init/instance-data-sensitive.json",
)
# Its prompt has the name of the host.
PROMPTS = ("serial-getty@ttyS0.service", "getty@tty1.service")
JOURNALS = (Path("/var/log/journal"), Path("/run/log/journal"))


class AgentError(Exception):
    """What the host is told in its own words."""


class Guest:
    """The file system of this guest, and what its making has written into it.

    `instance` is its instance-id. Its own host key stands for those of whoever may log in, too.
    """

    def __init__(self, root: Path, instance: str) -> None:
        self.root = root
        self.instance = instance
        self.key = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().strip()
        self.hostname = (root / "etc/hostname").read_text().strip()
        self.key_files: dict[Path, str] = {}

    def forget_itself(self) -> None:
        """Leave on the disk nobody's keys and no machine-id: a clone of it may boot cold."""
        for path in self._find_key_files():
            text = path.read_text()
            self.key_files[path] = text
            path.write_text(_without(text, self.key))
        for path in (self.root / "etc/ssh").glob("ssh_host_*"):
            path.unlink()
        (self.root / "etc/machine-id").write_text("")
        (self.root / "var/lib/systemd/random-seed").unlink(missing_ok=True)

    def take_names(self, hostname: str, machine_id: str) -> None:
        """Be called so, and have a machine-id."""
        (self.root / "etc/hostname").write_text(f"{hostname}\n")
        (self.root / "etc/machine-id").write_text(f"{machine_id}\n")
        for path in NAMED:
            self._replace(path, self.hostname, hostname)

    def let_in(self, keys: list[str], *, by_password: bool) -> None:
        """Let in who has one of these keys, wherever the making has put its own."""
        for path, text in self.key_files.items():
            path.write_text("".join(_for_each(keys, self.key, line) for line in text.splitlines()))
        if not by_password:
            ssh = self.root / "etc/ssh"
            for path in (ssh / "sshd_config", *(ssh / "sshd_config.d").glob("*.conf")):
                text = path.read_text()
                said = re.sub(
                    r"(?m)^PasswordAuthentication yes$", "PasswordAuthentication no", text
                )
                if said != text:
                    path.write_text(said)

    def take_host_key(self, private: str, public: str) -> None:
        """Have this ssh host key, and no other."""
        key = self.root / "etc/ssh/ssh_host_ed25519_key"
        key.touch(mode=0o600)
        key.write_text(private)
        key.with_suffix(".pub").write_text(public)

    def take_instance(self, instance: str) -> None:
        """Be this instance to cloud-init, for which the next boot is no first one.

        Its seed says the rest. The order matters: after a power cut in between, cloud-init does
        what it does once an instance once more.
        """
        cloud = self.root / "var/lib/cloud"
        for name in ("instance-id", "previous-instance-id"):
            (cloud / "data" / name).write_text(f"{instance}\n")
        # The network is configured anew by the next boot, which is told so once (see boothook.sh).
        updates = "updates: {network: {when: [boot-new-instance, boot]}}\n"
        (self.root / "etc/cloud/cloud.cfg.d/99-oscloud-clone.cfg").write_text(updates)
        os.sync()
        (cloud / "instances" / self.instance).rename(cloud / "instances" / instance)
        link = cloud / "instance.new"
        link.symlink_to(f"/var/lib/cloud/instances/{instance}")
        link.rename(cloud / "instance")
        markers = self.root / "var/lib/oscloud"
        (markers / self.instance).rename(markers / instance)
        for path in (*NAMED, "run/cloud-init/.instance-id"):
            self._replace(path, self.instance, instance)
        os.sync()

    def _find_key_files(self) -> list[Path]:
        homes = {user.pw_dir for user in pwd.getpwall()}
        paths = [self.root / home.lstrip("/") / ".ssh/authorized_keys" for home in sorted(homes)]
        return [path for path in paths if path.is_file() and self.key in path.read_text()]

    def _replace(self, name: str, old: str, new: str) -> None:
        path = self.root / name
        if path.is_file():
            path.write_text(path.read_text().replace(old, new))


def _without(text: str, key: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if key not in line)


def _for_each(keys: list[str], key: str, line: str) -> str:
    """Give a line once for each of the keys, if the making's key is in it, which that replaces."""
    lines = [line.replace(key, each) for each in keys] if key in line else [line]
    return "".join(f"{each}\n" for each in lines)


def parse_document(text: str) -> dict[str, str]:
    """Read what a clone is told: assignments as a shell would read them, and "return"."""
    words = shlex.split(text)
    return dict(word.split("=", 1) for word in words if "=" in word)


def build_card(told: dict[str, str]) -> str:
    """Give what systemd-networkd is told of the card until the next boot."""
    lines = ["[Match]", f"MACAddress={told['mac']}", "", "[Network]"]
    lines += [f"Address={told['address']}/{told['prefix_length']}", f"Gateway={told['gateway']}"]
    if "address6" in told:
        lines += [f"Address={told['address6']}", f"Gateway={told['gateway6']}"]
    lines += [*(f"DNS={server}" for server in told["dns"].split()), "IPv6AcceptRA=no", ""]
    return "\n".join(lines)


def build_link_commands(told: dict[str, str]) -> str:
    """Give what `ip -batch` makes a clone's card of the making's with."""
    lines = [
        f"link set dev {CARD} down",
        f"address flush dev {CARD}",
        f"link set dev {CARD} address {told['mac']}",
        f"link set dev {CARD} up",
        f"address add {told['address']}/{told['prefix_length']} broadcast + dev {CARD}",
        # As networkd writes it, which would else add a second one.
        f"route add default via {told['gateway']} proto static",
    ]
    if "address6" in told:
        # Nobody else may have it, and looking for it takes a second.
        lines.append(f"address add {told['address6']} dev {CARD} nodad")
        lines.append(f"route add ::/0 via {told['gateway6']} proto static")
    return "\n".join([*lines, ""])


# What is done to the running system


def run(*argv: str, text: str = "") -> int:
    """Run a program that reads `text` and prints into nothing; give its status."""
    given = os.memfd_create("given")
    os.write(given, text.encode())
    os.lseek(given, 0, os.SEEK_SET)
    nothing = os.open(os.devnull, os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, given, 0), (os.POSIX_SPAWN_DUP2, nothing, 1)]
    try:
        pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(given)
        os.close(nothing)


def check_run(*argv: str, text: str = "") -> None:
    """Run a program that has to succeed."""
    if status := run(*argv, text=text):
        raise AgentError(f"{argv[0]} ended with status {status}")


def wait_cloud_init() -> None:
    """Wait until the boot and cloud-init have come to their end; raises AgentError."""
    run("systemctl", "is-system-running", "--wait")
    result = Path("/run/cloud-init/result.json")
    while not result.exists():
        time.sleep(1)
    if errors := json.loads(result.read_text())["v1"]["errors"]:
        raise AgentError("cloud-init failed: " + "; ".join(errors))
    if run("systemctl", "--quiet", "is-active", "NetworkManager.service") == 0:
        raise AgentError("it has NetworkManager, which would take a clone's address from it again")


def wait_until_quiet() -> None:
    """Wait until little is being done: it would be done in every clone. No event says so."""
    for _ in range(QUIET_ATTEMPTS):
        before = busy_ticks()
        time.sleep(QUIET_SECONDS)
        if busy_ticks() - before <= QUIET_TICKS:
            return


def busy_ticks() -> int:
    """Give for how long the processors have had something to do."""
    user, nice, system, _idle, _wait, irq, softirq = Path("/proc/stat").read_text().split()[1:8]
    return sum(map(int, (user, nice, system, irq, softirq)))


def renew_kernel(told: dict[str, str]) -> None:
    """Have random numbers, a clock and a boot id of its own."""
    entropy = bytes.fromhex(told["entropy"])
    pool = struct.pack("ii", 8 * len(entropy), len(entropy)) + entropy
    with Path("/dev/urandom").open("wb") as device:
        fcntl.ioctl(device, RNDADDENTROPY, pool)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, int(told["time"]))
    boot_id = Path("/run/oscloud/boot_id")
    boot_id.write_text(f"{told['boot_id']}\n")
    place = b"/proc/sys/kernel/random/boot_id"
    if ctypes.CDLL(None, use_errno=True).mount(bytes(boot_id), place, None, MS_BIND, None):
        raise AgentError(f"no boot id of its own: {os.strerror(ctypes.get_errno())}")


def configure_network(told: dict[str, str]) -> None:
    """Have the clone's address, at once and in the eyes of systemd-networkd."""
    card = Path("/run/systemd/network/05-oscloud-clone.network")
    has_networkd = Path("/run/systemd/netif").is_dir()
    if has_networkd:
        card.parent.mkdir(exist_ok=True)
        card.write_text(build_card(told))
    check_run("ip", "-batch", "-", text=build_link_commands(told))
    if has_networkd:
        run("networkctl", "reload")
    resolvers = Path("/etc/resolv.conf")
    if not resolvers.is_symlink():
        servers = told["dns"].split()
        resolvers.write_text("".join(f"nameserver {server}\n" for server in servers))


def go_first(policy: int, priority: int) -> None:
    """Come before all that wakes in a clone at a new time, name or address; or no longer."""
    with contextlib.suppress(OSError):  # a kernel may keep that for itself
        os.sched_setscheduler(0, policy, os.sched_param(priority))


def find_sshd() -> int | None:
    """Give the process that listens for ssh, None where systemd does."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/run/sshd.pid").read_text())
    return None


def find_channel() -> Path:
    """Give the device of the channel."""
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == CHANNEL_NAME:
            return Path("/dev") / port.name
    raise AgentError("it has no channel")


def receive(channel: int) -> str:
    """Read all that a clone is told."""
    text = b""
    while not text.endswith(b"\nreturn\n"):
        piece = os.read(channel, 65536)
        if not piece:  # nobody has it open
            time.sleep(0.1)
        text += piece
    return text.decode()


def be_told(guest: Guest, channel: int, sshd: int | None) -> dict[str, str]:
    """Become who the host says. Random numbers first, before anything draws on them."""
    told = parse_document(receive(channel))
    renew_kernel(told)
    socket.sethostname(told["hostname"])
    guest.take_names(told["hostname"], told["machine_id"])
    password = told["root_password_hash"]
    guest.let_in(told["authorized_keys"].splitlines(), by_password=bool(password))
    if password:
        check_run("chpasswd", "-e", text=f"root:{password}\n")
    guest.take_host_key(told["host_key_ed25519"], told["host_key_ed25519_public"])
    if sshd is not None:
        os.kill(sshd, signal.SIGHUP)
    configure_network(told)
    return told


def begin_journal(machine_id: str) -> None:
    """Have a journal of its own, and not that of the saved machine."""
    places = [place for place in JOURNALS if place.is_dir()]
    old = [path for place in places for path in place.iterdir() if path.name != machine_id]
    for path in old:
        journal = path.with_name(machine_id)
        journal.mkdir(exist_ok=True)
        os.chown(journal, 0, path.stat().st_gid)
        journal.chmod(0o2755)
    run("systemctl", "restart", "systemd-journald.service")
    for path in old:
        shutil.rmtree(path)


def draw_seed() -> None:
    """Have a random seed for the next boot that nobody else has."""
    seed = Path("/var/lib/systemd/random-seed")
    seed.touch(mode=0o600)
    seed.write_bytes(os.urandom(512))


def grow() -> None:
    """Have the root file system fill the disk, however the image has laid it out."""
    for module in ("growpart", "resizefs"):
        run("cloud-init", "single", "--name", module, "--frequency", "always")


def disk_sectors() -> str:
    """Give how large the disk is."""
    return Path("/sys/block/vda/size").read_text()


def main(instance: str) -> None:
    """Be saved, then told, then at rest."""
    say = say_on_line
    try:
        wait_cloud_init()
        prompts = [unit for unit in PROMPTS if run("systemctl", "-q", "is-active", unit) == 0]
        run("systemctl", "stop", *prompts)
        guest = Guest(Path("/"), instance)
        guest.forget_itself()
        sshd, saved_sectors = find_sshd(), disk_sectors()
        channel = os.open(find_channel(), os.O_RDWR)
        wait_until_quiet()
        os.sync()
        go_first(os.SCHED_FIFO, 1)
        say("warm")
        say = partial(say_on, channel)
        told = be_told(guest, channel, sshd)
        say("applied")
        if select.select([channel], [], [], REST_SECONDS)[0]:
            os.read(channel, 4096)
        guest.take_instance(told["instance_id"])
        say("kept")
        go_first(os.SCHED_OTHER, 0)
        os.nice(19)  # the rest nobody waits for
        draw_seed()
        begin_journal(told["machine_id"])
        run("systemctl", "start", *prompts)
        if disk_sectors() != saved_sectors:
            grow()
    except Exception as error:
        say(f"failed: {error}")
        raise


def say_on(line: int, what: str) -> None:
    """Tell the host."""
    os.write(line, f"oscloud-identity: {what}\n".encode())


def say_on_line(what: str) -> None:
    """Tell the host on the serial line, opened anew: the end of its prompt hangs it up."""
    line = os.open(SERIAL, os.O_WRONLY | os.O_NOCTTY)
    try:
        say_on(line, what)
    finally:
        os.close(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
