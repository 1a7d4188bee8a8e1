"""Every way a request can fail, as one tree of exceptions.

An error is raised inside with a message, an optional hint and attributes; the edges turn it into
words and numbers: the socket into a JSON-RPC error (`code`, `data.kind`), `oscloudctl` into an exit
status, the HTTP shim into a status or the original's `error_msg`. Nothing else formats errors.

    CloudError
     ├── InvalidArgumentError     what was asked for makes no sense
     ├── NotFoundError            there is no such object
     ├── AlreadyExistsError       there is one of that name
     ├── InvalidStateError        not while it is in this state
     ├── InUseError               something else stands on it
     ├── PermissionDeniedError    not you
     ├── ExhaustedError           no addresses, memory or disk space left
     ├── OperationTimeoutError    it did not happen in time
     ├── HostError                a command, qemu or its monitor failed
     ├── CancelledJobError        somebody cancelled the job this call had begun
     ├── UnavailableError         the daemon is starting or stopping
     ├── InternalError            anything unexpected: an incident id, never the exception's text
     └── DaemonUnreachableError   nobody answers on the socket (raised by clients only)
"""

from typing import Any, ClassVar

# Codes of the JSON-RPC 2.0 specification, section 5.1.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

# sysexits.h EX_SOFTWARE: what `oscloudctl` exits with when the fault is in the program.
EXIT_SOFTWARE = 70


class CloudError(Exception):
    """A request failed for a reason its sender can be told.

    `message` says what was wrong and with which value, `hint` what would be right or what to do;
    `details` are JSON values for programs and become the other members of `error.data`.
    """

    kind: ClassVar[str]
    code: ClassVar[int]
    exit_status: ClassVar[int]
    http_status: ClassVar[int]

    def __init__(self, message: str, *, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def as_data(self) -> dict[str, Any]:
        """Give `error.data` of the JSON-RPC answer."""
        data = {"kind": self.kind, **self.details}
        return data if self.hint is None else {**data, "hint": self.hint}


class InvalidArgumentError(CloudError):
    """A parameter is missing, of the wrong type, or out of range."""

    kind, code, exit_status, http_status = "invalid_argument", INVALID_PARAMS, 2, 400


class NotFoundError(CloudError):
    """No object has this id or name."""

    kind, code, exit_status, http_status = "not_found", 3, 3, 404


class AlreadyExistsError(CloudError):
    """The name is taken."""

    kind, code, exit_status, http_status = "already_exists", 4, 4, 409


class InvalidStateError(CloudError):
    """The object is in a state in which this can't be done."""

    kind, code, exit_status, http_status = "invalid_state", 5, 5, 409


class InUseError(CloudError):
    """Another object stands on this one."""

    kind, code, exit_status, http_status = "in_use", 6, 6, 409


class PermissionDeniedError(CloudError):
    """The caller may not do this."""

    kind, code, exit_status, http_status = "permission_denied", 7, 7, 403


class ExhaustedError(CloudError):
    """No addresses, memory or disk space left; `details["resource"]` says which."""

    kind, code, exit_status, http_status = "exhausted", 8, 8, 503


class OperationTimeoutError(CloudError):
    """What was waited for did not happen in time."""

    kind, code, exit_status, http_status = "timeout", 9, 9, 504


class HostError(CloudError):
    """A command, qemu or its monitor failed; details carry argv, status and its last lines."""

    kind, code, exit_status, http_status = "host_failure", 10, 10, 500


class UnavailableError(CloudError):
    """The daemon can't answer this now: it is starting, stopping or overloaded."""

    kind, code, exit_status, http_status = "unavailable", 11, 11, 503


class CancelledJobError(CloudError):
    """The job this call had begun was cancelled, and what it had done is undone."""

    kind, code, exit_status, http_status = "cancelled", 13, 130, 409


class InternalError(CloudError):
    """Something nobody expected; the log has the story under the incident id."""

    kind, code, exit_status, http_status = "internal", INTERNAL_ERROR, EXIT_SOFTWARE, 500


class DaemonUnreachableError(CloudError):
    """Nobody answers on the daemon's socket. Raised by clients, never sent."""

    kind, code, exit_status, http_status = "unreachable", 12, 12, 502


ERRORS_BY_KIND: dict[str, type[CloudError]] = {
    error.kind: error for error in CloudError.__subclasses__()
}
