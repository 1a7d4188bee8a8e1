"""Errors as people read them: `Error: …` and `Hint: …` on standard error."""

import click

from oscloudctl.output import make_printable
from oscloudd.errors import CloudError

# 128 + SIGINT, what a shell reports for a command that Ctrl-C ended.
EXIT_INTERRUPTED = 130


class Hinted(click.UsageError):
    """A usage error with a hint of its own."""

    def __init__(self, error: click.UsageError, hint: str) -> None:
        super().__init__(error.message, error.ctx)
        self.hint = hint


def report(error: CloudError | click.ClickException) -> int:
    """Write an error for people, on standard error; give its exit status."""
    if isinstance(error, CloudError):
        message, hint, status = error.message, error.hint, error.exit_status
    else:
        message, hint, status = error.format_message(), _usage_hint(error), error.exit_code
    # An error of the daemon may have a guest's words in it.
    click.echo(f"Error: {make_printable(message)}", err=True)
    if hint:
        click.echo(f"Hint: {make_printable(hint)}", err=True)
    return status


def _usage_hint(error: click.ClickException) -> str | None:
    if isinstance(error, Hinted):
        return error.hint
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"how it is used: {error.ctx.command_path} --help"
    return None
