"""Every way a request can be wrong: its code, a sentence that helps, and nothing left behind."""

import json
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from daemon_process import IMAGE, Box, RpcError

from oscloudd.host.keys import check_public_key

MIB = 1 << 20
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE2Rb0Rrka9Hq2s2cQzPbJYvTqvTnRmNfVQ0q5o6yXcd"
FINE = {"name": "new", "mem_size": "64M", "disk_size": "16M", "wait": "started"}
INVALID = (-32602, "invalid_argument")
NOT_FOUND = (3, "not_found")
EXHAUSTED = (8, "exhausted")


@pytest.fixture(scope="module")
def inhabited(shared_box: Box) -> Box:
    """A cloud with one vm in it, `web`."""
    shared_box.create("web")
    return shared_box


@pytest.fixture
def box(inhabited: Box) -> Iterator[Box]:
    """Fails the test if what it asked for has left anything, or has ended what was there."""
    before = inhabited.traces()
    yield inhabited
    assert inhabited.traces() == before
    assert inhabited.call("vm_info", vm="web")["state"] == "RUNNING"


def refusal(box: Box, method: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as refused:
        box.call(method, **params)
    error = refused.value
    assert 10 < len(error.message) < 400, error.message
    assert error.message.isprintable()
    assert "Traceback" not in str(error)
    assert "Error" not in error.message
    return error


def named(value: object) -> str:
    return repr(value)[:40]


# The parameters of a vm

BAD_NAMES = [
    "",
    " ",
    "a,b",
    "a/b",
    "/etc/passwd",
    "..",
    "../web",
    ".hidden",
    "-rf",
    "_x",
    "a b",
    "a\n",
    "a\nb",
    "a\x00b",
    "a=b,guest=c",
    "näme",
    "名前",
    "\u0661\u0662",
    "²",
    "\U0001f600",
    "a" * 64,
    "a" * 500_000,
    "42",
    "'; DROP TABLE vm; --",
    "$(reboot)",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=named)
def test_a_name_that_can_not_be_one_is_refused(box: Box, name: str) -> None:
    for method, params in (("vm_create", {**FINE, "name": name}), ("vm_rename", {"vm": "web"})):
        error = refusal(box, method, **{**params, "name": name})
        assert (error.code, error.kind) == INVALID
        assert "name" in error.message
        assert error.data["parameter"] == "name"
        assert error.data["hint"]


WRONG_TYPES: list[tuple[str, Any]] = [
    ("name", None),
    ("name", 7),
    ("name", ["web"]),
    ("name", {"a": 1}),
    ("image", 7),
    ("image", []),
    ("network", 1.5),
    ("network", None),
    ("network", True),
    ("mem_size", None),
    ("mem_size", True),
    ("mem_size", 1.5),
    ("mem_size", [1]),
    ("disk_size", {}),
    ("disk_size", False),
    ("cpus", "two"),
    ("cpus", 1.5),
    ("cpus", True),
    ("cpus", None),
    ("ssh_key", 7),
    ("ssh_key", [7]),
    ("ssh_key", None),
    ("ip", 3232235522),
    ("password", 123456),
    ("user_data", None),
    ("wait", "forever"),
    ("wait", 1),
    ("autostart", True),
    ("autostart", "Yes"),
    ("autostart", None),
    ("restart", "sometimes"),
    ("restart", 3),
    ("unknown_parameter", 1),
    ("Name", "web"),
]


@pytest.mark.parametrize(("parameter", "value"), WRONG_TYPES, ids=named)
def test_a_parameter_of_a_wrong_type_is_refused(box: Box, parameter: str, value: Any) -> None:
    error = refusal(box, "vm_create", **{**FINE, parameter: value})
    assert (error.code, error.kind) == INVALID
    assert parameter in error.message
    assert "mem_size" in error.data["hint"]  # it lists what there is


BAD_VALUES: list[tuple[str, Any]] = [
    *(
        (parameter, value)
        for parameter in ("mem_size", "disk_size")
        for value in (
            "",
            " ",
            "big",
            "-1",
            "-1G",
            "1.5G",
            "1X",
            "\u0661G",
            "1G;reboot",
            "9" * 100_000,
        )
    ),
    *(
        (parameter, value)
        for parameter in ("mem_size", "disk_size")
        for value in (0, -1, -(1 << 40), 1 << 63)
    ),
    ("mem_size", 1),
    ("mem_size", "1M"),
    ("disk_size", 1),
    ("disk_size", "512K"),
    ("cpus", 0),
    ("cpus", -1),
    ("cpus", 256),
    ("cpus", 1 << 62),
    ("ip", ""),
    ("ip", "web"),
    ("ip", "192.168.0"),
    ("ip", "192.168.0.1"),
    ("ip", "192.168.0.0"),
    ("ip", "192.168.255.255"),
    ("ip", "10.0.0.2"),
    ("ip", "::1"),
    ("ip", "192.168.0.9\n"),
    ("ip", "\u0661\u0669\u0662.168.0.9"),
    ("ip", "1" * 100_000),
    ("password", "a\nb"),
    ("password", "a" * 257),
    ("user_data", "#cloud-config\n"),
    ("user_data", "packages: [vim]\n"),
    ("ssh_key", ""),
    ("ssh_key", [""]),
    ("ssh_key", "ssh-ed25519"),
    ("ssh_key", "hello"),
    ("ssh_key", f"{KEY}\nssh-rsa AAAA"),
    ("ssh_key", f"{KEY} me\n{KEY} you"),
    ("ssh_key", f"ssh-ed25519 '\"'; reboot; \"' {KEY}"),
    ("ssh_key", f'command="reboot" {KEY}'),
    ("ssh_key", f"{KEY} a\rb"),
    ("ssh_key", f"{KEY[:-4]}"),
    ("ssh_key", "ssh-ed25519 " + "ä" * 68),
    ("ssh_key", f"{KEY} {'x' * 100_000}"),
    ("ssh_key", [KEY, "hello"]),
]


@pytest.mark.parametrize(("parameter", "value"), BAD_VALUES, ids=named)
def test_a_value_out_of_range_is_refused(box: Box, parameter: str, value: Any) -> None:
    error = refusal(box, "vm_create", **{**FINE, parameter: value})
    assert (error.code, error.kind) == INVALID
    assert parameter in error.message
    assert error.data["parameter"] == parameter


def test_a_number_no_integer_can_hold_is_refused(box: Box) -> None:
    for parameter in ("mem_size", "cpus", "network"):
        error = refusal(box, "vm_create", **{**FINE, parameter: 10**40})
        assert (error.code, error.kind) in (INVALID, NOT_FOUND)


@pytest.mark.parametrize("mem_size", ["4T", 1 << 62, "8388607T"])
def test_more_memory_than_the_host_has_is_refused(box: Box, mem_size: int | str) -> None:
    error = refusal(box, "vm_create", **{**FINE, "mem_size": mem_size})
    assert (error.code, error.kind) == EXHAUSTED
    assert "memory" in error.message
    assert error.data["resource"] == "memory"
    assert error.data["available"] < error.data["wanted"]
    assert error.data["hint"]


def test_a_disk_larger_than_qemu_img_can_make_leaves_nothing(box: Box) -> None:
    error = refusal(box, "vm_create", **{**FINE, "disk_size": (1 << 63) - 1})
    assert error.kind in ("invalid_argument", "host_failure", "exhausted")


def test_a_missing_name_is_asked_for(box: Box) -> None:
    error = refusal(box, "vm_create")
    assert (error.code, error.kind) == INVALID
    assert "name" in error.message


def test_the_key_that_the_bad_ones_are_made_from_is_good() -> None:
    assert check_public_key(KEY) == KEY


def test_a_name_that_is_taken_is_refused_to_another(box: Box) -> None:
    box.create("other")
    try:
        error = refusal(box, "vm_rename", vm="other", name="web")
        assert (error.code, error.kind) == (4, "already_exists")
        assert box.call("vm_rename", vm="other", name="other")["name"] == "other"
    finally:
        box.call("vm_delete", vm="other", force=True)


def test_a_name_that_is_taken_is_refused(box: Box) -> None:
    error = refusal(box, "vm_create", **{**FINE, "name": "web"})
    assert (error.code, error.kind) == (4, "already_exists")
    assert "'web'" in error.message
    assert "vm-delete web" in error.data["hint"]


def test_an_address_that_is_taken_is_refused(box: Box) -> None:
    address = box.call("vm_info", vm="web")["ip"]
    error = refusal(box, "vm_create", **FINE, ip=address)
    assert (error.code, error.kind) == (6, "in_use")
    assert address in error.message


IMAGES = [
    "nope",
    "",
    ".",
    "..",
    "../templates/fake_1",
    f"{IMAGE}/",
    "/etc",
    "a\x00b",
    "ä",
    "a" * 9999,
]


@pytest.mark.parametrize("image", IMAGES, ids=named)
def test_an_unknown_image_is_not_found(box: Box, image: str) -> None:
    for method, params in (
        ("vm_create", {**FINE, "image": image}),
        ("template_info", {"template": image}),
        ("template_build", {"template": image}),
        ("template_download", {"template": image}),
        ("template_delete", {"template": image}),
    ):
        error = refusal(box, method, **params)
        assert (error.code, error.kind) == NOT_FOUND, method
        assert "template-list" in error.data["hint"]


KEYS: list[int | str] = [
    "nope", "", " ", "..", "a/b", "a,b", "ä", "\x00", "%", "a" * 100_000, "9" * 30, "9" * 5000,
    0, -1, 999, 1 << 62, (1 << 63) - 1, "0", "-1", "\u0661", "²", "' OR 1=1 --",
]  # fmt: skip
BY_KEY: list[tuple[str, str, dict[str, Any]]] = [
    ("vm_info", "vm", {}),
    ("vm_start", "vm", {}),
    ("vm_stop", "vm", {}),
    ("vm_restart", "vm", {}),
    ("vm_pause", "vm", {}),
    ("vm_resume", "vm", {}),
    ("vm_suspend", "vm", {}),
    ("vm_delete", "vm", {"force": True}),
    ("vm_clone", "vm", {"name": "other"}),
    ("snapshot_create", "vm", {"name": "a"}),
    ("snapshot_list", "vm", {}),
    ("snapshot_restore", "vm", {"snapshot": "a"}),
    ("snapshot_delete", "vm", {"snapshot": "a"}),
    ("vm_rename", "vm", {"name": "other"}),
    ("vm_set", "vm", {"autostart": "no"}),
    ("vm_wait", "vm", {"timeout": 1}),
    ("vm_log", "vm", {}),
    ("vm_console", "vm", {}),
    ("vm_qemu_command", "vm", {"command": "query-status"}),
    ("disk_info", "disk", {}),
    ("disk_delete", "disk", {}),
    ("disk_resize", "disk", {"size": "1G"}),
    ("disk_attach", "vm", {"disk": "data"}),
    ("disk_detach", "vm", {"disk": "data"}),
    ("nic_add", "vm", {"network": "default"}),
    ("nic_delete", "vm", {"nic": 1}),
    ("network_info", "network", {}),
    ("network_delete", "network", {}),
    ("vm_create", "network", FINE),
]


@pytest.mark.parametrize(("method", "parameter", "others"), BY_KEY, ids=lambda value: named(value))
def test_an_unknown_id_or_name_is_not_found(
    box: Box, method: str, parameter: str, others: dict[str, Any]
) -> None:
    for key in KEYS:
        error = refusal(box, method, **{**others, parameter: key})
        assert (error.code, error.kind) == NOT_FOUND, key
        assert "-list" in error.data["hint"]
    for wrong in (None, True, 1.5, [], {}, [[1]]):
        error = refusal(box, method, **{**others, parameter: wrong})
        assert (error.code, error.kind) == INVALID, wrong
        assert parameter in error.message
    for huge in (1 << 63, 1 << 64, 10**40, -(10**40)):
        error = refusal(box, method, **{**others, parameter: huge})
        assert (error.code, error.kind) in (NOT_FOUND, INVALID), huge


BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    *(("vm_stop", {"timeout": value}) for value in (-1, 86401, 1e300, "30", None, True)),
    *(("vm_stop", {"force": value}) for value in (1, "yes", None)),
    *(("vm_wait", {"timeout": value}) for value in (-0.1, 1e300, "soon", [])),
    *(("vm_wait", {"state": value}) for value in ("", "asleep", 7, None, "a" * 9999)),
    *(("vm_wait", {"for": value}) for value in ("", "asleep", 7, "port", "port:0", "port:99999")),
    ("vm_wait", {"for": "ssh", "state": "STOPPED"}),
    *(("vm_log", {"lines": value}) for value in (0, -1, 1 << 62, "all", 1.5, None)),
    *(("vm_log", {"source": value}) for value in ("", "../../etc/passwd", 7, None)),
    *(("vm_qemu_command", {"command": value}) for value in (None, 7, [])),
    *(("vm_qemu_command", {"command": "stop", "arguments": value}) for value in ([], 7, "a=b")),
    *(("vm_set", {"autostart": value}) for value in (True, "", "sometimes", 1, [])),
    *(("vm_set", {"restart": value}) for value in (False, "", "yes", "a" * 9999, {})),
    *(("vm_set", {"protect": value}) for value in (1, "", "yes", [])),
    *(("vm_set", {"cpus": value}) for value in (0, 256, "2", 1.5, [])),
    *(("vm_set", {"mem_size": value}) for value in (0, -1, "", "much", 1.5, [])),
    *(("vm_set", {"name": value}) for value in ("", "7", "a/b", "a" * 64, 7)),
    *(("vm_set", {"network": value}) for value in (True, 1.5, {}, [], [None], ["default"] * 10)),
    *(("disk_attach", {"disk": value}) for value in (None, True, 1.5, [])),
    *(
        (method, {"wait": value})
        for method in ("vm_start", "vm_stop", "vm_restart", "vm_delete")
        for value in (1, "no", None, [])
    ),
    ("vm_qemu_command", {}),
    ("vm_rename", {}),
    ("vm_set", {}),
    ("vm_info", {"force": True}),
]


@pytest.mark.parametrize(("method", "params"), BAD_CALLS, ids=named)
def test_other_parameters_are_checked_as_well(
    box: Box, method: str, params: dict[str, Any]
) -> None:
    error = refusal(box, method, vm="web", **params)
    assert (error.code, error.kind) == INVALID
    assert all(name in error.message for name in list(params)[-1:])


@pytest.mark.parametrize("command", ["no-such", "ä", "a" * 100, "__class__"])
def test_a_command_qemu_does_not_know_is_its_to_refuse(box: Box, command: str) -> None:
    error = refusal(box, "vm_qemu_command", vm="web", command=command)
    assert (error.code, error.kind) == (10, "host_failure")


@pytest.mark.parametrize("command", ["", "a" * 101])
def test_a_command_that_can_be_none_of_qemus(box: Box, command: str) -> None:
    error = refusal(box, "vm_qemu_command", vm="web", command=command)
    assert (error.code, error.kind) == INVALID
    assert len(error.message) < 200


@pytest.mark.parametrize("method", ["daemon_info", "daemon_doctor", "vm_list", "template_list"])
def test_a_method_without_parameters_takes_none(box: Box, method: str) -> None:
    error = refusal(box, method, vm="web")
    assert (error.code, error.kind) == INVALID
    assert "vm" in error.message


# Jobs and events

JOB_METHODS = ("job_info", "job_wait", "job_cancel")


@pytest.mark.parametrize("method", JOB_METHODS)
def test_a_job_there_is_not_is_not_found(box: Box, method: str) -> None:
    for job in (999_999, 1 << 62, (1 << 63) - 1):
        error = refusal(box, method, job=job)
        assert (error.code, error.kind) == NOT_FOUND, job
        assert "job-list" in error.data["hint"]


@pytest.mark.parametrize("method", JOB_METHODS)
def test_what_can_be_no_jobs_number_is_refused(box: Box, method: str) -> None:
    for job in (0, -1, 1 << 63, 1 << 64, 10**40, "1", "", None, True, 1.5, [], {}):
        error = refusal(box, method, job=job)
        assert (error.code, error.kind) == INVALID, job
        assert "job" in error.message
    assert "job" in refusal(box, method).message
    assert refusal(box, method, job=1, vm="web").kind == "invalid_argument"


def test_a_job_that_has_ended_can_not_be_cancelled(box: Box) -> None:
    box.create("other")
    box.call("vm_delete", vm="other", force=True)
    job = box.call("job_wait", job=box.call("job_list", limit=1)[0]["id"])
    error = refusal(box, "job_cancel", job=job["id"])
    assert (error.code, error.kind) == (5, "invalid_state")
    assert "DONE" in error.message


BAD_LISTS: list[tuple[str, dict[str, Any]]] = [
    *(("job_list", {"limit": value}) for value in (0, -1, 10_001, 1 << 64, "9", None, True, 1.5)),
    *(("job_wait", {"job": 1, "timeout": value}) for value in (-1, 86401, "1", None, True)),
    *(("event_watch", {"limit": value}) for value in (0, -1, 10_001, "9", None, True)),
    *(("event_watch", {"since": value}) for value in (-1, 1 << 63, 10**40, "9", True, 1.5, [])),
    *(("event_watch", {"follow": value}) for value in (None, 1, "yes")),
]


@pytest.mark.parametrize(("method", "params"), BAD_LISTS, ids=named)
def test_a_parameter_of_a_list_out_of_range_is_refused(
    box: Box, method: str, params: dict[str, Any]
) -> None:
    error = refusal(box, method, **params)
    assert (error.code, error.kind) == INVALID
    assert list(params)[-1] in error.message


@pytest.mark.parametrize("method", ["template_build", "template_download"])
def test_waiting_for_a_template_is_a_yes_or_no(box: Box, method: str) -> None:
    error = refusal(box, method, template=IMAGE, wait="no")
    assert (error.code, error.kind) == INVALID
    assert "wait" in error.message


# The lines themselves

NO_JSON = [
    b"hello",
    b"{",
    b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1',
    b"\x00\xff\xfe",
    b"GET / HTTP/1.1",
    b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": NaN}, "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": Infinity}, "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": "\xff"}, "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": "\\ud800"}, "id": 1}',
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1, "params": '
    + b'{"a":' * 100_000
    + b"1"
    + b"}" * 100_001,
]


@pytest.mark.parametrize("line", NO_JSON, ids=lambda line: repr(line[:24]))
def test_a_line_that_is_no_json_is_answered_and_the_next_is_served(box: Box, line: bytes) -> None:
    with box.connect() as connection:
        answer = connection.ask(line)
        assert answer["id"] is None
        assert answer["error"]["code"] == -32700
        assert answer["error"]["data"]["kind"] == "parse_error"
        assert answer["error"]["message"].startswith("this line is no JSON")
        assert connection.call("vm_list")


NO_REQUEST = [
    b"null",
    b"7",
    b'"vm_list"',
    b"[]",
    b"{}",
    b'[{"jsonrpc": "2.0", "method": "vm_list", "id": 1}]',
    b'[{"jsonrpc": "2.0", "method": "vm_list", "id": 1}, {"jsonrpc": "2.0", "method": "x"}]',
    b'{"method": "vm_list", "id": 1}',
    b'{"jsonrpc": "1.0", "method": "vm_list", "id": 1}',
    b'{"jsonrpc": "2.0", "id": 1}',
    b'{"jsonrpc": "2.0", "method": 7, "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_list", "params": 7, "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_list", "params": "x", "id": 1}',
    b'{"jsonrpc": "2.0", "method": "vm_list", "id": {"a": 1}}',
    b'{"jsonrpc": "2.0", "method": "vm_list", "id": [1]}',
    b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1, "extra": 1}',
]


@pytest.mark.parametrize("line", NO_REQUEST, ids=lambda line: repr(line[:60]))
def test_what_is_no_request_is_answered_and_the_next_is_served(box: Box, line: bytes) -> None:
    with box.connect() as connection:
        answer = connection.ask(line)
        assert answer["error"]["code"] == -32600
        assert answer["error"]["data"]["kind"] == "invalid_request"
        assert answer["error"]["message"].startswith("this is no JSON-RPC 2.0 request")
        assert connection.call("vm_list")


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("vm_lst", "did you mean vm_list?"),
        ("vm-list", "did you mean vm_list?"),
        ("", "see: oscloudctl --help"),
        ("ä", "see: oscloudctl --help"),
        ("__init__", "see: oscloudctl --help"),
        ("x" * 100_000, "see: oscloudctl --help"),
    ],
    ids=named,
)
def test_an_unknown_method_is_named_and_the_nearest_given(box: Box, method: str, hint: str) -> None:
    error = refusal(box, method)
    assert (error.code, error.kind) == (-32601, "method_not_found")
    assert error.data["hint"] == hint


@pytest.mark.parametrize("params", [b'["web"]', b"[1, 2, 3]", b"[[]]"])
def test_positional_parameters_are_refused(box: Box, params: bytes) -> None:
    with box.connect() as line:
        request = b'{"jsonrpc": "2.0", "method": "vm_info", "params": %s, "id": 1}' % params
        error = line.ask(request)["error"]
    assert (error["code"], error["data"]["kind"]) == INVALID
    assert "named" in error["message"]


def test_a_line_at_the_limit_is_read_and_one_beyond_it_refused(box: Box) -> None:
    start, end = b'{"jsonrpc": "2.0", "method": "vm_info", "id": 1, "params": {"vm": "', b'"}}'
    filling = MIB - len(start) - len(end)
    with box.connect() as line:
        assert line.ask(start + b"a" * filling + end)["error"]["code"] == 3
        assert line.call("vm_list")
    with box.connect() as line:
        error = line.ask(start + b"a" * (filling + 1) + end)["error"]
        assert (error["code"], error["data"]["kind"]) == (-32600, "invalid_request")
        assert str(MIB) in error["message"]
        line.socket.shutdown(socket.SHUT_WR)
        assert line.at_end()


def test_a_line_without_an_end_is_refused_at_the_limit(box: Box) -> None:
    with box.connect() as line:
        line.send(b"a" * (MIB + 100_000))
        assert line.receive()["error"]["code"] == -32600


def test_a_client_that_hangs_up_in_the_middle_troubles_nobody(box: Box) -> None:
    for text in (b"", b'{"jsonrpc"', b'{"jsonrpc": "2.0", "method": "vm_list", "id": 1}\n' * 50):
        with box.connect() as line:
            line.send(text)
    assert box.call("vm_list")


def test_blank_lines_are_nothing_and_a_notification_has_no_answer(box: Box) -> None:
    with box.connect() as line:
        line.send(b"\n\r\n  \n" + b'{"jsonrpc": "2.0", "method": "vm_list"}\n')
        assert line.call("vm_info", vm="web")["name"] == "web"


def test_a_request_in_pieces_and_several_in_one_are_answered_in_order(box: Box) -> None:
    requests = [{"jsonrpc": "2.0", "method": "vm_list", "id": number} for number in range(50)]
    text = "".join(json.dumps(request) + "\n" for request in requests).encode()
    with box.connect() as line:
        for start in range(0, len(text), 7):
            line.send(text[start : start + 7])
        assert [line.receive()["id"] for _ in requests] == list(range(50))


def test_an_id_comes_back_as_it_was(box: Box) -> None:
    with box.connect() as line:
        for given in (0, -1, 1.5, "", "ä", "x" * 1000):
            request = {"jsonrpc": "2.0", "method": "vm_list", "id": given}
            assert line.ask(json.dumps(request).encode())["id"] == given


def test_a_thousand_connections_at_once_are_all_answered(box: Box) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    lines = []
    request = b'{"jsonrpc": "2.0", "method": "vm_info", "params": {"vm": "web"}, "id": 1}\n'
    try:
        for _ in range(1000):
            lines.append(box.connect())
        for line in lines:
            line.send(request)
        for line in lines:
            assert line.receive()["result"]["name"] == "web"
    finally:
        for line in lines:
            line.__exit__()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert box.call("vm_list")


def test_what_nobody_expected_is_an_incident_whose_story_is_in_the_log(box: Box) -> None:
    console_log = box.root / "log" / f"vm-{box.call('vm_info', vm='web')['id']}.console.log"
    kept = console_log.with_suffix(".kept")
    console_log.rename(kept)
    console_log.mkdir()
    try:
        error = refusal(box, "vm_log", vm="web")
    finally:
        console_log.rmdir()
        kept.rename(console_log)
    assert (error.code, error.kind) == (-32603, "internal")
    incident = error.data["incident"]
    assert incident in error.message
    assert incident in error.data["hint"]
    assert "directory" not in json.dumps([error.message, error.data])
    story = box.log().partition(f"incident {incident}")[2]
    assert "IsADirectoryError" in story


def test_passwords_and_keys_are_not_in_the_log(box: Box) -> None:
    refusal(box, "vm_create", **{**FINE, "name": "web", "password": "hunter2secret"})
    assert "hunter2secret" not in box.log()
