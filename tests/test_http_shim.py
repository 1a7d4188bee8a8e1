"""The HTTP shim as a process on a port of loopback: the original's API, word for word."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from stub_daemon import (
    DEADLINE_SECONDS,
    HANG_UP,
    VM,
    Call,
    ScriptedJob,
    StubDaemon,
    build_environment,
    no_vm,
)

from oscloudctl.http.main import parse_listen, read_listen
from oscloudd.errors import (
    AlreadyExistsError,
    CancelledJobError,
    HostError,
    InvalidArgumentError,
    NotFoundError,
)

EIGHT_KEYS = ["disk_size", "id", "ip", "mem_size", "name", "network", "os", "state"]
CREATE = {"name": "my_vm", "image": "debian_12", "network": "default", "mem_size": "2G",
          "disk_size": "10G"}  # fmt: skip


class Answer(NamedTuple):
    status: int
    text: str
    headers: dict[str, str]


class Shim:
    """The process and a way to ask it; `close` stops it and keeps its exit status."""

    def __init__(self, daemon: StubDaemon, home: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oscloudctl.http", *(arguments or ("--listen", "127.0.0.1:0"))],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=build_environment(daemon, home), cwd=home,
        )  # fmt: skip
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        found = re.fullmatch(r"oscloud-http listens on http://(.+):(\d+)\n", first)
        assert found, first
        self.host, self.port = found[1].strip("[]"), int(found[2])
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def __enter__(self) -> "Shim":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.close(signal.SIGKILL)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_SECONDS)
        json_header = {"Content-Type": "application/json"}
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                # A body that is refused may find nobody listening any more; the answer is there.
                connection.request(method, path, data, json_header if headers is None else headers)
            response = connection.getresponse()
            text = response.read().decode()
            return Answer(response.status, text, {k.lower(): v for k, v in response.getheaders()})
        finally:
            connection.close()

    def close(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(DEADLINE_SECONDS)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StubDaemon, Shim]]:
    home = tmp_path_factory.mktemp("http")
    daemon = StubDaemon(home / "oscloudd.sock")
    shim = Shim(daemon, home)
    yield daemon, shim
    assert shim.close() == 0
    daemon.close()
    assert not [line for line in shim.log if "Traceback" in line]


@pytest.fixture
def daemon(shared: tuple[StubDaemon, Shim]) -> StubDaemon:
    stub = shared[0]
    stub.calls.clear()
    stub.answers.clear()
    return stub


@pytest.fixture
def shim(shared: tuple[StubDaemon, Shim], daemon: StubDaemon) -> Shim:
    return shared[1]


def error(message: str) -> str:
    return json.dumps({"error_msg": message, "status": "error"}, separators=(",", ":"))


def test_the_originals_session(daemon: StubDaemon, shim: Shim) -> None:
    made = {**VM, "name": "my_vm"}
    daemon.answers.update(vm_list=[], vm_create=made, vm_info=made, vm_stop=made, vm_start=made)
    assert shim.ask("GET", "/").text == "Welcome to OS Cloud!\n"
    assert shim.ask("GET", "/vm_list").text == "[]"
    assert shim.ask("POST", "/vm_create", CREATE).text == '{"id":1,"status":"ok"}'
    daemon.answers["vm_list"] = [made]
    assert shim.ask("GET", "/vm_list").text == '[{"id":1,"name":"my_vm"}]'
    assert shim.ask("POST", "/vm_info", {"id": 1}).text == (
        '{"disk_size":10737418240,"id":1,"ip":"192.168.0.2","mem_size":2147483648,'
        '"name":"my_vm","network":"default","os":"debian_12","state":"RUNNING"}'
    )
    assert shim.ask("POST", "/vm_stop", {"id": 1}).text == '{"status":"ok"}'
    answer = shim.ask("POST", "/vm_start", {"id": 1})
    assert answer.text == '{"status":"ok"}'
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert daemon.calls == [
        ("vm_list", {}), ("vm_create", {**CREATE, "wait": "ready"}), ("vm_list", {}),
        ("vm_info", {"vm": 1}), ("vm_stop", {"vm": 1}), ("vm_start", {"vm": 1}),
    ]  # fmt: skip


@pytest.mark.parametrize("route", ["/vm_create", "/vm_start", "/vm_stop"])
def test_progress_does_not_get_in_the_way(daemon: StubDaemon, shim: Shim, route: str) -> None:
    def work(call: Call) -> Any:
        for fraction in (None, 0.5):
            call.progress("working", "a while", fraction)
            call.event(1)
        return VM

    daemon.answers[route[1:]] = work
    answer = shim.ask("POST", route, {**CREATE, "id": 1})
    assert (answer.status, json.loads(answer.text)["status"]) == (200, "ok")
    assert "wait" not in daemon.calls[0][1] or daemon.calls[0][1]["wait"] == "ready"


def test_who_hangs_up_cancels_nothing(daemon: StubDaemon, shim: Shim) -> None:
    job = ScriptedJob(daemon, "vm_stop")
    body = '{"id": 1}'
    request = f"POST /vm_stop HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((shim.host, shim.port), DEADLINE_SECONDS) as connection:
        connection.sendall(f"{request}{body}".encode())
        assert job.begun.wait(DEADLINE_SECONDS)
    daemon.answers["vm_list"] = []
    assert shim.ask("GET", "/vm_list").text == "[]"
    assert not job.gone.is_set(), "the shim waits on"
    job.end.set()
    assert daemon.params_of("job_cancel") == []


def test_info_has_the_eight_keys_even_if_one_is_unknown(daemon: StubDaemon, shim: Shim) -> None:
    daemon.answers["vm_info"] = {"id": 1, "name": "x", "pid": 5}
    assert list(json.loads(shim.ask("POST", "/vm_info", {"id": 1}).text)) == EIGHT_KEYS


def test_missing_parameters_in_the_originals_order(daemon: StubDaemon, shim: Shim) -> None:
    given: dict[str, str] = {}
    for key, value in CREATE.items():
        for lacking in (given, {**given, key: None}, {**given, key: ""}):
            answer = shim.ask("POST", "/vm_create", lacking)
            assert (answer.status, answer.text) == (200, error(f"VM {key} not provided"))
        given[key] = value
    for route in ("/vm_info", "/vm_start", "/vm_stop"):
        for body in ({}, "", {"id": None}):
            assert shim.ask("POST", route, body).text == error("VM id not provided")
    assert daemon.calls == []


@pytest.mark.parametrize(("given", "sent"), [(1, 1), ("1", 1), ("9" * 30, "9" * 30), ("x", "x")])
def test_ids_are_numbers_or_digits(
    daemon: StubDaemon, shim: Shim, given: object, sent: object
) -> None:
    daemon.answers["vm_info"] = VM
    shim.ask("POST", "/vm_info", {"id": given})
    assert daemon.calls == [("vm_info", {"vm": sent})]


def test_forms_and_json_called_a_form(daemon: StubDaemon, shim: Shim) -> None:
    daemon.answers.update(vm_info=VM, vm_create=VM)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    shim.ask("POST", "/vm_info", "id=1", form)
    shim.ask("POST", "/vm_info", '{"id": 2}', form)
    shim.ask(
        "POST", "/vm_create",
        "name=a&image=b&network=c&mem_size=2G&disk_size=1G&cpus=2&ssh_key=ssh-rsa+AA&wait=none",
        form,
    )  # fmt: skip
    assert daemon.calls == [
        ("vm_info", {"vm": 1}), ("vm_info", {"vm": 2}),
        ("vm_create", {"name": "a", "image": "b", "network": "c", "mem_size": "2G",
                       "disk_size": "1G", "cpus": 2, "ssh_key": "ssh-rsa AA", "wait": "ready"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (no_vm(9), 'vm "9" not found'),
        (NotFoundError("m", object="network", name="x"), 'network "x" not found'),
        (NotFoundError("m", object="template", name="x"), 'disk template "x" not found'),
        (AlreadyExistsError("m", object="vm", name="my_vm"), 'vm "my_vm" already exists'),
        (NotFoundError("no details"), "no details"),
        (InvalidArgumentError("mem_size 'x' is not a size", object="vm", name="a"),
         "mem_size 'x' is not a size"),
        (HostError("qemu failed", argv=["qemu"]), "qemu failed"),
        (CancelledJobError("job 7 (vm_create web) was cancelled"),
         "job 7 (vm_create web) was cancelled"),
    ],
)  # fmt: skip
def test_errors_have_the_originals_words(
    daemon: StubDaemon, shim: Shim, raised: Any, words: str
) -> None:
    daemon.fail("vm_create", raised)
    answer = shim.ask("POST", "/vm_create", CREATE)
    assert answer.status == 200
    assert json.loads(answer.text) == {"status": "error", "error_msg": words}


def test_a_dead_daemon_is_502(daemon: StubDaemon, shim: Shim, tmp_path: Path) -> None:
    daemon.answers["vm_list"] = HANG_UP
    answer = shim.ask("GET", "/vm_list")
    assert answer.status == 502
    assert json.loads(answer.text)["status"] == "error"
    none = ("--listen", "127.0.0.1:0", "--socket", str(tmp_path / "none"))
    with Shim(daemon, tmp_path, *none) as alone:
        answer = alone.ask("GET", "/vm_list")
        assert alone.close() == 0
    assert answer.status == 502
    assert "no socket" in json.loads(answer.text)["error_msg"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404), ("POST", "/", 405), ("POST", "/vm_list", 405),
        ("GET", "/vm_create", 405), ("DELETE", "/vm_stop", 405),
    ],
)  # fmt: skip
def test_no_such_route_or_method(
    daemon: StubDaemon, shim: Shim, method: str, path: str, status: int
) -> None:
    answer = shim.ask(method, path)
    assert answer.status == status
    assert json.loads(answer.text)["status"] == "error"
    assert daemon.calls == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400), ("[1]", 400), ('"x"', 400), ("[" * 100_000, 400), (b"\xff", 400),
        ('{"a":' * 100_000, 400), ("x" * (1 << 20), 400), ("x" * ((1 << 20) + 1), 413),
    ],
    ids=["cut", "list", "string", "deep list", "no utf-8", "deep object", "1 MiB", "more"],
)  # fmt: skip
def test_bodies_that_make_no_sense(
    daemon: StubDaemon, shim: Shim, body: str | bytes, status: int
) -> None:
    answer = shim.ask("POST", "/vm_create", body)
    assert answer.status == status
    assert json.loads(answer.text)["status"] == "error"
    assert daemon.calls == []


def test_a_long_body_that_does_not_say_so(shim: Shim) -> None:
    connection = http.client.HTTPConnection(shim.host, shim.port, timeout=DEADLINE_SECONDS)
    try:
        chunks = (b"x" * 65536 for _ in range(17))
        connection.request("POST", "/vm_create", chunks, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it may stop listening before we stop talking
    assert connection.getresponse().status == 413
    connection.close()


def test_only_our_own_hosts(daemon: StubDaemon, shim: Shim) -> None:
    daemon.answers["vm_list"] = []
    for ours in ("localhost", f"127.0.0.1:{shim.port}", "[::1]:5000", "LOCALHOST:1"):
        assert shim.ask("GET", "/vm_list", headers={"Host": ours}).status == 200
    for foreign in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil:5000",
        "10.0.0.1",
        "",
    ):
        answer = shim.ask("GET", "/vm_list", headers={"Host": foreign})
        assert answer.status == 421, foreign
        assert json.loads(answer.text)["status"] == "error"
    assert len(daemon.calls) == 4


def test_only_our_own_origin(daemon: StubDaemon, shim: Shim) -> None:
    daemon.answers["vm_stop"] = VM
    own = f"http://127.0.0.1:{shim.port}"
    assert shim.ask("POST", "/vm_stop", {"id": 1}, {"Origin": own}).status == 200
    for foreign in ("http://evil.example", "null", "http://localhost:3000", f"{own}0", ""):
        assert shim.ask("POST", "/vm_stop", {"id": 1}, {"Origin": foreign}).status == 403, foreign
    assert len(daemon.calls) == 1


def test_a_long_create_keeps_nobody_waiting(daemon: StubDaemon, shim: Shim) -> None:
    started, finish = threading.Semaphore(0), threading.Event()

    def create(_call: Call) -> Any:
        started.release()
        assert finish.wait(DEADLINE_SECONDS)
        return VM

    daemon.answers.update(vm_create=create, vm_list=[])
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(shim.ask("POST", "/vm_create", CREATE)))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert started.acquire(timeout=DEADLINE_SECONDS)
    assert shim.ask("GET", "/vm_list").text == "[]"
    finish.set()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200] * 40


def test_stops_on_sigterm_even_with_a_create_under_way(tmp_path: Path) -> None:
    daemon = StubDaemon(tmp_path / "s")
    started, finish = threading.Event(), threading.Event()
    daemon.answers["vm_create"] = lambda _call: started.set() or finish.wait(DEADLINE_SECONDS)
    body = json.dumps(CREATE)
    request = f"POST /vm_create HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with Shim(daemon, tmp_path) as shim:
        with socket.create_connection((shim.host, shim.port), DEADLINE_SECONDS) as connection:
            connection.sendall(f"{request}{body}".encode())
            assert started.wait(DEADLINE_SECONDS)
            assert shim.close() == 0
        finish.set()
    daemon.close()


def test_says_which_address_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "oscloudctl.http", "--listen", f"127.0.0.1:{port}"],
            env=build_environment(None, tmp_path), capture_output=True, text=True, check=False,
            timeout=DEADLINE_SECONDS, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: Address already in use" in done.stderr


def test_listen_addresses() -> None:
    assert parse_listen("127.0.0.1:5000") == ("127.0.0.1", 5000)
    assert parse_listen("[::1]:80") == ("::1", 80)
    for bad in ("5000", ":5000", "localhost", "localhost:", "a:99999", "a:-1", "a:٣"):
        with pytest.raises(click.BadParameter, match="HOST:PORT"):
            parse_listen(bad)


def test_listen_from_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "oscloud.toml"
    config.write_text('[http]\nlisten = "127.0.0.1:5001"\n')
    assert read_listen(str(config)) == "127.0.0.1:5001"
    config.write_text("")
    assert read_listen(str(config)) == "127.0.0.1:5000"
    config.write_text("[")
    with pytest.raises(click.BadParameter, match="can't read"):
        read_listen(str(config))
