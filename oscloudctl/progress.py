"""How far long work is, on standard error.

One line, redrawn each second so that the elapsed time moves, on a terminal; elsewhere a plain line
for each new stage or message. Owns the thread that redraws; the `with` block's end stops it.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

_REDRAW_SECONDS = 1.0
_CLEAR_LINE = "\r\x1b[K"

# Elsewhere than on a terminal a percentage is worth a new line only now and then.
_PLAIN_STEP = 0.1


class ProgressLine:
    """Shows progress notifications of one call; quiet until the first one comes."""

    def __init__(self, subject: str = "") -> None:
        self._subject = f"{subject}: " if subject else ""
        self._started = time.monotonic()
        self._redrawn = sys.stderr.isatty()
        self._text = ""
        self._shown: tuple[str, int] | None = None
        self._finished = threading.Event()
        self._drawing = threading.Lock()
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def __enter__(self) -> "ProgressLine":
        if self._redrawn:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finished.set()
        if self._redrawn:
            self._thread.join()
            if self._text:
                _write(_CLEAR_LINE)

    def show(self, params: dict[str, Any]) -> None:
        """Take one progress notification."""
        text = self._subject + describe(params)
        fraction = params.get("fraction")
        percent = "" if fraction is None else f" {fraction:.0%}"
        if self._redrawn:
            self._text = text + percent
            self._draw()
            return
        step = (text, -1 if fraction is None else int(fraction / _PLAIN_STEP))
        if step != self._shown:
            self._shown = step
            _write(f"{self._elapsed()} {text}{percent}\n")

    def _elapsed(self) -> str:
        return f"[{time.monotonic() - self._started:4.0f} s]"

    def _draw(self) -> None:
        with self._drawing:
            line = f"{self._elapsed()} {self._text}"
            _write(_CLEAR_LINE + line[: _columns() - 1])

    def _redraw(self) -> None:
        while not self._finished.wait(_REDRAW_SECONDS):
            if self._text:
                self._draw()


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
