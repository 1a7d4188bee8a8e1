"""What the commands of a checkout print: plain lines, stages with the time they took, failures.

Knows nothing of what is done; imported by every other module here.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Shorter than this, a stage is no news.
SILENT_SECONDS = 1.0


class CheckoutError(Exception):
    """Something could not be done; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str) -> None:
    """Print one line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextmanager
def stage(label: str) -> Iterator[None]:
    """Say what is being done, and afterwards how long it took."""
    sys.stdout.write(f"{label} ... ")
    sys.stdout.flush()
    begin = time.monotonic()
    try:
        yield
    except BaseException:
        say("failed")
        raise
    seconds = time.monotonic() - begin
    say("done" if seconds < SILENT_SECONDS else f"{seconds:.0f} s")


def run(argv: Sequence[str], *, input_text: str | None = None) -> str:
    """Run a command and give its standard output; raise CheckoutError with its last line."""
    try:
        done = subprocess.run(
            argv, input=input_text or "", capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError as error:
        hint = "make up installs what is missing"
        raise CheckoutError(f"there is no command {argv[0]}", hint) from error
    except subprocess.TimeoutExpired as error:
        raise CheckoutError(f"{' '.join(argv)}: not done after 60 s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise CheckoutError(f"{' '.join(argv)}: {reason}")
    return done.stdout


def run_command(main: Callable[[], int]) -> int:
    """Run a program's main function; print a CheckoutError as the two lines every command has."""
    try:
        return main()
    except CheckoutError as error:
        sys.stderr.write(f"Error: {error}\n")
        if error.hint:
            sys.stderr.write(f"Hint: {error.hint}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
