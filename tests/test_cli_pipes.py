"""The import commands with - for a file, on a scripted daemon: pipes, files, terminals, nothing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from stub_daemon import (
    DEADLINE_SECONDS,
    HANG_UP,
    VM,
    Call,
    StubDaemon,
    Terminal,
    build_environment,
)
from test_cli_exports import CONTENT, Giver
from test_cli_templates import TEMPLATE

from oscloudd.errors import CloudError, InvalidArgumentError

IMPORTS = [("vm_import", ("vm-import", "-"), VM),
           ("template_import", ("template-import", "-", "--name", "mine"), TEMPLATE)]  # fmt: skip
every_import = pytest.mark.parametrize(("method", "arguments", "answer"), IMPORTS)


class PieceTaker:
    """Answers an import: asks for the file, takes it piece by piece, and says how it went."""

    def __init__(
        self, daemon: StubDaemon, method: str, answer: Any, *, refuses: CloudError | None = None
    ) -> None:
        self.pieces: list[bytes] = []
        self._answer, self._refuses = answer, refuses
        daemon.answers[method] = self._take

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)

    def _take(self, call: Call) -> Any:
        size = call.params.get("size")
        call.send({"jsonrpc": "2.0", "method": "send", "params": {"size": size}})
        with call.stream.makefile("rb") as file:
            if size is not None:
                self.pieces.append(file.read(size))
            while size is None and self._refuses is None:
                self.pieces.append(read_piece(file))
                if not self.pieces[-1]:
                    break
        answer: dict[str, Any] = {"result": self._answer}
        if (error := self._refuses) is not None:
            answer = {
                "error": {"code": error.code, "message": error.message, "data": error.as_data()}
            }
        call.send({"jsonrpc": "2.0", "id": call.id, **answer})
        return HANG_UP


def read_piece(file: IO[bytes]) -> bytes:
    line = file.readline()
    prefix = b'{"jsonrpc":"2.0","method":"piece","params":{"size":'
    assert line.startswith(prefix), line
    size = int(line.removeprefix(prefix).removesuffix(b"}}\n"))
    content = file.read(size)
    assert len(content) == size
    return content


def start(daemon: StubDaemon, *arguments: str, **streams: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "oscloudctl", *arguments], env=build_environment(daemon, Path("/")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams,
    )  # fmt: skip


def end(process: "subprocess.Popen[bytes]", sent: bytes | None = None) -> tuple[str, str]:
    stdout, stderr = process.communicate(sent, timeout=DEADLINE_SECONDS)
    return stdout.decode(), stderr.decode()


@every_import
def test_what_comes_from_a_pipe_goes_in_pieces(
    daemon: StubDaemon, method: str, arguments: tuple[str, ...], answer: Any
) -> None:
    taker = PieceTaker(daemon, method, answer)
    process = start(daemon, *arguments, stdin=subprocess.PIPE)
    stdout, stderr = end(process, CONTENT)
    assert process.returncode == 0, stderr
    assert taker.content == CONTENT
    assert [piece for piece in taker.pieces if not piece] == [b""]
    ((_method, params),) = daemon.calls
    assert (params["pieces"], params["file_name"]) == (True, "standard input")
    assert "size" not in params
    assert answer["name"] in stdout


@every_import
def test_a_file_on_standard_input_has_a_size(
    daemon: StubDaemon, tmp_path: Path, method: str, arguments: tuple[str, ...], answer: Any
) -> None:
    (tmp_path / "file").write_bytes(b"#!header\n" + CONTENT)
    taker = PieceTaker(daemon, method, answer)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.seek(9)
        process = start(daemon, *arguments, stdin=file)
    end(process)
    assert process.returncode == 0
    assert taker.content == CONTENT
    assert daemon.calls[0][1]["size"] == len(CONTENT)
    assert "pieces" not in daemon.calls[0][1]


@every_import
def test_what_is_no_file_on_standard_input_is_refused(
    daemon: StubDaemon, tmp_path: Path, method: str, arguments: tuple[str, ...], answer: Any
) -> None:
    with Path("/dev/null").open("rb") as null:
        processes = [
            start(daemon, *arguments, stdin=null),
            start(daemon, *arguments, stdin=subprocess.PIPE),
            start(daemon, *arguments, stdin=None, preexec_fn=lambda: os.close(0)),
        ]
    said = [end(process)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2], said
    assert "standard input is empty" in said[0]
    assert "standard input is empty" in said[1]
    assert "standard input" in said[2]
    terminal = Terminal(daemon, tmp_path, *arguments)
    terminal.see(b"standard input is a terminal")
    assert terminal.wait() == 2
    terminal.close()
    assert daemon.calls == []
    assert answer, method


@every_import
def test_a_refusal_is_heard_while_the_pipe_is_open(
    daemon: StubDaemon, method: str, arguments: tuple[str, ...], answer: Any
) -> None:
    PieceTaker(
        daemon, method, answer, refuses=InvalidArgumentError("it is refused", hint="mend it")
    )
    process = start(daemon, *arguments, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"the beginning")
    process.stdin.flush()
    assert process.wait(DEADLINE_SECONDS) == 2
    assert process.stderr is not None
    assert process.stderr.read().decode().splitlines()[-2:] == [
        "Error: it is refused", "Hint: mend it",
    ]  # fmt: skip
    process.communicate()


def test_a_template_from_a_pipe_needs_a_name(daemon: StubDaemon) -> None:
    process = start(daemon, "template-import", "-", stdin=subprocess.PIPE)
    assert "give --name" in end(process, CONTENT)[1]
    assert process.returncode == 2
    assert daemon.calls == []


def test_a_vm_goes_from_one_to_another(daemon: StubDaemon) -> None:
    Giver(daemon, "vm_export")
    taker = PieceTaker(daemon, "vm_import", VM)
    giving = start(daemon, "vm-export", "web", "-")
    taking = start(daemon, "vm-import", "-", "-q", stdin=giving.stdout)
    assert end(taking)[0] == "1\n"
    assert giving.wait(DEADLINE_SECONDS) == 0
    giving.communicate()
    assert taker.content == CONTENT
