"""`oscloud-http`: the shim's process. Binds, serves, stops on SIGTERM; knows only the socket."""

import os
import signal
import socket
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import uvicorn

from oscloudctl.client import find_socket_path
from oscloudctl.http.app import build_app

DEFAULT_CONFIG = "/etc/oscloud/oscloud.toml"
DEFAULT_LISTEN = "127.0.0.1:5000"

# A create in progress goes on in the daemon; whoever waits for it here is told by the closing.
GRACE_SECONDS = 3
MAX_CONNECTIONS = 256
BACKLOG = 1024


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port` (`[::1]:5000` for IPv6); raise BadParameter for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, such as {DEFAULT_LISTEN}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_listen(config: str | None) -> str:
    """Give `[http] listen` of the configuration, or the default where there is none.

    The system's file may be unreadable for our user (it can hold a database password); one that
    was named has to be read.
    """
    path = config or os.environ.get("OSCLOUD_CONFIG")
    try:
        document = tomllib.loads(Path(path or DEFAULT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if path is None:
            return DEFAULT_LISTEN
        raise click.BadParameter(f"can't read the configuration {path}: {error}") from error
    section = document.get("http", {})
    listen = section.get("listen", DEFAULT_LISTEN) if isinstance(section, dict) else DEFAULT_LISTEN
    return str(listen)


def open_listener(host: str, port: int) -> socket.socket:
    """Listen on the address; raise ClickException saying which it was if that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise click.ClickException(f"can't listen on {host}:{port}: {error.strerror}") from error
    return listener


@click.command("oscloud-http")
@click.option("--listen", metavar="HOST:PORT", help=f"Else the configuration's, {DEFAULT_LISTEN}.")
@click.option("--socket", "socket_path", metavar="PATH", help="The daemon's, else $OSCLOUD_SOCKET.")
@click.option("--config", metavar="PATH", help="Else $OSCLOUD_CONFIG.")
def oscloud_http(listen: str | None, socket_path: str | None, config: str | None) -> None:
    """Serve the original teaching project's HTTP API in front of oscloudd."""
    host, port = parse_listen(listen or read_listen(config))
    listener = open_listener(host, port)
    signal.signal(signal.SIGTERM, _leave)
    bound = listener.getsockname()
    shown = f"[{bound[0]}]" if listener.family == socket.AF_INET6 else bound[0]
    click.echo(f"oscloud-http listens on http://{shown}:{bound[1]}", err=True)
    uvicorn.Server(
        uvicorn.Config(
            build_app(find_socket_path(socket_path), listen_host=host),
            lifespan="off", ws="none", http="h11", proxy_headers=False, server_header=False,
            limit_concurrency=MAX_CONNECTIONS, backlog=BACKLOG, log_level="info",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    ).run(sockets=[listener])  # fmt: skip


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    # uvicorn raises the signal again once it has stopped: that is an orderly end.
    sys.exit(0)


def main() -> NoReturn:
    """Be the program."""
    oscloud_http()
    sys.exit(0)
