"""What all commands share: the daemon's socket, the common options, names to complete.

Owns the one connection of a command. How an answer is written is output.py's business.
"""

from collections.abc import Callable
from math import isnan
from typing import Any, TypeVar

import click

from oscloudctl.client import Client, OnPiece, OnProgress, find_socket_path
from oscloudctl.upload import Upload
from oscloudd.errors import CloudError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# A name to complete is not worth waiting for.
COMPLETION_TIMEOUT_SECONDS = 2.0


class Session:
    """One run of a command; connects when the first call is made."""

    def __init__(self, socket_path: str | None = None) -> None:
        # Set by a Ctrl-C that was about a job: what was still to be done is left undone.
        self.interrupted = False
        self.client = Client(find_socket_path(socket_path))

    def use_socket(self, socket_path: str) -> None:
        """Talk to another socket from now on."""
        self.client.close()
        self.client = Client(socket_path)

    def call(
        self,
        method: str,
        *,
        on_progress: OnProgress | None = None,
        timeout_seconds: float | None = None,
        upload: Upload | None = None,
        on_piece: OnPiece | None = None,
        **params: Any,
    ) -> Any:
        """Call the daemon; parameters that are None are left to its defaults."""
        given = {name: value for name, value in params.items() if value is not None}
        return self.client.call(
            method,
            given,
            on_progress=on_progress,
            timeout_seconds=timeout_seconds,
            upload=upload,
            on_piece=on_piece,
        )


pass_session = click.make_pass_decorator(Session, ensure=True)


def parse_target(text: str) -> int | str:
    """Read an id or a name as typed: a name is never all digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text


def socket_option(function: Decorated) -> Decorated:
    """Add `--socket`, which every command takes behind its name too."""

    def use(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(Session).use_socket(value)

    return click.option(
        "--socket", metavar="PATH", expose_value=False, callback=use, is_eager=True,
        help="The daemon's socket.  [default: $OSCLOUD_SOCKET or /run/oscloud/oscloudd.sock]",
    )(function)  # fmt: skip


def json_option(function: Decorated) -> Decorated:
    """Add `--json`, the answer as the daemon gave it."""
    return click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")(
        function
    )


def no_wait_option(function: Decorated) -> Decorated:
    """Add `--no-wait`, which leaves the job to itself as soon as it has begun."""
    return click.option(
        "--no-wait", is_flag=True, help="Come back at once, with the job that does it."
    )(function)


def output_options(function: Decorated) -> Decorated:
    """Add `--json` and `-q`."""
    quiet = click.option("-q", "--quiet", "ids_only", is_flag=True, help="Print ids only.")
    return json_option(quiet(function))


def complete_from(
    method: str, **params: Any
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Give a completer that offers the names a list method answers, asked with `params`."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        root_socket = ctx.find_root().params.get("socket")
        session = ctx.find_object(Session) or Session(root_socket)
        try:
            rows = session.call(method, timeout_seconds=COMPLETION_TIMEOUT_SECONDS, **params)
        except CloudError:
            return []
        words = [str(row["name"]) for row in rows]
        # Ids are offered to those who started typing one.
        words += [str(row["id"]) for row in rows if incomplete.isdigit() and "id" in row]
        return [word for word in words if word.startswith(incomplete)]

    return complete


complete_vms = complete_from("vm_list")


def vm_argument(function: Decorated) -> Decorated:
    """Add the argument VM: one id or name."""
    return click.argument("vm", metavar="VM", shell_complete=complete_vms)(function)


def timeout_option(default: float, what: str) -> Callable[[Decorated], Decorated]:
    """Add `--timeout`, in seconds."""

    def whole(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
        if isnan(value):  # which no range keeps out
            raise click.BadParameter("nan is no number of seconds")
        return int(value) if value.is_integer() else value

    return click.option(
        "--timeout", type=click.FloatRange(min=0, max=86400), default=default, show_default=True,
        metavar="SECONDS", help=what, callback=whole,
    )  # fmt: skip
