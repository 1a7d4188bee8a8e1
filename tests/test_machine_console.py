"""The serial console: fan-out, history, slow listeners, socket pairs; its log; telnet."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oscloudd.errors import HostError, InvalidStateError
from oscloudd.machine import console_log
from oscloudd.machine.console import BACKLOG_BYTES, HISTORY_BYTES, Attachment, SerialConsole
from oscloudd.machine.telnet import TelnetInput, TelnetServer

LIMIT_SECONDS = 90


class Guest:
    """The far end of a serial line, and the console at the near one."""

    def __init__(self, history: bytes = b"") -> None:
        self.line, near = socket.socketpair()
        self.line.settimeout(0)
        self.console = SerialConsole(near, history=history)

    async def __aenter__(self) -> "Guest":
        await self.console.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.console.close()
        self.line.close()

    async def print(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.line, data)

    async def typed(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(self.line, size - len(data))
        return data


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, LIMIT_SECONDS))


async def read_until(attachment: Attachment, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = await attachment.read()
        assert piece, f"ended after {data[-80:]!r}"
        data += piece
    return data


def test_every_listener_gets_what_the_guest_prints_and_any_may_type() -> None:
    async def scene() -> None:
        async with Guest() as guest:
            first, second = guest.console.attach(), guest.console.attach()
            await guest.print(b"login: ")
            assert await read_until(first, b": ") == b"login: "
            assert await read_until(second, b": ") == b"login: "
            await first.write(b"ro")
            await second.write(b"ot")
            assert await guest.typed(4) == b"root"

    run(scene())


def test_history_is_bounded_and_given_only_to_those_who_ask() -> None:
    async def scene() -> None:
        async with Guest(history=b"before ") as guest:
            watcher = guest.console.attach()
            await guest.print(b"x" * HISTORY_BYTES + b"end")
            await read_until(watcher, b"end")
            late = guest.console.attach(with_history=True)
            text = await late.read()
            assert (len(text), text[-4:]) == (HISTORY_BYTES, b"xend")
            plain = guest.console.attach()
            await guest.print(b"new")
            assert await read_until(plain, b"new") == b"new"

    run(scene())


def test_a_slow_listener_is_cut_off_and_the_others_are_not() -> None:
    async def scene() -> None:
        async with Guest() as guest:
            slow, quick = guest.console.attach(), guest.console.attach()
            reading = asyncio.create_task(read_until(quick, b"end"))
            await guest.print(b"x" * (2 * BACKLOG_BYTES) + b"end")
            assert len(await reading) == 2 * BACKLOG_BYTES + 3
            assert slow.cut_off
            assert not quick.cut_off
            assert 0 < len(await slow.read()) <= BACKLOG_BYTES
            assert await slow.read() == b""

    run(scene())


def test_the_end_of_qemu_ends_every_listener_after_the_last_words() -> None:
    async def scene() -> None:
        async with Guest() as guest:
            attachment = guest.console.attach()
            await guest.print(b"Power down")
            guest.line.close()
            assert await read_until(attachment, b"down") == b"Power down"
            assert await attachment.read() == b""
            with pytest.raises(InvalidStateError):
                await attachment.write(b"anybody?")
            assert await guest.console.attach().read() == b""

    run(scene())


def test_a_socket_pair_carries_the_line_both_ways_until_it_is_closed() -> None:
    async def scene() -> None:
        async with Guest(history=b"ready\r\n") as guest:
            loop = asyncio.get_running_loop()
            with guest.console.attach_socket(with_history=True) as end:
                end.settimeout(0)
                assert await loop.sock_recv(end, 100) == b"ready\r\n"
                await loop.sock_sendall(end, b"yes\n")
                assert await guest.typed(4) == b"yes\n"
            await guest.print(b"still alive")
            assert await read_until(guest.console.attach(with_history=True), b"alive")

    run(scene())


def test_a_long_log_is_cut_at_a_line_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    line = b"0123456789abcde\n"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(writer, line * (console_log.LIMIT_BYTES // len(line)))
    assert not console_log.trim_log(path)
    os.write(writer, line)
    assert console_log.trim_log(path)
    os.write(writer, b"last\n")
    os.close(writer)
    kept = path.read_bytes()
    assert len(kept) <= console_log.KEPT_BYTES
    assert kept.startswith(line)
    assert kept.endswith(line + b"last\n")
    assert console_log.read_log_tail(path, 5) == b"last\n"


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert console_log.read_log_tail(tmp_path / "none") == b""
    assert not console_log.trim_log(tmp_path / "none")


@pytest.mark.parametrize(
    ("sent", "typed"),
    [
        (b"root\r\0", b"root\r"),
        (b"root\r\n", b"root\r"),
        (b"root\r\r\n", b"root\r\r"),
        (b"a\xff\xffb", b"a\xffb"),
        (b"\xff\xfd\x01\xff\xfb\x1fx", b"x"),
        (b"\xff\xfa\x18\x00xterm\xff\xffmore\xff\xf0y", b"y"),
        (b"\xff\xf1z", b"z"),
    ],
)
def test_telnet_commands_are_taken_out_wherever_the_pieces_break(sent: bytes, typed: bytes) -> None:
    assert TelnetInput().feed(sent) == typed
    one_by_one = TelnetInput()
    assert b"".join(one_by_one.feed(bytes([byte])) for byte in sent) == typed


@given(st.binary())
def test_telnet_input_takes_anything(sent: bytes) -> None:
    assert len(TelnetInput().feed(sent)) <= len(sent)


async def open_telnet(guest: Guest, *, allowed: bool) -> tuple[TelnetServer, list[int], int]:
    asked: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def is_allowed(uid: int) -> bool:
        asked.append(uid)
        return allowed

    server = TelnetServer(guest.console, port, is_allowed)
    await server.start()
    return server, asked, port


def test_the_telnet_port_shows_the_prompt_and_takes_keys() -> None:
    async def scene() -> None:
        async with Guest(history=b"my-vm login: ") as guest:
            server, asked, port = await open_telnet(guest, allowed=True)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readexactly(6) == b"\xff\xfb\x01\xff\xfb\x03"
            assert await reader.readuntil(b"login: ") == b"my-vm login: "
            writer.write(b"root\r\0")
            assert await guest.typed(5) == b"root\r"
            await guest.print(b"\xff!")
            assert await reader.readexactly(3) == b"\xff\xff!"
            assert asked == [os.getuid()]
            await server.close()
            assert await reader.read() == b""
            writer.close()

    run(scene())


def test_the_telnet_port_refuses_a_stranger() -> None:
    async def scene() -> None:
        async with Guest(history=b"root@my-vm:~# ") as guest:
            server, _, port = await open_telnet(guest, allowed=False)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b"This serial line is not yours.\r\n"
            writer.close()
            await server.close()

    run(scene())


def test_a_taken_telnet_port_is_an_error_that_names_it() -> None:
    async def scene() -> None:
        async with Guest() as guest:
            server, _, port = await open_telnet(guest, allowed=True)
            with pytest.raises(HostError, match=str(port)):
                await TelnetServer(guest.console, port, lambda _uid: True).start()
            await server.close()

    run(scene())
