"""The parameters of every method: names, types and defaults, checked before anything happens."""

import re
from typing import Any, Literal

import msgspec

from oscloudd.errors import InvalidArgumentError
from oscloudd.guest.readiness import Sign
from oscloudd.units import MAX_SIZE_BYTES, is_possible_id

Key = int | str
Autostart = Literal["no", "yes", "last-state"]
Restart = Literal["no", "on-failure", "always"]
_STATES = (
    "ready", "RUNNING", "STOPPED", "SUSPENDED", "PAUSED", "CRASHED", "UNRESPONSIVE", "ERROR",
)  # fmt: skip
_SIGNS = ("address", "ssh")
_SIGN_PORT = re.compile(r"port:([0-9]{1,5})", re.ASCII)
# An answer of ten thousand jobs has about 3 MiB.
_MAX_LIMIT = 10_000
_MAX_REASON_LENGTH = 240


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters; the base of all."""


class VmParams(Params, frozen=True):
    """A vm by id or name."""

    vm: Key


class DiskParams(Params, frozen=True):
    """A disk by id or name."""

    disk: Key


class DiskCreateParams(Params, frozen=True):
    """A new disk: of a size, on a template, or both."""

    name: str
    size: int | str | None = None
    template: str | None = None


class DiskResizeParams(DiskParams, frozen=True):
    """A disk and how large it is to become."""

    size: int | str


class VmDiskParams(VmParams, frozen=True):
    """A vm and a disk, each by id or name."""

    disk: Key


class DiskExportParams(DiskParams, frozen=True):
    """A disk, and the format it is sent in."""

    format: Literal["qcow2", "raw"] = "qcow2"


class NetworkParams(Params, frozen=True):
    """A network by id or name."""

    network: Key


class PortAddParams(VmParams, frozen=True):
    """A vm, and what leads to it: `[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|udp]`."""

    port: str


class PortListParams(Params, frozen=True):
    """A vm whose forwarded ports to list, or all."""

    vm: Key | None = None


class PortParams(Params, frozen=True):
    """A forwarded port by its host's side: `[ADDRESS:]HOSTPORT[/tcp|udp]`."""

    port: int | str


class NetworkCreateParams(Params, frozen=True):
    """What a new network is to be; `subnet` None is the next free one, `subnet6` a drawn one."""

    name: str
    subnet: str | None = None
    subnet6: str | None = None
    isolated: bool = False
    nat: bool = True
    dns: list[str] = []


class TemplateParams(Params, frozen=True):
    """A template by name."""

    template: str


class TemplateJobParams(TemplateParams, frozen=True):
    """A template by name, and whether to answer only when the job has ended."""

    wait: bool = True


class TemplateImportParams(Params, frozen=True):
    """An image to make a template of: from `url`, or `size` bytes, which the daemon asks for.

    With `pieces` the caller does not know how many, and sends it piece by piece. `file_name` is
    what the sender calls it; `sha256` may be a SHA512, too.
    """

    name: str
    url: str | None = None
    size: int | None = None
    pieces: bool = False
    file_name: str = ""
    sha256: str | None = None
    format: Literal["qcow2", "raw"] | None = None
    os: str = ""
    firmware: Literal["bios", "uefi"] = "bios"
    identity: Literal["cloud-init", "dhcp"] = "cloud-init"
    wait: bool = True


class TemplateWarmParams(TemplateJobParams, frozen=True):
    """A template, and the shape its warm image is made for."""

    mem_size: int | str = "1G"
    cpus: int = 1
    disk_size: int | str = "10G"


class VmCreateParams(Params, frozen=True):
    """What a new vm is to be; everything but its name has a default.

    It has a network card for each `network`, "NAME" or "NAME,ip=ADDRESS"; `ip` is the first one's.
    """

    name: str
    image: str | None = None
    network: Key | list[Key] = "default"
    mem_size: int | str = "1G"
    disk_size: int | str | None = None
    disk: Key | None = None
    cpus: int = 1
    ssh_key: str | list[str] = []
    ip: str | None = None
    password: str | None = None
    user_data: str = ""
    wait: Literal["ready", "started", "none"] = "ready"
    autostart: Autostart = "no"
    restart: Restart = "no"
    warm: Literal["auto", "off", "only"] | None = None
    publish: str | list[str] = []
    bandwidth: int | str | None = None


class NicAddParams(VmParams, frozen=True):
    """A vm, the network of its new card, and the card's address there."""

    network: Key
    ip: str | None = None


class NicDeleteParams(VmParams, frozen=True):
    """A vm and one of its cards, by its slot or by its network's name."""

    nic: Key


class VmCloneParams(VmParams, frozen=True):
    """A vm and what its clone is to be; what is left out is as the vm has it."""

    name: str
    snapshot: str | None = None
    mem_size: int | str | None = None
    disk_size: int | str | None = None
    cpus: int | None = None
    ip: str | None = None
    wait: Literal["ready", "started", "none"] = "ready"


class VmImportParams(Params, frozen=True):
    """An exported vm of `size` bytes, which the daemon asks for, and what is to be different.

    With `pieces` the caller does not know how many, and sends it piece by piece. `file_name` is
    what the sender calls it.
    """

    size: int | None = None
    pieces: bool = False
    file_name: str = ""
    name: str | None = None
    network: Key | None = None
    new_identity: bool = False


class VmPublishParams(VmParams, frozen=True):
    """A vm, the name of the template it becomes, and whether to answer only when it has."""

    template: str
    wait: bool = True


class VmSetParams(VmParams, frozen=True):
    """A vm and what is to be different about it; what is left out stays.

    A `bandwidth` of "none" takes the limit away. `network` is as in `vm_create`: all its cards.
    """

    name: str | None = None
    cpus: int | None = None
    mem_size: int | str | None = None
    autostart: Autostart | None = None
    restart: Restart | None = None
    bandwidth: int | str | None = None
    protect: bool | None = None
    network: Key | list[Key] | None = None


class VmStartParams(VmParams, frozen=True):
    """A vm, and whether to answer only when the job has ended."""

    wait: bool = True


class VmStopParams(VmStartParams, frozen=True):
    """How to stop a vm: `timeout` is how many seconds its guest gets to power off."""

    force: bool = False
    timeout: float = 30.0


class StopGuestsParams(Params, frozen=True):
    """How many seconds each guest gets to power off, all at once."""

    timeout: float = 60.0


class VmRenameParams(VmParams, frozen=True):
    """A vm and its new name."""

    name: str


class SnapshotCreateParams(VmParams, frozen=True):
    """A vm and what the snapshot of it is called."""

    name: str
    description: str = ""
    memory: bool = False
    wait: bool = True


class SnapshotParams(VmParams, frozen=True):
    """A vm and one of its snapshots."""

    snapshot: str
    wait: bool = True


class SnapshotRestoreParams(SnapshotParams, frozen=True):
    """With `force`, what the vm is doing is lost; with `disk_only`, the snapshot's memory is."""

    force: bool = False
    disk_only: bool = False


class VmWaitParams(VmParams, frozen=True):
    """A vm, what to wait for, and how many seconds.

    `for` takes what `state` does and signs of the guest: "address", "ssh", "port:80".
    """

    state: str = "ready"
    sign: str | None = msgspec.field(name="for", default=None)
    timeout: float = 60.0


class VmLogParams(VmParams, frozen=True):
    """A vm, which of its logs, and how many lines of it."""

    source: Literal["console", "qemu"] = "console"
    lines: int = 100


class VmQemuCommandParams(VmParams, frozen=True):
    """A vm, a QMP command, and its arguments."""

    command: str
    arguments: dict[str, Any] = {}


class JobListParams(Params, frozen=True):
    """How many jobs, the newest first."""

    limit: int = 100


class JobParams(Params, frozen=True):
    """A job by id."""

    job: int


class JobWaitParams(JobParams, frozen=True):
    """A job, and how many seconds to wait for its end."""

    timeout: float = 60.0


class EventWatchParams(Params, frozen=True):
    """The events after number `since` (null: those to come), and whether to go on for ever.

    `limit` is how many are sent at most where it does not go on.
    """

    since: int | None = None
    follow: bool = True
    limit: int = 1000


def convert_params(method: str, values: dict[str, Any], shape: type[Params]) -> Params:
    """Check `values` against `shape`; raises InvalidArgumentError naming the parameter."""
    try:
        return msgspec.convert(values, shape)
    except (msgspec.ValidationError, RecursionError) as error:
        names = ", ".join(field.name for field in msgspec.structs.fields(shape)) or "none"
        why = str(error).replace("`$.", "`").replace("Object ", "it ")
        if len(why) > _MAX_REASON_LENGTH:
            # It quotes the value, and says at its end which parameter has it.
            why = f"{why[: _MAX_REASON_LENGTH // 2]} … {why[-_MAX_REASON_LENGTH // 2 :]}"
        raise InvalidArgumentError(
            f"{method}: {why}",
            hint=f"its parameters are: {names}",
        ) from error


def check_seconds(value: float, *, parameter: str) -> float:
    """Give a number of seconds between 0 and a day; raises InvalidArgumentError."""
    if not 0 <= value <= 86400:
        raise InvalidArgumentError(
            f"{parameter} {value!r:.40} is not between 0 and 86400 seconds", parameter=parameter
        )
    return value


def check_job_id(value: int) -> int:
    """Give a number that a job can have; raises InvalidArgumentError."""
    if not is_possible_id(value):
        raise InvalidArgumentError(
            f"job {value!r:.40} is no job's number",
            hint="see: oscloudctl job-list",
            parameter="job",
        )
    return value


def check_limit(value: int) -> int:
    """Give a number of things to list, 1 to 10,000; raises InvalidArgumentError."""
    if not 1 <= value <= _MAX_LIMIT:
        raise InvalidArgumentError(
            f"limit {value!r:.40} is not between 1 and {_MAX_LIMIT}", parameter="limit"
        )
    return value


def check_since(value: int | None) -> int | None:
    """Give an event's number, 0 before the first; raises InvalidArgumentError."""
    if value is not None and not 0 <= value <= MAX_SIZE_BYTES:
        raise InvalidArgumentError(
            f"since {value!r:.40} is no event's number",
            hint="give the last number you have seen, 0 for all, or leave it out",
            parameter="since",
        )
    return value


def check_wait(params: VmWaitParams) -> str | Sign:
    """Give the state or the sign that is to be waited for; raises InvalidArgumentError."""
    if params.sign is None:
        return _check_state(params.state, "state")
    if params.state != "ready":
        raise InvalidArgumentError(
            "state and for exclude each other", hint="leave one out", parameter="for"
        )
    port = _SIGN_PORT.fullmatch(params.sign)
    if port is not None and 1 <= int(port[1]) <= 65535:
        return Sign("port", int(port[1]))
    return Sign(params.sign) if params.sign in _SIGNS else _check_state(params.sign, "for")


def _check_state(value: str, parameter: str) -> str:
    # Some letters beyond ASCII have a capital within it.
    state = value.upper() if value.isascii() and value != "ready" else value
    if state not in _STATES:
        known = _STATES if parameter == "state" else (*_SIGNS, "port:80", *_STATES)
        raise InvalidArgumentError(
            f"{parameter} {value!r:.60} can't be waited for",
            hint=f"one of: {', '.join(known)}",
            parameter=parameter,
        )
    return state
