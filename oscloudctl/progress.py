"""How far long work is, on standard error.

One line, redrawn each second so that the elapsed time moves, on a terminal; elsewhere a plain line
for each new stage or message. Work that is done at once shows nothing. Owns the thread that
redraws; the `with` block's end stops it.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

_REDRAW_SECONDS = 1.0
_CLEAR_LINE = "\r\x1b[K"

# What is over sooner would only flash by on a terminal, and be noise in a script's log.
_QUICK_SECONDS = 0.3
_QUICK_PLAIN_SECONDS = 1.0

# Elsewhere than on a terminal a percentage is worth a new line only now and then.
_PLAIN_STEP = 0.1


class ProgressLine:
    """Shows progress notifications of one call; quiet until one comes and the call takes longer."""

    def __init__(self, subject: str = "") -> None:
        self._subject = f"{subject}: " if subject else ""
        self._started = time.monotonic()
        self._redrawn = sys.stderr.isatty()
        self._quick = True
        self._text = ""
        self._waiting: list[str] = []
        self._last_step: tuple[str, int] | None = None
        self._finished = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finished.set()
        # A signal may have ended the call before the thread was all there.
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        if self._redrawn and self._text and not self._quick:
            _write(_CLEAR_LINE)

    def show(self, params: dict[str, Any]) -> None:
        """Take one progress notification."""
        text = self._subject + describe(params)
        fraction: Any = params.get("fraction")
        known = isinstance(fraction, (int, float))
        with self._writing:
            self._text = text + (f" {fraction:.0%}" if known else "")
            step = (text, int(fraction / _PLAIN_STEP) if known else -1)
            if step != self._last_step:
                self._last_step = step
                self._waiting.append(f"{self._elapsed()} {self._text}\n")
            if not self._quick:
                self._draw()
        if self._thread is None:
            self._thread = threading.Thread(target=self._redraw, daemon=True)
            self._thread.start()

    def say(self, sentence: str) -> None:
        """Write a line that stays; any thread may."""
        with self._writing:
            _write(f"{_CLEAR_LINE if self._redrawn else ''}{sentence}\n")

    def _elapsed(self) -> str:
        return f"[{time.monotonic() - self._started:4.0f} s]"

    def _draw(self) -> None:
        """Write what is new; the lock is held."""
        if self._redrawn:
            line = f"{self._elapsed()} {self._text}"
            _write(_CLEAR_LINE + line[: _columns() - 1])
        else:
            _write("".join(self._waiting))
        self._waiting.clear()

    def _redraw(self) -> None:
        quick_seconds = _QUICK_SECONDS if self._redrawn else _QUICK_PLAIN_SECONDS
        wait = self._started + quick_seconds - time.monotonic()
        while not self._finished.wait(max(wait, 0)):
            with self._writing:
                self._quick = False
                self._draw()
            # A plain line is written by whoever brings it.
            wait = _REDRAW_SECONDS if self._redrawn else threading.TIMEOUT_MAX


def describe(params: dict[str, Any]) -> str:
    """Put the stage and the message of a notification into one line."""
    stage, message = str(params.get("stage") or ""), str(params.get("message") or "")
    words = f"{stage}: {message}" if stage and message and stage != message else message or stage
    return "".join(char if char.isprintable() else " " for char in words)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
