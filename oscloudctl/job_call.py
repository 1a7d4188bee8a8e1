"""A call that begins a job or waits for one: its progress is shown, and Ctrl-C is about the job.

The first Ctrl-C cancels the job over a second connection and goes on waiting for the answer, the
second leaves the job to itself, and so does SIGTERM. Owns both signals for as long as the call.
"""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import click

from oscloudctl.client import Client, OnPiece
from oscloudctl.output import make_printable
from oscloudctl.progress import ProgressLine
from oscloudctl.session import Session
from oscloudctl.upload import Upload
from oscloudd.errors import CloudError, DaemonUnreachableError

# The daemon answers a connection that was shut down before it was used up; nobody waits longer.
_LAST_WORDS_SECONDS = 1.0


def call_job(
    session: Session,
    method: str,
    *,
    subject: str = "",
    silence_seconds: float | None = None,
    cancels: bool = True,
    upload: Upload | None = None,
    on_piece: OnPiece | None = None,
    **params: Any,
) -> Any:
    """Call `method`, showing progress, and give its answer; `subject` heads the progress line.

    `upload` is sent when the daemon asks for it, `on_piece` takes what it sends. With `cancels` the
    first Ctrl-C cancels the job.
    Raises what `Session.call` raises, and Exit when the user has left a job that goes on. After a
    Ctrl-C `session.interrupted` is true.
    """
    with ProgressLine(subject) as line:
        signals = _Signals(session, line, silence_seconds, cancels=cancels)
        signals.job = params.get("job")

        def on_progress(progress: dict[str, Any]) -> None:
            if isinstance(progress.get("job"), int):
                signals.job, signals.heard = progress["job"], True
            line.show(progress)

        try:
            with signals:
                answer = session.call(
                    method,
                    on_progress=on_progress,
                    timeout_seconds=silence_seconds,
                    upload=upload,
                    on_piece=on_piece,
                    **params,
                )
        except _LeftError as left:
            line.say(f"job {signals.job} goes on: oscloudctl job-wait {signals.job}")
            raise click.exceptions.Exit(128 + left.number) from left
        except DaemonUnreachableError as error:
            if signals.heard:
                error.hint = f"the next daemon goes on with it: oscloudctl job-wait {signals.job}"
            raise
        if signals.cancelling and not signals.refused:
            line.say(f"It was too late to cancel job {signals.job}: it is done.")
        return answer


def print_begun(jobs: list[dict[str, Any]]) -> None:
    """Tell of jobs that go on by themselves, and how to wait for them."""
    for job in jobs:
        click.echo(f"{describe_job(job)}: begun")
    click.echo(f"Next: oscloudctl job-wait {' '.join(str(job['id']) for job in jobs)}", err=True)


def describe_job(job: dict[str, Any]) -> str:
    """Name a job as the daemon's messages do."""
    return f"job {job['id']} ({job['kind']} {make_printable(job['target'])})"


class _LeftError(Exception):
    """The user does not wait any longer."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """SIGINT and SIGTERM during one call; a context manager that gives both back."""

    def __init__(
        self, session: Session, line: ProgressLine, silence_seconds: float | None, *, cancels: bool
    ) -> None:
        self.job: int | None = None
        self.heard = False
        self.cancelling = False
        self.refused = False
        self._session = session
        self._line = line
        self._silence_seconds = silence_seconds
        self._cancels = cancels
        self._ended = False
        # A handler may be interrupted by the next signal between any two of its steps. Taking the
        # lock is one, and a thread that is half started can't be joined.
        self._once = threading.Lock()
        self._starting = False
        self._left: int | None = None
        # A connection of its own: the first one waits for the answer.
        self._second = Client(session.client.socket_path)
        self._thread: threading.Thread | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            # A shell without job control starts what is in its background with SIGINT ignored.
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._handle)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A finger that is still on the keys must not end us in the middle of the last words.
        over = self.cancelling or isinstance(error, _LeftError)
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if over else before)
        self._ended = True
        if self._thread is not None:
            self._second.abort()
            self._thread.join(_LAST_WORDS_SECONDS)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # What is raised here ends the call. What is not leaves a recv() under way as it was: the
        # system call is taken up again when we return (PEP 475).
        if self.job is None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        if self._starting:
            self._left = number
            return
        if number != signal.SIGINT or not self._cancels or not self._once.acquire(blocking=False):
            raise _LeftError(number)
        self._starting = self.cancelling = self._session.interrupted = True
        # Not here: a stream must not be written to in the middle of another write to it.
        self._thread = threading.Thread(target=self._cancel, daemon=True)
        self._thread.start()
        self._starting = False
        if self._left is not None:
            raise _LeftError(self._left)

    def _cancel(self) -> None:
        job = self.job
        self._line.say(f"Cancelling job {job} … (Ctrl-C again leaves it running)")
        try:
            self._second.call("job_cancel", {"job": job}, timeout_seconds=self._silence_seconds)
        except CloudError as error:
            if not self._ended:
                self.refused = True
                self._line.say(f"It goes on: {error.message}. (Ctrl-C leaves it running)")
        finally:
            self._second.close()
