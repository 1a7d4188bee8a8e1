"""Who may talk to the shim at all: no foreign Host, no foreign Origin.

There is no password on loopback, so a web page must not be able to reach it: neither with a request
of its own (its Origin tells) nor under a name that was pointed at 127.0.0.1 (its Host tells).
"""

import ipaddress

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from oscloudctl.http.answers import answer_failure

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """Lets through what is addressed to us by a name of ours; refuses the rest with a reason."""

    def __init__(self, app: ASGIApp, *, listen_host: str) -> None:
        self._app = app
        self._hosts = LOOPBACK_HOSTS | {listen_host}
        self._wildcard = _is_wildcard(listen_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = self._refuse(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, headers: Headers) -> Response | None:
        host = headers.get("host")
        if host is not None and not self._is_ours(strip_port(host)):
            return answer_failure(421, f"host {host!r:.80} is not served here")
        origin = headers.get("origin")
        if origin is not None and (host is None or origin.lower() != f"http://{host.lower()}"):
            return answer_failure(403, f"origin {origin!r:.80} may not use this API")
        return None

    def _is_ours(self, name: str) -> bool:
        # Bound to every address, we can't know them all; a rebound name is never a literal one.
        return name in self._hosts or (self._wildcard and _is_address(name))


def strip_port(host: str) -> str:
    """Give the host of a Host header, lower case, without its port or brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_wildcard(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified
