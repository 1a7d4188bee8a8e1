"""What the package says of the program, against the program: versions, defaults, manual pages."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from oscloudd.config import Config

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ROOT / "packaging/debian"
UNITS = sorted((ROOT / "systemd").iterdir())


def read_keys(document: dict[str, Any], prefix: str = "") -> set[str]:
    """Give the keys of a configuration, those of sections as "section.key"."""
    keys: set[str] = set()
    for key, value in document.items():
        keys |= read_keys(value, f"{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
    return keys


def test_the_package_has_the_programs_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changelog = (DEBIAN / "changelog").read_text()
    assert re.match(r"oscloud \((.+?)\)", changelog)[1] == project["version"]  # type: ignore[index]


def test_what_the_configuration_shows_are_the_defaults() -> None:
    text = (DEBIAN / "oscloud.toml").read_text()
    shown = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    document = tomllib.loads(shown)
    assert msgspec.convert(document, Config) == Config()
    sections = {key for key, value in document.items() if isinstance(value, dict)}
    assert tomllib.loads(text) == {section: {} for section in sections}
    # The socket is systemd's, and whose it is, too.
    defaults = read_keys(msgspec.to_builtins(Config()))
    assert defaults - read_keys(document) == {"socket", "socket_group"}


def test_the_manual_has_every_key() -> None:
    page = (DEBIAN / "man/oscloud.toml.5").read_text()
    for key in read_keys(msgspec.to_builtins(Config())):
        assert key.rpartition(".")[2] in page, key


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_every_unit_is_installed(unit: Path) -> None:
    assert f"systemd/{unit.name} lib/systemd/system" in (DEBIAN / "oscloud.install").read_text()


def test_packages_are_named_that_are_run() -> None:
    """What `make up` installs for the daemon to run, the package depends on."""
    install = (ROOT / "packaging/checkout/install").read_text()
    wanted = set(re.search(r"^packages=\((.+?)\)", install, re.S | re.M)[1].split())  # type: ignore[index]
    # The checkout's own tools, and what every Debian has.
    wanted -= {"curl", "python3-venv", "util-linux", "systemd"}
    depends = re.search(
        r"^Depends:(.+?)^Description", (DEBIAN / "control").read_text(), re.S | re.M
    )
    assert depends is not None
    assert wanted <= set(re.findall(r"[a-z0-9.-]+", depends[1]))
