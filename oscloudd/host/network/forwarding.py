"""Whether this box passes packets on between its interfaces, by either family."""

from pathlib import Path

from oscloudd.errors import HostError

_SYSCTLS = Path("/proc/sys/net")
_FORWARDING = _SYSCTLS / "ipv4/ip_forward"
_INTERFACES6 = _SYSCTLS / "ipv6/conf"
_FORWARDING6 = _INTERFACES6 / "all/forwarding"


def has_ipv6() -> bool:
    """Tell whether interfaces of this box get IPv6 addresses, or it was switched off."""
    switch = _INTERFACES6 / "default/disable_ipv6"
    return switch.exists() and _read(switch) == "0"


def find_closed_sysctl() -> str | None:
    """Name a sysctl that keeps guests from the outside, and has to be 1; None without one."""
    if _read(_FORWARDING) != "1":
        return _name(_FORWARDING)
    if has_ipv6() and _read(_FORWARDING6) != "1":
        return _name(_FORWARDING6)
    return None


def ensure_forwarding() -> None:
    """Let this box pass IPv4 packets on between its interfaces."""
    if _read(_FORWARDING) != "1":
        _set(_FORWARDING, "1")


def ensure_forwarding6() -> None:
    """Let this box pass IPv6 packets on between its interfaces.

    Those that have taken their addresses and routes from a router's advertisements still do: where
    packets are passed on, the kernel does so for `accept_ra` 2 only, and forgets its routes at once
    otherwise (ip-sysctl.rst of the kernel).
    """
    if _read(_FORWARDING6) == "1":
        return
    for setting in sorted(_INTERFACES6.glob("*/accept_ra")):
        if _read(setting) == "1":
            _set(setting, "2")
    _set(_FORWARDING6, "1")


def _set(path: Path, value: str) -> None:
    try:
        path.write_text(value, encoding="ascii")
    except FileNotFoundError:  # an interface that has gone
        return
    except OSError as error:
        raise HostError(
            f"{path} can't be set to {value}: {error.strerror}",
            hint=f"guests need it to reach beyond this box: sysctl {_name(path)}={value}",
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""


def _name(path: Path) -> str:
    return str(path.relative_to(_SYSCTLS.parent)).replace("/", ".")
