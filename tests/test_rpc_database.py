"""A daemon whose database goes away, comes back, or is damaged; its qemus never notice."""

import concurrent.futures
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_process import LIMIT_SECONDS, Box, RpcError
from mariadb_server import MariaDb

VMS = ("web", "shop", "mail")


@pytest.fixture
def mariadb_box(fake_qemu_binary: Path, mariadb: MariaDb) -> Iterator[Box]:
    """A cloud on MariaDB; its server runs again when the cloud is closed."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    box = Box(fake_qemu_binary, mariadb)
    try:
        box.start()
        yield box
    finally:
        mariadb.send_signal(signal.SIGCONT)
        box.close()


def states(box: Box) -> dict[str, str]:
    return {vm["name"]: vm["state"] for vm in box.call("vm_list")}


def refusal(box: Box) -> RpcError:
    with pytest.raises(RpcError) as refused:
        box.call("vm_list")
    return refused.value


def assert_says_what_to_look_at(error: RpcError, box: Box) -> None:
    assert (error.kind, error.code) == ("unavailable", 11)
    assert box.database in error.message
    assert "look whether the server runs" in error.data["hint"]


def test_a_server_that_hangs_and_comes_back_loses_nothing(
    mariadb_box: Box, mariadb: MariaDb
) -> None:
    box = mariadb_box
    vms = [box.create(name) for name in VMS]
    mariadb.send_signal(signal.SIGSTOP)
    try:
        # A crowd gets its answers together, not one after another's wait.
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            errors = list(pool.map(lambda _: refusal(box), range(10)))
        for error in errors:
            assert_says_what_to_look_at(error, box)
        assert sorted(box.qemus()) == sorted(vm["pid"] for vm in vms)
        os.kill(vms[1]["pid"], signal.SIGKILL)
        box.until(lambda: len(box.qemus()) == 2, "the end of one qemu")
    finally:
        mariadb.send_signal(signal.SIGCONT)
    box.until(lambda: answers(box), "an answer")
    box.wait("shop", "CRASHED")
    assert states(box) == {"web": "RUNNING", "shop": "CRASHED", "mail": "RUNNING"}
    assert sorted(box.qemus()) == sorted([vms[0]["pid"], vms[2]["pid"]])
    assert box.call("vm_start", vm="shop")["state"] == "RUNNING"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_ended_and_started_again_loses_nothing(
    mariadb_box: Box, mariadb: MariaDb, number: int
) -> None:
    box = mariadb_box
    vms = [box.create(name) for name in VMS]
    mariadb.end(number)
    try:
        assert_says_what_to_look_at(refusal(box), box)
        os.kill(vms[1]["pid"], signal.SIGKILL)
        box.until(lambda: len(box.qemus()) == 2, "the end of one qemu")
        with pytest.raises(RpcError) as refused:
            box.create("late")
        assert refused.value.kind == "unavailable"
        assert sorted(box.qemus()) == sorted([vms[0]["pid"], vms[2]["pid"]])
    finally:
        mariadb.start()
    box.wait("shop", "CRASHED")
    assert states(box) == {"web": "RUNNING", "shop": "CRASHED", "mail": "RUNNING"}
    assert box.call("vm_stop", vm="web")["reason"] == "stopped by the user"
    assert box.create("late")["state"] == "RUNNING"


def test_a_daemon_ended_while_its_server_is_away_leaves_its_vms(
    mariadb_box: Box, mariadb: MariaDb
) -> None:
    box = mariadb_box
    vm = box.create("web")
    mariadb.end(signal.SIGKILL)
    try:
        assert box.end(signal.SIGTERM) == 0
        assert box.qemus() == [vm["pid"]]
        early = box.spawn()
        assert early.wait(LIMIT_SECONDS) == 11
        assert "look whether the server runs" in box.log()
        assert box.qemus() == [vm["pid"]]
    finally:
        mariadb.start()
    box.start()
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]


def answers(box: Box) -> bool:
    try:
        box.call("vm_list")
    except RpcError as error:
        if error.kind == "unavailable":
            return False
        raise
    return True


def test_a_damaged_file_stops_the_daemon_and_no_vm(box: Box) -> None:
    vm = box.create("web")
    box.end(signal.SIGKILL)
    path = box.root / "state" / "oscloud.db"
    files = {each: each.read_bytes() for each in path.parent.glob("oscloud.db*")}
    for each in files:
        each.write_bytes(b"\xa5" * 65536)
    damaged = box.spawn()
    assert damaged.wait(LIMIT_SECONDS) == 10
    last = [line for line in box.log().splitlines() if "ERROR" in line][-1]
    assert str(path) in last
    assert "running vms are left alone" in last
    assert path.read_bytes() == b"\xa5" * 65536
    assert box.qemus() == [vm["pid"]]
    for each, content in files.items():
        each.write_bytes(content)
    box.start()
    assert box.call("vm_info", vm="web")["pid"] == vm["pid"]


@pytest.mark.parametrize("url", ["postgres://u:s3cret@h/n", "mysql://u:s3/cret@h/n"])
def test_an_address_that_can_not_be_read_is_refused_without_its_password(
    box: Box, url: str
) -> None:
    assert box.end() == 0
    config = box.root / "oscloud.toml"
    text = config.read_text()
    config.write_text(text.replace('database = ""', f'database = "{url}"'))
    refused = box.spawn()
    assert refused.wait(LIMIT_SECONDS) == 2
    assert "mysql://user:password@host:port/name" in box.log()
    assert "cret" not in box.log()
    config.write_text(text)
    box.start()


def test_what_is_stored_is_the_same_in_both(box: Box, mariadb_box: Box) -> None:
    """The same life of a vm leaves the same rows, whichever database keeps them."""
    stored = [rows_of_a_life(each) for each in (box, mariadb_box)]
    assert stored[0] == stored[1]


def rows_of_a_life(box: Box) -> list[Any]:
    box.create("web")
    box.call("vm_stop", vm="web")
    return [
        box.rows("SELECT id, name, state, wanted_state, reason, ready, identified FROM vm"),
        box.rows("SELECT owner_uid, cpus, mem_size, ip, tap_interface_idx FROM vm"),
        box.rows("SELECT id, size, template_name FROM disk"),
        box.rows("SELECT id, state, target, vm_id, attempts FROM job WHERE kind = 'vm_stop'"),
        box.rows("SELECT kind, name, vm_id FROM event ORDER BY id")[:1],
    ]


def test_a_second_daemon_on_the_same_database_refuses_and_touches_nothing(
    mariadb_box: Box, fake_qemu_binary: Path, mariadb: MariaDb
) -> None:
    vm = mariadb_box.create("web")
    other = Box(fake_qemu_binary)
    try:
        config = other.root / "oscloud.toml"
        url = mariadb.url(mariadb_box.database)
        config.write_text(config.read_text().replace('database = ""', f'database = "{url}"'))
        second = other.spawn()
        assert second.wait(LIMIT_SECONDS) == 11
        assert "another oscloudd uses the database" in other.log()
        config.write_text(config.read_text().replace(f'database = "{url}"', 'database = ""'))
        assert mariadb_box.call("vm_info", vm="web")["pid"] == vm["pid"]
        assert mariadb_box.call("vm_stop", vm="web", force=True)["state"] == "STOPPED"
    finally:
        other.close()
