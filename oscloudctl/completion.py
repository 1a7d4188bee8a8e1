"""The completion scripts of bash, zsh and fish, by click."""

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash: eval "$(oscloudctl completion bash)"; put that line into ~/.bashrc to keep it.
    """
    from click.shell_completion import get_completion_class

    from oscloudctl.main import oscloudctl

    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(script(oscloudctl, {}, "oscloudctl", "_OSCLOUDCTL_COMPLETE").source())
