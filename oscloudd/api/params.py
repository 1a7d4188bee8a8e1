"""The parameters of every method: names, types and defaults, checked before anything happens."""

from typing import Any, Literal

import msgspec

from oscloudd.errors import InvalidArgumentError

Key = int | str
_STATES = ("ready", "RUNNING", "STOPPED", "PAUSED", "CRASHED", "UNRESPONSIVE", "ERROR")


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters; the base of all."""


class VmParams(Params, frozen=True):
    """A vm by id or name."""

    vm: Key


class DiskParams(Params, frozen=True):
    """A disk by id or name."""

    disk: Key


class NetworkParams(Params, frozen=True):
    """A network by id or name."""

    network: Key


class TemplateParams(Params, frozen=True):
    """A template by name."""

    template: str


class VmCreateParams(Params, frozen=True):
    """What a new vm is to be; everything but its name has a default."""

    name: str
    image: str | None = None
    network: Key = "default"
    mem_size: int | str = "1G"
    disk_size: int | str = "10G"
    cpus: int = 1
    ssh_key: str | list[str] = []
    ip: str | None = None
    password: str | None = None
    user_data: str = ""
    wait: Literal["ready", "started", "none"] = "ready"


class VmStopParams(VmParams, frozen=True):
    """How to stop a vm: `timeout` is how many seconds its guest gets to power off."""

    force: bool = False
    timeout: float = 30.0


class VmRenameParams(VmParams, frozen=True):
    """A vm and its new name."""

    name: str


class VmWaitParams(VmParams, frozen=True):
    """A vm, what to wait for, and how many seconds."""

    state: str = "ready"
    timeout: float = 60.0


class VmLogParams(VmParams, frozen=True):
    """A vm, which of its logs, and how many lines of it."""

    source: Literal["console", "qemu"] = "console"
    lines: int = 100


class VmQemuCommandParams(VmParams, frozen=True):
    """A vm, a QMP command, and its arguments."""

    command: str
    arguments: dict[str, Any] = {}


def convert_params(method: str, values: dict[str, Any], shape: type[Params]) -> Params:
    """Check `values` against `shape`; raises InvalidArgumentError naming the parameter."""
    try:
        return msgspec.convert(values, shape)
    except (msgspec.ValidationError, RecursionError) as error:
        names = ", ".join(field.name for field in msgspec.structs.fields(shape)) or "none"
        raise InvalidArgumentError(
            f"{method}: {error}".replace("`$.", "`").replace("Object ", "it "),
            hint=f"its parameters are: {names}",
        ) from error


def check_seconds(value: float, *, parameter: str) -> float:
    """Give a number of seconds between 0 and a day; raises InvalidArgumentError."""
    if not 0 <= value <= 86400:
        raise InvalidArgumentError(
            f"{parameter} {value!r:.40} is not between 0 and 86400 seconds", parameter=parameter
        )
    return value


def check_wait_state(value: str) -> str:
    """Give a state that can be waited for; raises InvalidArgumentError."""
    # Some letters beyond ASCII have a capital within it.
    state = value.upper() if value.isascii() and value != "ready" else value
    if state not in _STATES:
        raise InvalidArgumentError(
            f"state {value!r:.60} can't be waited for",
            hint=f"one of: {', '.join(_STATES)}",
            parameter="state",
        )
    return state
