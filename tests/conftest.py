"""Fixtures that more than one file of tests uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import Box
from fake_qemu import install_fake_qemu


@pytest.fixture(scope="session")
def fake_qemu_binary() -> Iterator[Path]:
    with install_fake_qemu() as path:
        yield path


@pytest.fixture
def box(fake_qemu_binary: Path) -> Iterator[Box]:
    """A cloud of the test's own, its daemon running."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    yield from open_box(fake_qemu_binary)


@pytest.fixture(scope="module")
def shared_box(fake_qemu_binary: Path) -> Iterator[Box]:
    """A cloud for a file of tests that leave nothing in it."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    yield from open_box(fake_qemu_binary)


def open_box(binary: Path) -> Iterator[Box]:
    box = Box(binary)
    try:
        box.start()
        yield box
    finally:
        box.close()
