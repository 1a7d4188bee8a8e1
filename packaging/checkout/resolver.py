"""Name servers a namespace can reach, where the host's own are on its loopback."""

import contextlib
import ipaddress
from pathlib import Path

from stages import say

# systemd-resolved(8): the servers behind its stub on 127.0.0.53.
_BEHIND_THE_STUB = Path("/run/systemd/resolve/resolv.conf")


def write_resolver(name: str) -> None:
    """Write /etc/netns/NAME/resolv.conf, which `ip netns exec` puts over /etc/resolv.conf.

    Only where the host's own would not work in there: loopback is another one inside.
    """
    servers = find_servers(Path("/etc/resolv.conf"))
    if any(not _is_loopback(server) for server in servers):
        return
    reachable = [each for each in find_servers(_BEHIND_THE_STUB) if not _is_loopback(each)]
    if not reachable:
        say(f"Namespace {name}: the host's name server is on loopback and out of reach from inside;"
            f" put another into /etc/netns/{name}/resolv.conf")  # fmt: skip
        return
    directory = Path("/etc/netns", name)
    directory.mkdir(parents=True)
    lines = [f"nameserver {server}\n" for server in reachable]
    (directory / "resolv.conf").write_text("".join(lines), encoding="ascii")


def remove_resolver(name: str) -> None:
    """Undo `write_resolver`; a directory with files of others in it stays."""
    directory = Path("/etc/netns", name)
    (directory / "resolv.conf").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def find_servers(path: Path) -> list[str]:
    """Give the addresses on the nameserver lines of a resolv.conf; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [each[1] for each in words if len(each) > 1 and each[0] == "nameserver"]


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return False
