"""The package in a Debian with a real systemd: installed, used, killed, upgraded, booted, removed.

The tests share one container and run in their order: each leaves it as the next one needs it.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guest_cloud import keep_template
from system_container import Container, build_package, ensure_tree

pytestmark = pytest.mark.system

PACKAGE = "/root/oscloud.deb"
KEY = "/root/.ssh/id_ed25519"
SMALL = ("--image", "tiny", "--mem-size", "256M", "--disk-size", "1G")
# systemd sends SIGABRT after 20 s of silence, and the daemon is back a second later.
WATCHDOG_LIMIT_SECONDS = 60.0


class Host:
    """The container, and what the tests ask of the package in it."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.run = container.run
        self.attempt = container.attempt

    def info(self, vm: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("oscloudctl", "vm-info", vm, "--json"))
        return answer

    def ssh(self, vm: str, command: str) -> str:
        return self.run("oscloudctl", "vm-ssh", vm, "--", command)

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def daemon_pid(self) -> int:
        return int(self.show("oscloudd.service", "MainPID"))

    def wait_for_daemon_other_than(self, pid: int) -> None:
        """Wait until another daemon answers; the first question may wait at the socket for it."""
        deadline = time.monotonic() + WATCHDOG_LIMIT_SECONDS
        while self.daemon_pid() in (0, pid) or self.attempt("oscloudctl", "vm-list").returncode:
            assert time.monotonic() < deadline, self.run("systemctl", "status", "oscloudd")

    def wait_for_unit(self, unit: str) -> None:
        """Wait until a unit is active; the daemon asks for it on the side."""
        deadline = time.monotonic() + WATCHDOG_LIMIT_SECONDS
        while self.attempt("systemctl", "is-active", unit).returncode:
            assert time.monotonic() < deadline, self.run("systemctl", "status", "oscloudd")

    def wait_for_answer(self, *argv: str, words: set[str]) -> None:
        """Wait until a program prints these words; what it shows is done on the side."""
        deadline = time.monotonic() + WATCHDOG_LIMIT_SECONDS
        while not words <= set(self.attempt(*argv).stdout.split()):
            assert time.monotonic() < deadline, self.attempt(*argv).stdout

    def install(self) -> str:
        return self.run("apt-get", "install", "--yes", "--reinstall", PACKAGE)


@pytest.fixture(scope="module")
def package() -> Path:
    return build_package()


@pytest.fixture(scope="module")
def host(package: Path) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("containers need root")
    container = Container(ensure_tree(package))
    try:
        shutil.copy(package, container.root / PACKAGE.removeprefix("/"))
        container.start()
        host = Host(container)
        host.install()
        templates = container.root / "var/lib/oscloud/templates"
        templates.mkdir(exist_ok=True)
        shutil.copytree(keep_template("tiny"), templates / "tiny")
        (container.root / "root/.ssh").mkdir(exist_ok=True)
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY)
        yield host
    finally:
        container.close()


@pytest.fixture
def web(host: Host) -> dict[str, Any]:
    """A vm that runs, made by the first test that needs it."""
    if host.attempt("oscloudctl", "vm-info", "web").returncode != 0:
        host.run("oscloudctl", "vm-create", "web", *SMALL)
    return host.info("web")


def test_lintian_finds_no_error(package: Path) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", package],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_installed_it_serves(host: Host) -> None:
    for unit in ("oscloudd.service", "oscloudd.socket", "oscloud-guests.service"):
        assert host.run("systemctl", "is-active", unit) == "active"
        assert host.run("systemctl", "is-enabled", unit) == "enabled"
    # It asks for no password, so whoever wants it says so.
    assert host.show("oscloud-http.service", "UnitFileState") == "disabled"
    assert host.run("systemctl", "--failed", "--no-legend") == ""
    caller = json.loads(host.run("oscloudctl", "daemon-info", "--json"))["caller"]
    assert caller["uid"] == 0
    assert host.run("stat", "-c", "%U %G %a", "/run/oscloud/oscloudd.sock") == "root oscloud 660"


def test_a_stopped_daemon_is_started_by_who_asks(host: Host) -> None:
    host.run("systemctl", "stop", "oscloudd.service")
    host.run("systemctl", "start", "oscloudd")
    host.run("systemctl", "stop", "oscloudd.service")
    host.run("oscloudctl", "vm-list")
    assert host.run("systemctl", "is-active", "oscloudd.service") == "active"


def test_a_vm_can_be_made_and_used(host: Host, web: dict[str, Any]) -> None:
    assert (web["state"], web["owner_uid"]) == ("RUNNING", 0)
    assert host.ssh("web", "hostname") == "web"
    host.run("systemctl", "start", "oscloud-http.service")
    listed = host.run("curl", "--silent", "--retry-connrefused", "--retry", "30",
                      "http://127.0.0.1:5000/vm_list")  # fmt: skip
    assert json.loads(listed) == [{"id": web["id"], "name": "web"}]
    host.run("oscloudctl", "vm-stop", str(web["id"]))
    assert host.info("web")["state"] == "STOPPED"
    host.run("oscloudctl", "vm-start", str(web["id"]))
    host.run("oscloudctl", "vm-wait", "web")


def test_a_vm_is_in_a_scope_with_its_name_and_limits(host: Host, web: dict[str, Any]) -> None:
    """The limits are set; that they hold needs cgroup controllers, which a container has not."""
    unit = f"oscloud-vm-{web['id']}.scope"
    assert host.show(unit, "Description") == "OS Cloud vm web"
    assert host.show(unit, "Slice") == "oscloud.slice"
    assert host.show(unit, "MemoryMax") == str((256 + 4 + 256) << 20)
    assert host.show(unit, "TasksMax") == "129"
    assert host.show(unit, "CPUQuotaPerSecUSec") == "2s"
    assert unit in host.run("cat", f"/proc/{web['pid']}/cgroup")
    assert "guest=web" in host.run("systemd-cgls", "--full", "--no-pager", "/oscloud.slice")
    assert "OS Cloud vm web" in host.run("journalctl", "--no-pager", "--unit", unit)
    host.run("oscloudctl", "vm-rename", "web", "shop")
    assert host.show(unit, "Description") == "OS Cloud vm shop"
    host.run("oscloudctl", "vm-rename", "shop", "web")


GREETING = """
import socket, sys
for port in sys.argv[1:]:
    with socket.create_connection(("127.0.0.1", int(port)), 60) as client:
        print(client.recv(4).decode())
"""


def test_ports_and_names_work_as_confined_as_it_is(host: Host, web: dict[str, Any]) -> None:
    host.run("oscloudctl", "port-add", "web", "2222:22", "0.0.0.0:80:22")
    assert host.run("python3", "-c", GREETING, "2222", "80").split() == ["SSH-", "SSH-"]
    doctor = json.loads(host.run("oscloudctl", "daemon-doctor", "--json"))
    names = next(check for check in doctor["checks"] if check["check"] == "names")
    assert names["verdict"] == "ok", names
    unit = "oscloud-names-oscbr0.service"
    assert host.run("systemctl", "is-active", unit) == "active"
    assert str(web["ip"]) in host.ssh("web", "nslookup web.oscloud")
    asked = "udhcpc -i eth0 -n -q -t 10 -s /bin/true 2>&1"
    assert f"lease of {web['ip']} obtained" in host.ssh("web", asked)
    pid = host.show(unit, "MainPID")
    host.run("systemctl", "restart", "oscloudd")
    host.run("systemctl", "kill", "--signal=KILL", "oscloudd")
    assert host.run("python3", "-c", GREETING, "2222").split() == ["SSH-"]
    host.run("oscloudctl", "vm-list")
    assert host.show(unit, "MainPID") == pid
    host.run("oscloudctl", "port-delete", "2222", "80")


def test_the_host_finds_guests_by_name(host: Host, web: dict[str, Any]) -> None:
    assert web["ip6"] is not None
    # A sysctl that it may set, as confined as it is.
    assert host.run("cat", "/proc/sys/net/ipv6/conf/all/forwarding") == "1"
    for way in ("made", "removed", "resolved restarted"):
        if way == "removed":
            host.run("ip", "link", "delete", "oscbr0")
        if way == "resolved restarted":
            host.run("systemctl", "restart", "systemd-resolved")
        for database, key in (("ahostsv4", "ip"), ("ahostsv6", "ip6")):
            host.wait_for_answer("getent", database, "web.oscloud", words={web[key]})
        assert host.run("resolvectl", "default-route", "oscbr0").split()[-1] == "no", way
    assert host.attempt("getent", "hosts", "nobody.oscloud").returncode == 2
    doctor = json.loads(host.run("oscloudctl", "daemon-doctor", "--json"))
    names = next(check for check in doctor["checks"] if check["check"] == "names")
    assert "this host finds them" in names["message"]
    host.run("sh", "-c", "oscloudctl vm-ssh-config >/root/.ssh/config")
    assert host.run("ssh", "web.oscloud", "hostname") == "web"
    host.run("rm", "/root/.ssh/config")


def test_the_doctor_says_that_limits_do_not_hold_here(host: Host) -> None:
    doctor = json.loads(host.run("oscloudctl", "daemon-doctor", "--json"))
    assert doctor["ok"]
    limits = next(check for check in doctor["checks"] if check["check"] == "limits")
    assert limits["verdict"] == "warning"
    assert "set in oscloud.slice, but not enforced" in limits["message"]


def test_qemu_may_do_nothing(host: Host, web: dict[str, Any]) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in host.run("cat", f"/proc/{web['pid']}/status").splitlines()
        if ":\t" in line
    )
    uid = host.run("id", "-u", "oscloud-qemu")
    assert status["Uid"].split() == [uid] * 4
    for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(status[kind], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(("unit", "tenths"), [("oscloudd", 30), ("oscloud-http", 15)])
def test_exposure_is_low(host: Host, unit: str, tenths: int) -> None:
    host.run("systemd-analyze", "security", f"--threshold={tenths}", "--no-pager", unit)


def test_who_may_and_who_is_told_how(host: Host, web: dict[str, Any]) -> None:
    host.run("useradd", "--create-home", "ann")
    refused = host.attempt("oscloudctl", "vm-list", user="ann")
    assert refused.returncode == 12
    assert "you may not open /run/oscloud/oscloudd.sock" in refused.stdout
    assert "sudo usermod -aG oscloud ann" in refused.stdout
    host.run("usermod", "-aG", "oscloud", "ann")
    assert "web" in host.run("oscloudctl", "vm-list", user="ann")
    host.run("oscloudctl", "vm-create", "anns", *SMALL, user="ann")
    assert host.info("anns")["owner_uid"] == int(host.run("id", "-u", "ann"))
    host.run("oscloudctl", "vm-delete", "anns", "--force", "--yes", user="ann")
    wrong = host.attempt("oscloudctl", "--socket", "/run/oscloud/other.sock", "vm-list", user="ann")
    assert "no socket /run/oscloud/other.sock" in wrong.stdout
    assert "/run/oscloud/oscloudd.sock" in wrong.stdout
    host.run("systemctl", "stop", "oscloudd.socket", "oscloudd.service")
    down = host.attempt("oscloudctl", "vm-list", user="ann")
    assert "the daemon is not running" in down.stdout
    assert "systemctl start oscloudd" in down.stdout
    host.run("systemctl", "start", "oscloudd")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_complete_from_the_daemon(host: Host, web: dict[str, Any], shell: str) -> None:
    words = {"bash": "oscloudctl vm-info w", "zsh": "oscloudctl vm-info w"}
    asked = host.run(
        "env", f"_OSCLOUDCTL_COMPLETE={shell}_complete",
        f"COMP_WORDS={words.get(shell, 'oscloudctl vm-info')}",
        f"COMP_CWORD={'w' if shell == 'fish' else 2}", "oscloudctl",
    )  # fmt: skip
    assert "web" in asked


def test_a_template_is_built_with_rights_the_daemon_has_not(host: Host) -> None:
    directory = host.container.root / "usr/share/oscloud/templates/made"
    directory.mkdir()
    (directory / "template.toml").write_text(
        'description = "made"\nos = "Made 1"\nmin_mem_size = "64M"\n'
        '[source]\nkind = "build"\n[guest]\nidentity = "serial"\n'
    )
    program = directory / "build"
    program.write_text(
        "#!/bin/sh\nset -e\necho 'progress: 50 mounting'\nmount -t tmpfs none /mnt\n"
        'touch /mnt/file\nchown 1:1 /mnt/file\nqemu-img create -f qcow2 "$1/disk.qcow2" 1M\n'
    )
    program.chmod(0o755)
    small = ("--mem-size", "64M", "--disk-size", "16M", "--wait", "started")
    host.run("oscloudctl", "vm-create", "first", "--image", "made", *small)
    host.run("oscloudctl", "vm-delete", "first", "--force", "--yes")
    made = json.loads(host.run("oscloudctl", "template-info", "made", "--json"))
    assert made["state"] == "READY"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    shutil.rmtree(host.container.root / "var/lib/oscloud/templates/made")
    host.run("oscloudctl", "template-build", "made", "--no-wait")
    host.wait_for_unit("oscloud-build-made.service")
    job = json.loads(host.run("oscloudctl", "job-list", "--json"))[0]
    host.run("oscloudctl", "job-cancel", str(job["id"]))
    assert host.attempt("systemctl", "is-active", "oscloud-build-made.service").returncode != 0
    program.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    failed = host.attempt("oscloudctl", "template-build", "made")
    assert failed.returncode == 10
    assert "out of luck" in failed.stdout
    shutil.rmtree(directory)


def test_an_image_of_the_users_own_is_judged_by_another_user(host: Host) -> None:
    image = "/root/mine.qcow2"
    host.run("qemu-img", "create", "-q", "-f", "qcow2", image, "2M")
    host.run("oscloudctl", "template-import", image)
    mine = json.loads(host.run("oscloudctl", "template-info", "mine", "--json"))
    assert mine["state"] == "READY"
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", KEY, "-F", "raw", image, "2M")
    refused = host.attempt("oscloudctl", "template-import", image, "--name", "other")
    assert refused.returncode == 2
    assert "backing file" in refused.stdout
    host.run("oscloudctl", "template-delete", "mine", "--yes")


def test_a_new_vm_need_not_boot(host: Host) -> None:
    host.run("oscloudctl", "template-warm", *SMALL[1:])
    host.run("oscloudctl", "vm-create", "clone", *SMALL, "--warm", "only")
    assert host.info("clone")["started"] == "warm"
    assert host.ssh("clone", "hostname") == "clone"
    host.run("oscloudctl", "vm-delete", "clone", "--force", "--yes")


def restart(host: Host) -> None:
    host.run("systemctl", "restart", "oscloudd")


def kill(host: Host) -> None:
    host.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", "oscloudd")


def hang(host: Host) -> None:
    host.run("kill", f"-{signal.SIGSTOP.value}", str(host.daemon_pid()))


def reinstall(host: Host) -> None:
    host.install()


@pytest.mark.parametrize("end", [restart, kill, hang, reinstall])
def test_a_vm_outlives_its_daemon(host: Host, web: dict[str, Any], end: Any) -> None:
    pid, boot = host.daemon_pid(), host.ssh("web", "cat /proc/sys/kernel/random/boot_id")
    end(host)
    host.wait_for_daemon_other_than(pid)
    host.run("oscloudctl", "vm-wait", "web")
    now = host.info("web")
    assert (now["pid"], now["state"]) == (web["pid"], "RUNNING")
    assert now["uptime_seconds"] >= web["uptime_seconds"]
    assert host.ssh("web", "cat /proc/sys/kernel/random/boot_id") == boot
    assert host.run("systemctl", "--failed", "--no-legend") == ""


def test_the_watchdog_ended_the_one_that_hung(host: Host) -> None:
    journal = host.run("journalctl", "--no-pager", "--unit", "oscloudd.service")
    assert "Watchdog timeout" in journal


def test_a_qemu_without_a_scope_lives_on_and_gets_one(host: Host, web: dict[str, Any]) -> None:
    """As a daemon leaves it that is killed between a qemu's start and its scope's."""
    unit = f"oscloud-vm-{web['id']}.scope"
    host.run(
        "sh", "-c", "find /sys/fs/cgroup -path '*/oscloudd.service/cgroup.procs' |"
        f" while read -r file; do echo {web['pid']} >$file; done",
    )  # fmt: skip
    assert "oscloudd.service" in host.run("cat", f"/proc/{web['pid']}/cgroup")
    host.run("systemctl", "restart", "oscloudd")
    host.run("oscloudctl", "vm-wait", "web")
    assert host.info("web")["pid"] == web["pid"]
    host.wait_for_unit(unit)
    assert unit in host.run("cat", f"/proc/{web['pid']}/cgroup")


def test_a_qemu_nobody_wrote_down_is_found(host: Host, web: dict[str, Any]) -> None:
    """By its working directory, which is another user's to see: hence CAP_SYS_PTRACE."""
    host.run("systemctl", "stop", "oscloudd.socket", "oscloudd.service")
    forget = "UPDATE vm SET qemu_pid = NULL, qemu_start_ticks = NULL, qemu_boot_id = NULL"
    host.run(
        "python3", "-c", "import sqlite3, sys\n"
        "with sqlite3.connect('/var/lib/oscloud/oscloud.db') as db: db.execute(sys.argv[1])",
        forget,
    )  # fmt: skip
    host.run("systemctl", "start", "oscloudd")
    host.run("oscloudctl", "vm-wait", "web")
    assert host.info("web")["pid"] == web["pid"]


def test_a_vm_that_starts_again_has_a_scope_again(host: Host, web: dict[str, Any]) -> None:
    """Though the last one's may not have gone yet."""
    unit = f"oscloud-vm-{web['id']}.scope"
    for _ in range(3):
        host.run("oscloudctl", "vm-restart", "web", "--force")
        host.wait_for_unit(unit)
        assert unit in host.run("cat", f"/proc/{host.info('web')['pid']}/cgroup")
    host.run("oscloudctl", "vm-wait", "web")


def test_a_reboot_starts_what_ran(host: Host, web: dict[str, Any]) -> None:
    host.run("oscloudctl", "vm-set", "web", "--autostart", "last-state")
    for name, autostart in (("always", "yes"), ("never", "no"), ("off", "last-state")):
        host.run("oscloudctl", "vm-create", name, *SMALL, "--autostart", autostart)
    host.run("oscloudctl", "vm-stop", "always", "off", "--force")
    host.container.reboot()
    for name in ("web", "always"):
        host.run("oscloudctl", "vm-wait", name, "--timeout", "120")
    assert {name: host.info(name)["state"] for name in ("never", "off")} == {
        "never": "STOPPED",
        "off": "STOPPED",
    }
    last = host.run("journalctl", "--no-pager", "--boot=-1", "--unit=oscloud-guests.service")
    assert "web: STOPPED" in last
    assert "never: STOPPED" in last
    # The guest was asked, and shut itself down.
    console = host.run("oscloudctl", "vm-log", "never")
    assert "Power down" in console


def test_it_is_not_removed_under_running_vms(host: Host) -> None:
    refused = host.attempt("apt-get", "remove", "--yes", "oscloud")
    assert refused.returncode != 0
    assert "These vms run, and removing oscloud would end them: web always" in refused.stdout
    assert "oscloudctl vm-stop --all" in refused.stdout
    for name in ("web", "always"):
        assert host.info(name)["state"] == "RUNNING"
    assert host.run("systemctl", "is-active", "oscloudd.service") == "active"


def test_removal_keeps_what_is_dear(host: Host) -> None:
    said = host.run("env", "OSCLOUD_REMOVE=stop", "apt-get", "remove", "--yes", "oscloud")
    assert "Stopping these vms, whose disks stay: web always" in said
    assert host.attempt("pgrep", "qemu-system").stdout == ""
    assert host.run("find", "/var/lib/oscloud", "-name", "disk.qcow2", "-path", "*/disks/*")
    assert host.attempt("systemctl", "is-active", "oscloudd.socket").stdout.strip() == "inactive"


def test_a_purge_leaves_nothing(host: Host) -> None:
    host.run("userdel", "--remove", "ann")
    host.run("apt-get", "purge", "--yes", "oscloud")
    assert host.run("nft", "list", "tables") == ""
    assert host.run("ip", "-brief", "link", "show", "type", "bridge") == ""
    for database in ("passwd", "group"):
        assert "oscloud" not in host.run("getent", database)
    # What is in a user's home is the user's.
    left = host.run("find", "/", "-xdev", "-iname", "*oscloud*", "!", "-path", "/root/*")
    assert left == ""
    assert host.run("systemctl", "list-units", "--all", "--no-legend", "oscloud*") == ""
