"""The original API's shapes and words, as calls to the daemon: pure translation, no HTTP.

Owns which parameters were required, in which order they were missed, and what an error was called.
"""

from collections.abc import Callable
from typing import Any

from oscloudctl.client import Client
from oscloudd.errors import AlreadyExistsError, CloudError, InvalidArgumentError, NotFoundError

Body = dict[str, Any]

CREATE_REQUIRED = ("name", "image", "network", "mem_size", "disk_size")
CREATE_OPTIONAL = ("cpus", "ssh_key")
INFO_KEYS = ("disk_size", "id", "ip", "mem_size", "name", "network", "os", "state")

# What the original called our objects.
_NOUNS = {"template": "disk template"}

# The daemon bounds a boot and a stop itself; these only bound a daemon that hangs.
CREATE_SILENCE_SECONDS = 900.0
CHANGE_SILENCE_SECONDS = 300.0


def vm_list(client: Client, _body: Body) -> Any:
    """Give id and name of every vm."""
    return [{"id": vm["id"], "name": vm["name"]} for vm in client.call("vm_list")]


def vm_create(client: Client, body: Body) -> Any:
    """Make a vm and wait until it is ready, as the original did."""
    params = {key: _require(body, key) for key in CREATE_REQUIRED}
    params |= {key: body[key] for key in CREATE_OPTIONAL if body.get(key) not in (None, "")}
    if isinstance(params.get("cpus"), str) and params["cpus"].isdigit():
        params["cpus"] = int(params["cpus"])
    params["wait"] = "ready"
    vm = client.call("vm_create", params, timeout_seconds=CREATE_SILENCE_SECONDS)
    return {"id": vm["id"], "status": "ok"}


def vm_info(client: Client, body: Body) -> Any:
    """Give the eight keys the original had, and no others."""
    vm = client.call("vm_info", {"vm": _require_id(body)})
    return {key: vm.get(key) for key in INFO_KEYS}


def vm_start(client: Client, body: Body) -> Any:
    """Start a vm."""
    client.call("vm_start", {"vm": _require_id(body)}, timeout_seconds=CHANGE_SILENCE_SECONDS)
    return {"status": "ok"}


def vm_stop(client: Client, body: Body) -> Any:
    """Stop a vm."""
    client.call("vm_stop", {"vm": _require_id(body)}, timeout_seconds=CHANGE_SILENCE_SECONDS)
    return {"status": "ok"}


Operation = Callable[[Client, Body], Any]


def build_failure(message: str) -> dict[str, str]:
    """Give the one shape all errors have."""
    return {"status": "error", "error_msg": message}


def describe_error(error: CloudError) -> str:
    """Say what went wrong in the original's words where it had some, in ours elsewhere."""
    noun, name = error.details.get("object"), error.details.get("name")
    if noun is not None and name is not None:
        called = f'{_NOUNS.get(noun, noun)} "{name}"'
        if isinstance(error, NotFoundError):
            return f"{called} not found"
        if isinstance(error, AlreadyExistsError):
            return f"{called} already exists"
    return error.message


def _require(body: Body, key: str) -> Any:
    value = body.get(key)
    if value is None or value == "":
        raise InvalidArgumentError(f"VM {key} not provided")
    return value


def _require_id(body: Body) -> Any:
    value = _require(body, "id")
    # Eighteen digits fit 64 bits; a longer string can only be not found.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return value
