"""The commands of a checkout, part by part: configuration, pid files, namespaces, the shim."""

import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import msgspec
import pytest

from oscloudd.config import Config, load_config

ROOT = Path(__file__).parent.parent
CHECKOUT = ROOT / "packaging/checkout"
sys.path.insert(0, str(CHECKOUT))

import checkout  # noqa: E402 # the modules lie beside their commands, in no package
import namespace  # noqa: E402
import resolver  # noqa: E402
import services  # noqa: E402
import up  # noqa: E402
from stages import CheckoutError, run, run_command  # noqa: E402
from supervised import Supervised, find_start_time  # noqa: E402

DEADLINE_SECONDS = 90


# --- configuration


def test_the_daemon_takes_the_configuration_of_a_checkout(tmp_path: Path) -> None:
    root = tmp_path / 'a "quoted" place'
    path = tmp_path / "oscloud.toml"
    path.write_text(checkout.build_config(root), encoding="utf-8")
    config = load_config(path)
    assert config.socket_path == root / ".run/oscloudd.sock"
    assert config.state_path == root / ".run/state"
    assert config.template_dirs == [str(root / "templates")]


def test_listen_defaults_to_the_daemons_own() -> None:
    config = tomllib.loads(checkout.build_config(ROOT))
    assert checkout.read_listen(config) == ("127.0.0.1", 5000)
    assert Config().http.listen == msgspec.convert(config, Config).http.listen


def test_a_listen_without_a_port_is_named() -> None:
    with pytest.raises(CheckoutError, match="'localhost' is not HOST:PORT"):
        checkout.read_listen({"http": {"listen": "localhost"}})


# --- processes that go on


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Supervised]:
    program = Supervised("sleeper", tmp_path / "pid", tmp_path / "log")
    yield program
    pid = program.find_pid()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def test_a_program_is_found_and_stopped(program: Supervised) -> None:
    pid = program.start(["sleep", "1000"], os.environ)
    assert program.find_pid() == pid
    assert program.stop(DEADLINE_SECONDS)
    assert program.find_pid() is None
    assert not program.pid_file.exists()
    assert not program.stop(DEADLINE_SECONDS)


def test_a_pid_that_went_to_another_process_is_left_alone(program: Supervised) -> None:
    with subprocess.Popen(["sleep", "1000"]) as other:
        start_time = find_start_time(other.pid)
        assert start_time is not None
        program.pid_file.write_text(f"{other.pid} {int(start_time) - 1}\n")
        assert program.find_pid() is None
        assert not program.stop(DEADLINE_SECONDS)
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("text", ["", "12", "x y", "1 2 3"])
def test_a_damaged_pid_file_means_not_running(program: Supervised, text: str) -> None:
    program.pid_file.write_text(text)
    assert program.find_pid() is None


def test_a_program_that_does_not_stop_is_not_killed(program: Supervised) -> None:
    ready = "import signal, time; signal.signal(15, signal.SIG_IGN); print('!', flush=True)"
    pid = program.start([sys.executable, "-c", f"{ready}; time.sleep(1000)"], os.environ)
    with subprocess.Popen(["tail", "-n+1", "-F", program.log], stdout=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        assert tail.stdout.readline() == b"!\n"
        tail.kill()
    with pytest.raises(CheckoutError, match="sleeper did not stop within 0 s"):
        program.stop(0.1)
    assert program.find_pid() == pid


def test_a_death_at_the_start_is_told_with_the_logs_end(program: Supervised) -> None:
    program.log.write_text("of last time\n")
    begin = program.log_end()
    pid = program.start(["sh", "-c", "echo no port; exit 3"], os.environ)
    os.waitpid(pid, 0)
    error = program.explain_death(begin)
    assert "no port" in str(error)
    assert "of last time" not in str(error)
    assert str(program.log) in error.hint


def test_a_daemon_that_dies_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch, program: Supervised
) -> None:
    monkeypatch.setattr(services, "DAEMON", program)
    monkeypatch.setattr(services, "_inside", lambda _netns, _argv: ["sh", "-c", "echo bad key"])
    with pytest.raises(CheckoutError, match="bad key"):
        services.start_daemon("")


def test_a_daemon_is_ready_when_it_says_so(
    monkeypatch: pytest.MonkeyPatch, program: Supervised
) -> None:
    say_ready = (
        "import os, socket, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
        "s.sendto(b'STATUS=adopting\\nREADY=1', os.environ['NOTIFY_SOCKET']); time.sleep(1000)"
    )
    monkeypatch.setattr(services, "DAEMON", program)
    monkeypatch.setattr(services, "_inside", lambda _n, _a: [sys.executable, "-c", say_ready])
    services.start_daemon("")
    assert program.find_pid() is not None
    assert program.stop(DEADLINE_SECONDS)


# --- which namespace


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(checkout, "NAMESPACE_FILE", tmp_path / "netns")
    for name in ("DAEMON", "SHIM"):
        monkeypatch.setattr(up, name, Supervised(name, tmp_path / f"{name}.pid", tmp_path / "log"))
    return tmp_path / "netns"


def test_the_namespace_of_last_time_is_kept(remembered: Path) -> None:
    assert up.choose_namespace("") == ""
    assert up.choose_namespace("lab") == "lab"
    remembered.write_text("lab\n")
    assert up.choose_namespace("") == "lab"
    assert up.choose_namespace("lab") == "lab"


def test_another_namespace_is_refused_while_it_runs(remembered: Path) -> None:
    remembered.write_text("\n")
    own = f"{os.getpid()} {find_start_time(os.getpid())}\n"
    up.DAEMON.pid_file.write_text(own)
    with pytest.raises(CheckoutError, match="in the host's own network, not in lab") as caught:
        up.choose_namespace("lab")
    assert caught.value.hint == "make down && make up NETNS=lab"
    up.DAEMON.pid_file.unlink()
    assert up.choose_namespace("lab") == "lab"


@pytest.mark.parametrize("name", ["", "-x", "a/b", "..", "a b", "é", "x" * 33, "a\n"])
def test_a_name_that_can_name_no_namespace_is_refused(name: str) -> None:
    with pytest.raises(CheckoutError, match="can't name a namespace"):
        namespace.check_name(name)


def test_the_link_net_overlaps_no_route() -> None:
    assert namespace.find_free_link_net([]) == IPv4Network("100.64.0.0/30")
    used = [IPv4Network("100.64.0.0/24"), IPv4Network("100.64.1.1/32"), IPv4Network("10.0.0.0/8")]
    assert namespace.find_free_link_net(used) == IPv4Network("100.64.1.4/30")
    with pytest.raises(CheckoutError, match="no free /30"):
        namespace.find_free_link_net([IPv4Network("100.64.0.0/10")])


def test_name_servers_are_read_as_the_resolver_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(
        "# nameserver 1.1.1.1\nsearch lan\nnameserver\t10.0.0.1 \nnameserver ::1\nnameserver\n"
    )
    assert resolver.find_servers(path) == ["10.0.0.1", "::1"]
    assert resolver.find_servers(tmp_path / "missing") == []


# --- in real namespaces, under a /run and a network of the test's own

OUTSIDE = f"""
set -euo pipefail
mount -t tmpfs tmpfs /run
ip link set lo up
ip netns add far
ip link add outside type veth peer name outside netns far
ip address add 203.0.113.1/24 dev outside
ip link set outside up
ip -netns far address add 203.0.113.2/24 dev outside
ip -netns far link set outside up
snapshot() {{ ip -brief address | sed 's/@[^ ]*//'; nft list ruleset; ls -A /run/netns
    cat /proc/sys/net/ipv4/ip_forward; ls -A /etc/netns 2>/dev/null || true; }}
netns={CHECKOUT / "netns"}
"""

# It answers with the address the caller comes from.
ECHO = """
import socket
with socket.create_server(("203.0.113.2", 7)) as server:
    print("listening", flush=True)
    server.settimeout(30)
    stream, caller = server.accept()
    stream.sendall(caller[0].encode())
"""

ASK = """
import socket
with socket.create_connection(("203.0.113.2", 7), timeout=10) as stream:
    print(stream.recv(100).decode())
"""


def outside(script: str) -> str:
    done = subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-c", OUTSIDE + script],
        env={**os.environ, "ECHO": ECHO, "ASK": ASK},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_uplink_leads_out_behind_the_hosts_address() -> None:
    printed = outside("""
        $netns up lab-1
        coproc ip netns exec far python3 -c "$ECHO"
        read -r -u ${COPROC[0]}
        ip netns exec lab-1 python3 -c "$ASK"
    """)
    assert printed.splitlines()[-1] == "203.0.113.1"


def test_a_host_that_drops_what_it_forwards_lets_the_uplink_through() -> None:
    printed = outside("""
        echo 1 > /proc/sys/net/ipv4/ip_forward
        nft add table ip filter
        nft "add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"
        before=$(snapshot)
        $netns up lab
        coproc ip netns exec far python3 -c "$ECHO"
        read -r -u ${COPROC[0]}
        ip netns exec lab python3 -c "$ASK"
        $netns down lab
        [ "$before" = "$(snapshot)" ] || { echo "$before"; snapshot; exit 1; }
    """)
    assert "203.0.113.1\nNamespace lab: removed\n" in printed


def test_up_and_down_may_be_repeated_and_down_leaves_nothing() -> None:
    # Without the link to `far`: a host with other links keeps forwarding for their sake.
    printed = outside("""
        ip link delete outside
        before=$(snapshot)
        $netns up a; once=$(snapshot); $netns up a
        [ "$once" = "$(snapshot)" ]
        $netns up b
        $netns down a; $netns down a; $netns down b
        [ "$before" = "$(snapshot)" ] || { echo "$before"; snapshot; exit 1; }
    """)
    assert [line.partition(",")[0] for line in printed.splitlines()] == [
        "Namespace a: made", "Namespace a: already there", "Namespace b: made",
        "Namespace a: removed", "Namespace b: removed",
    ]  # fmt: skip
    assert "100.64.0.4/30" in printed


def test_a_namespace_of_somebody_else_is_used_and_left() -> None:
    printed = outside("ip netns add other; $netns up other; $netns down other; ip netns")
    assert "used as it is" in printed
    assert "other" in printed.splitlines()[-2:]


def test_a_namespace_in_use_stays() -> None:
    printed = outside("""
        $netns up lab >&2
        sleep 1000 & first=$!
        coproc ip netns exec lab python3 -c "print(flush=True); input()"
        read -r -u ${COPROC[0]}
        kill $first
        ! $netns down lab 2>&1
        ip netns
    """)
    assert "Error: namespace lab is in use by process" in printed
    assert "lab" in printed.splitlines()[-1] + printed.splitlines()[-2]


def test_a_link_net_is_chosen_beside_the_hosts_routes() -> None:
    printed = outside("""
        ip route add 100.64.0.0/16 via 203.0.113.2
        $netns up lab
    """)
    assert "uplink 100.65.0.0/30" in printed


# --- the shim's user


def test_the_shim_runs_unprivileged_even_in_a_checkout_of_roots() -> None:
    program = 'ip link set lo up; exec "$0" "$1" 127.0.0.1:5000'
    shim = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", program, CHECKOUT / "shim", ROOT],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert shim.stderr is not None
        line = shim.stderr.readline()
        assert "oscloud-http listens on http://127.0.0.1:5000" in line
        while "Started server process" not in line and line:
            line = shim.stderr.readline()
        status = Path(f"/proc/{shim.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert f"\nUid:\t{run(['id', '-u', 'oscloud-http']).strip()}\t" in status
        assert services.owns_listener(shim.pid, 5000)
        assert not services.owns_listener(shim.pid, 5001)
    finally:
        shim.terminate()
        shim.communicate(timeout=DEADLINE_SECONDS)
    assert shim.returncode == 0


# --- the commands


def test_installing_what_is_there_says_nothing() -> None:
    install = CHECKOUT / "install"
    subprocess.run([install, "--test"], check=True, capture_output=True, timeout=600)
    again = subprocess.run([install, "--test"], check=True, capture_output=True, timeout=60)
    assert again.stdout == again.stderr == b""


def test_make_alone_lists_every_target() -> None:
    listed = run(["make", "-s", "-C", str(ROOT)]).split("\n")
    named = {line.split()[0] for line in listed if line}
    assert named >= {"up", "down", "clean", "test", "lint", "bench", "ctl", "help"}


def test_an_error_is_two_lines_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise CheckoutError("the port 5000 is taken", "stop what listens there")

    assert run_command(fail) == 1
    assert (
        capsys.readouterr().err == "Error: the port 5000 is taken\nHint: stop what listens there\n"
    )
