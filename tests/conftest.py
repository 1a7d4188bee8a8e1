"""Fixtures that more than one file of tests uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import Box
from daemon_zygote import ZygoteBox
from fake_qemu import install_fake_qemu
from mariadb_server import MariaDb, is_installed
from stub_daemon import StubDaemon

# Files whose boxes run once on SQLite and once on MariaDB; everybody else's on SQLite only.
ON_BOTH_DATABASES = {
    "test_rpc_events",
    "test_rpc_jobs",
    "test_rpc_policies",
    "test_rpc_ports",
    "test_rpc_recovery",
    "test_rpc_vm",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_kind" in metafunc.fixturenames and metafunc.module.__name__ in ON_BOTH_DATABASES:
        kinds = ["sqlite", "mariadb"]
        metafunc.parametrize("database_kind", kinds, indirect=True, scope="module")


@pytest.fixture(scope="session")
def fake_qemu_binary() -> Iterator[Path]:
    with install_fake_qemu() as path:
        yield path


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDb]:
    """A server for all tests; whoever ends or stops it has it running again afterwards."""
    if not is_installed():
        pytest.skip("mariadbd is not installed")
    server = MariaDb()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def database_kind(request: pytest.FixtureRequest) -> str:
    kind: str = getattr(request, "param", "sqlite")
    return kind


@pytest.fixture(scope="module")
def box_server(database_kind: str, request: pytest.FixtureRequest) -> MariaDb | None:
    """The server a box gets its database on; started for the first test that needs one."""
    return request.getfixturevalue("mariadb") if database_kind == "mariadb" else None


@pytest.fixture
def box(fake_qemu_binary: Path, box_server: MariaDb | None) -> Iterator[Box]:
    """A cloud of the test's own, its daemon running."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    yield from open_box(fake_qemu_binary, box_server)


@pytest.fixture(scope="module")
def shared_box(fake_qemu_binary: Path, box_server: MariaDb | None) -> Iterator[Box]:
    """A cloud for a file of tests that leave nothing in it."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    yield from open_box(fake_qemu_binary, box_server)


def open_box(binary: Path, server: MariaDb | None = None) -> Iterator[Box]:
    box = Box(binary, server)
    try:
        box.start()
        yield box
    finally:
        box.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    """Give a stand-in for the daemon that has no answers yet."""
    stub = StubDaemon(tmp_path / "sock")
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def zygote_box(fake_qemu_binary: Path) -> Iterator[ZygoteBox]:
    """Give a cloud to kill daemons in; what a failure leaves in it is not complained of."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    box = ZygoteBox(fake_qemu_binary)
    try:
        box.start()
        yield box
    except BaseException:
        box.discard()
        raise
    box.close()
