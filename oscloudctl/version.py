"""The version, as a command and as a value."""

import click


def read_version() -> str:
    """Give the version of the installed package, or of the checkout that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("oscloud")
    except PackageNotFoundError:
        return "(not installed)"


@click.command("version")
def version() -> None:
    """Print the version of this program."""
    click.echo(f"oscloudctl {read_version()}")
