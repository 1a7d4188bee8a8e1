"""Going on when the daemon was restarted: for a command that only looks, and has lost nothing."""

import time

import click

from oscloudctl.client import NotTheDaemonError
from oscloudd.errors import CloudError

# A restart takes seconds, also with many vms to adopt; an upgrade of the package a few more.
PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.2


class Patience:
    """How long the daemon has been away; says on standard error that it is, and that it is back."""

    def __init__(self) -> None:
        self._was_there = False
        self._away_since: float | None = None

    def reached(self) -> None:
        """Note that the daemon has answered."""
        if self._away_since is not None:
            click.echo("The daemon is back.", err=True)
        self._was_there, self._away_since = True, None

    def wait(self, error: CloudError) -> None:
        """Pause before another try; raises `error` where there is nothing to hope for.

        That is: it was never reached, it is another program, or it has been away for too long.
        """
        if isinstance(error, NotTheDaemonError) or not self._was_there:
            raise error
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            seconds = f"{PATIENCE_SECONDS:g} seconds"
            click.echo(f"{error.message}. Trying again for {seconds} …", err=True)
        if now - self._away_since >= PATIENCE_SECONDS:
            raise error
        time.sleep(_PAUSE_SECONDS)
