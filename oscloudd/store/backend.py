"""What the database thread asks of a kind of database: SQLite (`sqlite`) or MariaDB (`mariadb`)."""

from enum import Enum
from typing import Any, Protocol


class Verdict(Enum):
    """What an error of a database means for the transaction it ended."""

    AGAIN = "the cause is gone: the same transaction may be run once more now"
    REFUSED = "this transaction was not done; others may be"
    AWAY = "the database does not answer at all"


class Backend(Protocol):
    """One database, used by the database thread only."""

    connection: Any  # the peewee database; it has one connection, as it has one thread
    shown: str  # where the database is, for people; never a password
    hint: str  # what to look at when it does not answer

    @property
    def begin(self) -> tuple[str, ...]:
        """Arguments of peewee's `atomic()`."""

    def prepare(self) -> None:
        """Connect and check; raises a peewee or sqlite3 error, or a CloudError that says more."""

    def keep_copy(self, version: int) -> None:
        """Keep what there is, of schema `version`, before a migration; durable when it returns."""

    def ready(self) -> None:
        """Go over from preparing to serving."""

    def judge(self, error: Exception) -> Verdict:
        """Say what `error` means, having done what can be done about its cause."""

    def unsettled(self) -> str | None:
        """Give the mark of a commit that was sent and never answered, once; None for none."""

    def was_committed(self, mark: str) -> bool:
        """Say whether that commit happened, in a transaction; waits until it is decided."""

    def refill(self) -> None:
        """Lay in again what a full disk made it give up; from any thread."""

    def close(self) -> None:
        """Disconnect; never raises for a database that is away."""
