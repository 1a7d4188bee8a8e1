"""The address of a database: `mysql://user:password@host:port/name?unix_socket=/path`.

No message shows any part of an address that could not be read: what looks like a port may well
be the end of a password whose `@` or `/` was not escaped.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from oscloudd.errors import InvalidArgumentError

_DEFAULT_PORT = 3306
_FORM = "mysql://user:password@host:port/name, with ?unix_socket=/path for a server on this host"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class MariaDbAddress:
    """Where a MariaDB database is and who asks; `str()` of it is for people, without password."""

    user: str
    password: str = field(repr=False)
    host: str
    port: int
    name: str
    unix_socket: str | None

    def __str__(self) -> str:
        server = self.unix_socket or f"{self.host}:{self.port}"
        return f"{self.name} at {server}"


def parse_address(url: str) -> MariaDbAddress:
    """Read an address; raises InvalidArgumentError naming the part that is wrong, never its text.

    User and password are percent-decoded. Host and port may be left out: 127.0.0.1 and 3306.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise _wrong("its host or port can't be read") from error
    if parts.scheme != "mysql" or not url.startswith("mysql://"):
        raise _wrong("it does not begin with mysql://")
    if not parts.username:
        raise _wrong("it names no user")
    name = parts.path.removeprefix("/")
    if not _NAME.fullmatch(name) or parts.fragment:
        raise _wrong("the database's name is not 1 to 64 letters, digits, _ and -")
    return MariaDbAddress(
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        host=parts.hostname or "127.0.0.1",
        port=port,
        name=name,
        unix_socket=_unix_socket(parts),
    )


def _unix_socket(parts: SplitResult) -> str | None:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not options and not parts.query:
        return None
    if set(options) != {"unix_socket"} or not options["unix_socket"].startswith("/"):
        raise _wrong("after ? there is only unix_socket=, with a path from the root")
    return options["unix_socket"]


def _wrong(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"database is not an address of a database: {reason}",
        hint=f"write it as {_FORM}, and @ : / % in user and password as %40 %3A %2F %25; "
        'or leave it "" for SQLite in state_dir',
    )
