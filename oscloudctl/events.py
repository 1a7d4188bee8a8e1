"""`events`: what happens, an event a line, across restarts of the daemon."""

import json
import time
from collections.abc import Callable
from typing import Any

import click

from oscloudctl.client import NotTheDaemonError
from oscloudctl.output import format_value, make_printable
from oscloudctl.reconnect import Patience
from oscloudctl.report import EXIT_INTERRUPTED
from oscloudctl.session import Session, pass_session, socket_option
from oscloudctl.vm import describe_state
from oscloudd.errors import DaemonUnreachableError, UnavailableError

Event = dict[str, Any]
Show = Callable[[Event], None]

# What `--no-follow` alone looks back: about five creates.
LAST_EVENTS = 100
_BATCH = 1000


@click.command("events")
@click.option(
    "--since", type=click.IntRange(min=0), metavar="N",
    help="Begin after event number N; 0 for all that are kept.  [default: those to come]",
)  # fmt: skip
@click.option(
    "--no-follow",
    is_flag=True,
    help=f"Stop after what there is; without --since the last {LAST_EVENTS}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
@socket_option
@pass_session
def events(session: Session, since: int | None, *, no_follow: bool, as_json: bool) -> int:
    """Print what happens, an event a line, until Ctrl-C.

    Each line has the time, the event's number, its kind, what it is about, and what changed. When
    the daemon restarts, it goes on where it was and misses nothing. Exits with 3 when events after
    N are no longer kept.
    """
    show = _show_json if as_json else _show_words
    try:
        if no_follow:
            _replay(session, since, show)
        else:
            _follow(session, since, show)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _follow(session: Session, since: int | None, show: Show) -> None:
    position, patience = since, Patience()
    while True:
        try:
            latest = _read_latest(session)
            patience.reached()
            position = latest if position is None else position
            params = {"since": position, "follow": True}
            for event in session.client.stream("event_watch", params):
                number = _sequence(session, event)
                show(event)
                position = number
            raise DaemonUnreachableError("the daemon has ended the stream of events")
        except (DaemonUnreachableError, UnavailableError) as error:
            patience.wait(error)


def _replay(session: Session, since: int | None, show: Show) -> None:
    latest = _read_latest(session)
    position = max(0, latest - LAST_EVENTS) if since is None else since
    before = None
    # Those that come meanwhile are not waited for.
    while before is None or before < position < latest:
        before = position
        params = {"since": position, "follow": False, "limit": _BATCH}
        for event in session.client.stream("event_watch", params):
            position = _sequence(session, event)
            show(event)


def _read_latest(session: Session) -> int:
    """Give the number of the newest event: where a watch begins that is to miss none."""
    answer = session.call("event_watch", follow=False, limit=1)
    return int(answer["latest"])


def _sequence(session: Session, event: Event) -> int:
    sequence = event.get("sequence")
    if not isinstance(sequence, int):
        path = session.client.socket_path
        raise NotTheDaemonError(f"what answers on {path} sends events without a number")
    return sequence


def _show_json(event: Event) -> None:
    click.echo(json.dumps(event, ensure_ascii=False))


def _show_words(event: Event) -> None:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(event.get("at") or 0))
    kind, name = event.get("kind") or "-", event.get("name") or "-"
    text = f"{at}  {event['sequence']}  {kind}  {name}  {describe(event)}"
    click.echo(make_printable(text).replace("\n", " "))


def describe(event: Event) -> str:
    """Say in words what an event tells."""
    data = event.get("data")
    data = data if isinstance(data, dict) else {}
    if event.get("kind") == "job":
        return _describe_job(event.get("job"), data)
    if event.get("kind") == "vm_state":
        return describe_state(data)
    if event.get("kind") == "disk":
        return f"{data.get('change')}: {format_value('size', data.get('size'))}"
    if event.get("kind") == "port":
        return f"port {data.get('port')} {data.get('change')}"
    return str(data.get("message") or json.dumps(data, ensure_ascii=False))


def _describe_job(job: Any, data: dict[str, Any]) -> str:
    state, stage = data.get("state"), data.get("stage")
    words = f"job {job} {data.get('kind')} {state}"
    if stage and state == "RUNNING":
        words += f", {stage}"
    return f"{words}: {data['message']}" if data.get("message") else words
