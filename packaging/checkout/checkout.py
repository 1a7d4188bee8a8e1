"""Where a checkout keeps what it makes, and the configuration its programs get.

Everything lies under `.run/` (and `.venv/`); removing both is as good as a fresh clone.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from stages import CheckoutError, say

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / ".run"
VENV = ROOT / ".venv"
CONFIG = RUN / "oscloud.toml"
SOCKET = RUN / "oscloudd.sock"
LOGS = RUN / "log"
KEY = RUN / "id_ed25519"
KNOWN_HOSTS = RUN / "known_hosts"
NAMESPACE_FILE = RUN / "netns"

_HEADER = """\
# Written by `make up`, which keeps your changes; they count from the next start on.
"""


def build_config(root: Path) -> str:
    """Give the configuration for a checkout at `root`."""
    # A JSON string of a path is a TOML string too.
    quoted = {
        "state_dir": root / ".run/state",
        "runtime_dir": root / ".run/run",
        "log_dir": root / ".run/log",
        "socket": root / ".run/oscloudd.sock",
    }
    lines = [f"{key} = {json.dumps(str(path))}" for key, path in quoted.items()]
    lines.append(f"template_dirs = [{json.dumps(str(root / 'templates'))}]")
    return _HEADER + "\n".join(lines) + '\n\n[http]\nlisten = "127.0.0.1:5000"\n'


def ensure_config() -> dict[str, Any]:
    """Give the configuration, written first where there is none or it names another checkout."""
    config = read_config()
    if config.get("state_dir") != str(RUN / "state"):
        if config:
            say(f"{CONFIG} was written for another place and is written anew")
        CONFIG.write_text(build_config(ROOT), encoding="utf-8")
        config = read_config()
    return config


def read_config() -> dict[str, Any]:
    """Give the configuration; an empty one where there is none."""
    try:
        return tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckoutError(f"{CONFIG}: {error}", "correct it, or remove it") from error


def read_listen(config: dict[str, Any]) -> tuple[str, int]:
    """Give the shim's address and port."""
    listen = str(config.get("http", {}).get("listen", "127.0.0.1:5000"))
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal():
        raise CheckoutError(f"{CONFIG}: [http] listen {listen!r} is not HOST:PORT")
    return host, int(port)


def read_namespace() -> str | None:
    """Give the namespace of the last `make up`, "" for the host's own, None if there was none."""
    try:
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
