"""Files of a size that nobody knows, sent piece by piece over the socket: whole, or not at all."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemon_process import Box, Line, RpcError
from test_rpc_exports import ask, export, stopped
from test_rpc_templates import RAW, answer_on, files, send_all, wait_for
from test_rpc_vm_copies import build, take, without_kernel

PIECE_BYTES = 100_000


def piece(content: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","method":"piece","params":{"size":%d}}\n' % len(content) + content


def in_pieces(content: bytes) -> bytes:
    starts = range(0, len(content), PIECE_BYTES)
    return b"".join(piece(content[start : start + PIECE_BYTES]) for start in starts) + piece(b"")


def begin(line: Line, method: str, **params: Any) -> None:
    ask(line, method, pieces=True, file_name="standard input", **params)
    assert wait_for(line, "send")["params"] == {"size": None}


def send_pieces(box: Box, sent: bytes, method: str, **params: Any) -> dict[str, Any]:
    with box.connect() as line:
        begin(line, method, **params)
        send_all(line, sent)
        answer: dict[str, Any] = answer_on(line)
        assert line.at_end()
        return answer


def take_in_pieces(box: Box, sent: bytes) -> dict[str, Any]:
    return send_pieces(box, sent, "vm_import")


def send_image(box: Box, sent: bytes, **params: Any) -> dict[str, Any]:
    return send_pieces(box, sent, "template_import", name="mine", **params)


@pytest.fixture
def archive(box: Box) -> bytes:
    """An exported vm that is not there any more."""
    stopped(box)
    content, _answer = export(box, "vm_export", vm="web")
    box.call("vm_delete", vm="web")
    return build(without_kernel(content))


def test_a_vm_comes_in_pieces(box: Box, archive: bytes) -> None:
    fractions = []
    with box.connect() as line:
        begin(line, "vm_import")
        send_all(line, in_pieces(archive))
        while "id" not in (message := line.receive()):
            if message["params"]["stage"] == "receiving":
                fractions.append(message["params"]["fraction"])
        assert message["result"]["name"] == "web"
        assert line.at_end()
    # Its manifest says how much there is.
    assert all(fraction is None or 0 <= fraction <= 1 for fraction in fractions)
    box.call("vm_delete", vm="web")
    assert take(box, archive)["name"] == "web"


def test_an_image_comes_in_pieces(box: Box) -> None:
    assert send_image(box, in_pieces(RAW))["source"] == "import"
    stored = box.root / "state/templates/mine/disk.raw"
    assert stored.read_bytes() == RAW


def wrong_pieces(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Give what is no file in pieces, and a piece of the reason."""
    first = piece(good[:1000])
    yield "is no piece", first + b"garbage\n"
    yield "is no piece", first + b"{" * 1000
    yield "is no piece", first + b'{"jsonrpc":"2.0","method":"daemon_info","id":1}\n'
    for size in (-1, (1 << 20) + 1, "1", 1.5, None):
        params = {"jsonrpc": "2.0", "method": "piece", "params": {"size": size}}
        yield "is no piece", first + json.dumps(params).encode() + b"\n"


@pytest.mark.parametrize("take_it", [take_in_pieces, send_image])
def test_what_is_no_file_in_pieces_leaves_nothing(
    box: Box, archive: bytes, take_it: Callable[[Box, bytes], dict[str, Any]]
) -> None:
    for words, sent in wrong_pieces(archive):
        with pytest.raises(RpcError) as refused:
            take_it(box, sent)
        assert words in refused.value.message
        assert refused.value.kind == "invalid_argument"
        check_nothing_left(box)


def check_nothing_left(box: Box) -> None:
    assert box.traces() == {}
    # What vms boot with goes with the next housekeeping.
    assert [name for name in files(box) if "-import-" not in name] == []


def test_an_archive_that_ends_elsewhere_than_it_says(box: Box, archive: bytes) -> None:
    for content, words in (
        (archive[:-512], "is cut off"), (archive[: len(archive) // 2], "is cut off"),
        (archive + b"x", "goes on behind its end"), (archive + archive, "goes on behind its end"),
        (b"", "is cut off"), (archive[:-512] + b"x" * 512, "goes on behind its end"),
    ):  # fmt: skip
        with pytest.raises(RpcError) as refused:
            take_in_pieces(box, in_pieces(content))
        assert words in refused.value.message
        check_nothing_left(box)


@pytest.mark.parametrize("method", ["vm_import", "template_import"])
def test_a_client_that_is_gone_is_no_end_of_a_file(box: Box, archive: bytes, method: str) -> None:
    content, params = {
        "vm_import": (archive, {}), "template_import": (RAW, {"name": "mine"})
    }[method]  # fmt: skip
    with box.connect() as line:
        begin(line, method, **params)
        line.send(in_pieces(content)[: -len(piece(b""))])
    job = lambda: box.call("job_list", limit=1)[0]  # noqa: E731
    box.until(lambda: job()["state"] != "RUNNING", "the job's end")
    assert (job()["kind"], job()["state"]) == (method, "FAILED")
    assert "the file ended after" in job()["message"]
    check_nothing_left(box)


def test_what_is_sent_has_a_size_or_pieces(box: Box) -> None:
    for method, params in (
        ("vm_import", {}), ("vm_import", {"size": 1, "pieces": True}),
        ("vm_import", {"size": 0}), ("vm_import", {"size": 1 << 60}),
        ("template_import", {"name": "m", "size": 1, "pieces": True}),
        ("template_import", {"name": "m", "url": "http://h/x", "pieces": True}),
        ("template_import", {"name": "m", "wait": False, "pieces": True}),
        ("template_import", {"name": "m", "pieces": 1}),
    ):  # fmt: skip
        with pytest.raises(RpcError) as refused:
            box.call(method, **params)
        assert refused.value.kind == "invalid_argument", params
