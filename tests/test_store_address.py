"""The address of a database, read and refused."""

from pathlib import Path

import pytest

from oscloudd.errors import InvalidArgumentError
from oscloudd.store.address import parse_address
from oscloudd.store.database import Database

SECRET = "s3cret"


def test_all_parts_of_an_address_are_read() -> None:
    address = parse_address("mysql://oscloud:p%40s%2Fs%3A%25@db.example:3307/my_cloud-1")
    assert (address.user, address.password) == ("oscloud", "p@s/s:%")
    assert (address.host, address.port, address.name) == ("db.example", 3307, "my_cloud-1")
    assert address.unix_socket is None


def test_host_port_and_password_may_be_left_out() -> None:
    address = parse_address("mysql://root@/oscloud?unix_socket=/run/mysqld/mysqld.sock")
    assert (address.password, address.host, address.port) == ("", "127.0.0.1", 3306)
    assert address.unix_socket == "/run/mysqld/mysqld.sock"
    assert str(address) == "oscloud at /run/mysqld/mysqld.sock"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"postgres://u:{SECRET}@host/name", "does not begin with mysql://"),
        (f"mysql:u:{SECRET}@host/name", "does not begin with mysql://"),
        ("sqlite:////var/lib/oscloud/oscloud.db", "does not begin with mysql://"),
        ("mysql", "does not begin with mysql://"),
        (f"mysql://:{SECRET}@host/name", "names no user"),
        ("mysql://host/name", "names no user"),
        (f"mysql://u:{SECRET}@host", "the database's name"),
        (f"mysql://u:{SECRET}@host/", "the database's name"),
        (f"mysql://u:{SECRET}@host/a/b", "the database's name"),
        (f"mysql://u:{SECRET}@host/a%60b", "the database's name"),
        (f"mysql://u:{SECRET}@host/{'n' * 65}", "the database's name"),
        (f"mysql://u:{SECRET}@host:port/name", "host or port"),
        (f"mysql://u:{SECRET}@host:99999/name", "host or port"),
        (f"mysql://u:a/{SECRET}@host/name", "host or port"),
        (f"mysql://u:{SECRET}@[::1/name", "host or port"),
        (f"mysql://u:{SECRET}@host/name?ssl=1", "unix_socket"),
        (f"mysql://u:{SECRET}@host/name?unix_socket=relative", "unix_socket"),
        (f"mysql://u:{SECRET}@host/name?unix_socket=/s&{SECRET}", "unix_socket"),
        (f"mysql://u:x#{SECRET}@host/name", "host or port"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_of_the_address_shown(url: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        Database(Path("/nowhere"), url)
    assert reason in refused.value.message
    assert refused.value.hint is not None
    assert "mysql://user:password@host:port/name" in refused.value.hint
    for text in (refused.value.message, refused.value.hint):
        assert SECRET not in text


def test_the_password_is_in_no_text_of_an_address() -> None:
    address = parse_address(f"mysql://u:{SECRET}@host/name")
    assert SECRET not in f"{address} {address!r}"
