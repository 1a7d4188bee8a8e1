"""`oscloudctl`: finds the command, runs it, turns errors into words and exit statuses.

Loads a command's module only when it is the one asked for.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from oscloudctl.catalogue import COMMANDS
from oscloudctl.report import EXIT_INTERRUPTED, Hinted, report
from oscloudctl.session import Session
from oscloudd.errors import EXIT_SOFTWARE, CloudError


class LazyGroup(click.Group):
    """The commands of the catalogue, imported one by one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give all names in the catalogue's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or give None where there is none of this name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = import_module(f"oscloudctl.{entry.module}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first word; tell who mistyped it what it is called here."""
        if args and args[0] not in COMMANDS and not ctx.resilient_parsing:
            from oscloudctl.suggestion import suggest_command

            error = click.UsageError(f"there is no command {args[0]!r}")
            raise Hinted(error, suggest_command(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview, by kind of object, without importing the commands."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, entry in COMMANDS.items():
            sections.setdefault(entry.section, []).append((name, entry.summary))
        width = max(map(len, COMMANDS))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), summary) for name, summary in rows])


def _print_version(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from oscloudctl.version import read_version

        click.echo(f"oscloudctl {read_version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--socket", metavar="PATH", help="The daemon's socket, else $OSCLOUD_SOCKET.")
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Print the version and leave.",
)  # fmt: skip
@click.pass_context
def oscloudctl(ctx: click.Context, socket: str | None) -> None:
    """Virtual machines on your own Linux box.

    First steps: `oscloudctl vm-create web`, then `oscloudctl vm-ssh web`. VM, DISK and the like are
    ids or names. Each command has its own --help.
    """
    ctx.obj = Session(socket)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and give its exit status."""
    try:
        result = oscloudctl.main(arguments, prog_name="oscloudctl", standalone_mode=False)
    except (CloudError, click.ClickException) as error:
        return report(error)
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return EXIT_INTERRUPTED
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except Exception as error:
        if os.environ.get("OSCLOUD_DEBUG"):
            raise
        click.echo(f"Error: oscloudctl failed: {type(error).__name__}: {error}", err=True)
        click.echo("Hint: OSCLOUD_DEBUG=1 shows where; please report it", err=True)
        return EXIT_SOFTWARE
    return result if isinstance(result, int) else 0


def main() -> NoReturn:
    """Be the program."""
    try:
        status = run()
    except KeyboardInterrupt:  # in the middle of the last words
        status = EXIT_INTERRUPTED
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # As an exception it would find nobody, and show a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
