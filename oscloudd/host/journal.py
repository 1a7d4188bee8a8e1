"""Log lines as the journal takes them: it knows the time itself, and a line's priority by a mark.

Elsewhere, in a file or on a terminal, lines carry time and level as words.
"""

import logging
import os

_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_JOURNAL = "%(name)s: %(message)s"

# sd-daemon(3): syslog's numbers in angle brackets at a line's beginning.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


class JournalFormatter(logging.Formatter):
    """Marks every line, since the journal makes an entry of each."""

    def __init__(self) -> None:
        super().__init__(_JOURNAL)

    def format(self, record: logging.LogRecord) -> str:
        """Give the record with the mark of its level before each line."""
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def choose_formatter(stream_fd: int) -> logging.Formatter:
    """Give the formatter for what is written to `stream_fd`."""
    status = os.fstat(stream_fd)
    # systemd.exec(5): what the journal's own end of our standard error is. A child of a service may
    # have its output elsewhere, and the variable still.
    if os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        return JournalFormatter()
    return logging.Formatter(_PLAIN)
