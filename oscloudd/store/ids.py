"""Which ids a table has given, and how to keep it from giving some.

Ids name directories and logs, so one must never be given twice, not even by a database that was
put back to an earlier copy.
"""

from peewee import SqliteDatabase

from oscloudd.store.models import Table, database_proxy


def highest_id_given(table: type[Table]) -> int:
    """Give the highest id the table has ever given, 0 for none; inside a transaction.

    An id given to a row that was rolled back counts on MariaDB and does not on SQLite, which
    gives it again.
    """
    if isinstance(database_proxy.obj, SqliteDatabase):
        found = _fetch("SELECT seq FROM sqlite_sequence WHERE name = ?", table._meta.table_name)
        return 0 if found is None else found
    found = _fetch(
        "SELECT auto_increment FROM information_schema.tables"
        " WHERE table_schema = DATABASE() AND table_name = %s",
        table._meta.table_name,
    )
    return 0 if found is None else found - 1


def never_give_up_to(table: type[Table], number: int) -> None:
    """Make every id the table gives from now on greater than `number`; never lowers anything.

    To be called in a transaction with nothing in it before: MariaDB commits one on ALTER TABLE,
    and what comes after is in a new one.
    """
    if number <= highest_id_given(table):
        return
    name = table._meta.table_name
    if isinstance(database_proxy.obj, SqliteDatabase):
        # The table of sequences has no UNIQUE, and no row of a table nothing was inserted into.
        database_proxy.execute_sql("DELETE FROM sqlite_sequence WHERE name = ?", (name,))
        database_proxy.execute_sql("INSERT INTO sqlite_sequence VALUES (?, ?)", (name, number))
    else:
        database_proxy.execute_sql(f"ALTER TABLE `{name}` AUTO_INCREMENT = {number + 1:d}")
        database_proxy.execute_sql("BEGIN")


def _fetch(query: str, value: str) -> int | None:
    row = database_proxy.execute_sql(query, (value,)).fetchone()
    return None if row is None or row[0] is None else int(row[0])
