"""The rules of the house: who may import whom, how large a room may be, and what linters say."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.lint

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("api", "cloud", "guest", "machine", "host", "store")
BELOW_ALL = {"oscloudd.config", "oscloudd.errors", "oscloudd.units"}
CONFINED = {
    "peewee": ("store", "cloud"),
    "pexpect": ("guest",),
    "jsonrpcserver": ("api",),
    "sdnotify": ("host",),
    "subprocess": ("host",),
}
# What is only there because systemd has started the daemon.
OF_SYSTEMD = {f"oscloudd.host.{name}" for name in ("activation", "journal", "notify")}
CHECKOUT_SCRIPTS = sorted(str(path) for path in (ROOT / "packaging/checkout").glob("*.py"))


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "oscloudd").parts[0]


def find_wrong_import(path: Path, imported: str) -> str | None:
    """Say what is wrong with a module of the daemon importing `imported`, or None."""
    room = room_of(path)
    top, _, rest = imported.partition(".")
    allowed = CONFINED.get(top)
    if allowed is not None and room not in allowed:
        return f"{top} belongs to {' and '.join(allowed)}"
    if imported in OF_SYSTEMD and room not in ("host", "main.py"):
        return "only host and main know systemd"
    if top == "oscloudctl":
        return "the daemon knows nothing of its clients"
    if top != "oscloudd" or imported in ("oscloudd", *BELOW_ALL) or room == "main.py":
        return None
    if room not in ROOMS:
        return None if room == "__main__.py" else "it stands below every room"
    target = rest.partition(".")[0]
    if ROOMS.index(target) < ROOMS.index(room):
        return f"{target} is left of {room}"
    return None


@pytest.mark.parametrize("path", modules("oscloudd"), ids=lambda path: str(path.relative_to(ROOT)))
def test_daemon_module_imports_only_to_the_right(path: Path) -> None:
    wrong = {name: find_wrong_import(path, name) for name in imports_of(path)}
    assert not {name: reason for name, reason in wrong.items() if reason}


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("host/images.py", "oscloudd.machine.qemu"),
        ("cloud/vms.py", "oscloudd.api.server"),
        ("machine/qemu.py", "peewee"),
        ("cloud/supervisor.py", "oscloudd.host.activation"),
        ("cloud/vms.py", "subprocess"),
        ("errors.py", "oscloudd.store.models"),
    ],
)
def test_rule_catches_an_import_to_the_left(module: str, imported: str) -> None:
    assert find_wrong_import(ROOT / "oscloudd" / module, imported)


def test_client_knows_only_the_errors_of_the_daemon() -> None:
    for path in modules("oscloudctl"):
        daemon = {name for name in imports_of(path) if name.partition(".")[0] == "oscloudd"}
        assert daemon <= {"oscloudd.errors"}, path


def test_modules_are_documented_and_none_is_crowded() -> None:
    for path in [*modules("oscloudd"), *modules("oscloudctl")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert text.count("\n") <= 500, path


def test_ruff_has_nothing_to_say() -> None:
    run_tool("ruff", "check", "--no-cache", ".")


def test_format_is_ruffs() -> None:
    run_tool("ruff", "format", "--no-cache", "--check", ".")


def test_types_hold() -> None:
    run_tool("mypy")
    run_tool("mypy", *CHECKOUT_SCRIPTS)


def run_tool(*argv: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
