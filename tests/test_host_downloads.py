"""Downloads from a server on loopback with named misbehaviours."""

import asyncio
import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from oscloudd.errors import ExhaustedError, HostError, InvalidArgumentError, NotFoundError
from oscloudd.host import downloads
from oscloudd.host.checksums import Checksum
from oscloudd.host.downloads import download, fetch_checksum

CONTENT = bytes(range(256)) * 4096
OTHER = bytes(reversed(CONTENT))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def checksum(content: bytes) -> Checksum:
    return Checksum("sha256", sha256(content))


@dataclass
class Behaviour:
    """What the server holds and how it misbehaves; `cuts` are the bytes after which it hangs up."""

    content: bytes = CONTENT
    etag: str = '"one"'
    cuts: list[int] = field(default_factory=list)
    stalls: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    ranges: list[str | None] = field(default_factory=list)
    port: int = 0

    def url(self, path: str = "/image") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path in ("/loop", "/away"):
            self.send_response(302)
            self.send_header("Location", "/loop" if self.path == "/loop" else "file:///etc/passwd")
            self.end_headers()
        elif self.path == "/SHA256SUMS":
            self.answer(200, f"{sha256(CONTENT)} *image\n".encode(), {})
        elif self.path == "/image":
            self.send_image()
        else:
            self.send_error(404)

    def send_image(self) -> None:
        state = self.behaviour
        wanted = self.headers.get("Range")
        state.ranges.append(wanted)
        if wanted is None or self.headers.get("If-Range") != state.etag:
            self.answer(200, state.content, {"ETag": state.etag})
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(state.content):
            self.send_error(416)
            return
        place = f"bytes {start}-{len(state.content) - 1}/{len(state.content)}"
        self.answer(206, state.content[start:], {"ETag": state.etag, "Content-Range": place})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        cut = self.behaviour.cuts.pop(0) if self.behaviour.cuts else len(body)
        # A client that gives up hangs up.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:cut])
        if cut < len(body) and self.behaviour.stalls:
            self.behaviour.stalls -= 1
            self.wfile.flush()
            self.behaviour.release.wait(30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behaviour]:
    monkeypatch.setenv("no_proxy", "*")
    behaviour = Behaviour()
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        behaviour.port = httpd.server_address[1]
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield behaviour
        behaviour.release.set()
        httpd.shutdown()
        thread.join()


def fetch(server: Behaviour, destination: Path, content: bytes = CONTENT, **options: int) -> None:
    asyncio.run(download(server.url(), destination, expected=checksum(content), **options))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_whole_file_with_progress(server: Behaviour, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    async def scenario() -> None:
        await download(
            server.url(),
            tmp_path / "image",
            expected=checksum(CONTENT),
            on_progress=lambda received, total: seen.append((received, total)),
        )
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert names(tmp_path) == ["image"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_cut_is_resumed_within_the_call(server: Behaviour, tmp_path: Path) -> None:
    server.cuts = [1000, 2000]
    fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", "bytes=3000-"]


def test_a_cut_is_resumed_by_the_next_call(server: Behaviour, tmp_path: Path) -> None:
    server.cuts = [1000]
    with pytest.raises(HostError, match=f"ended after 1000 of {len(CONTENT)} bytes"):
        fetch(server, tmp_path / "image", attempts=1)
    assert names(tmp_path) == ["image.part", "image.part.json"]
    fetch(server, tmp_path / "image", attempts=1)
    assert server.ranges[1] == "bytes=1000-"
    assert (tmp_path / "image").read_bytes() == CONTENT
    assert names(tmp_path) == ["image"]


def test_a_file_changed_in_between_is_taken_from_its_start(
    server: Behaviour, tmp_path: Path
) -> None:
    server.cuts = [1000]
    with pytest.raises(HostError):
        fetch(server, tmp_path / "image", attempts=1)
    server.content, server.etag = OTHER, '"two"'
    fetch(server, tmp_path / "image", OTHER, attempts=1)
    assert (tmp_path / "image").read_bytes() == OTHER


def test_a_weak_tag_is_not_resumed_on(server: Behaviour, tmp_path: Path) -> None:
    server.etag = 'W/"one"'
    server.cuts = [1000]
    fetch(server, tmp_path / "image")
    assert server.ranges == [None, None]
    assert (tmp_path / "image").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(server: Behaviour, tmp_path: Path) -> None:
    server.cuts = [1000]
    with pytest.raises(HostError):
        fetch(server, tmp_path / "image", attempts=1)
    (tmp_path / "image.part").write_bytes(CONTENT + b"more")
    fetch(server, tmp_path / "image", attempts=1)
    assert (tmp_path / "image").read_bytes() == CONTENT


def test_a_stall_is_a_cut(server: Behaviour, tmp_path: Path) -> None:
    server.cuts, server.stalls = [1000], 1
    fetch(server, tmp_path / "image", stall_seconds=1)
    assert server.ranges == [None, "bytes=1000-"]


def test_a_wrong_digest_names_both_and_leaves_nothing(server: Behaviour, tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        fetch(server, tmp_path / "image", OTHER)
    assert sha256(CONTENT) in caught.value.message
    assert sha256(OTHER) in caught.value.message
    assert names(tmp_path) == []


def test_a_file_there_before_survives_a_failure(server: Behaviour, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"good")
    with pytest.raises(HostError):
        fetch(server, tmp_path / "image", OTHER)
    assert (tmp_path / "image").read_bytes() == b"good"


def test_cancelling_ends_the_worker_and_keeps_the_part(server: Behaviour, tmp_path: Path) -> None:
    server.cuts, server.stalls = [1000], 1

    async def scenario() -> None:
        task = asyncio.create_task(
            download(
                server.url(),
                tmp_path / "image",
                expected=checksum(CONTENT),
                on_progress=lambda received, total: task.cancel() and None,
            )
        )
        with pytest.raises(asyncio.CancelledError):
            await task
        server.release.set()

    asyncio.run(scenario())  # joins the worker thread
    assert "image" not in names(tmp_path)


def test_full_disk_is_told_before_anything_is_written(
    server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "disk_free_bytes", lambda path: 100)
    with pytest.raises(ExhaustedError, match="not enough disk space") as caught:
        fetch(server, tmp_path / "image")
    assert caught.value.details["resource"] == "disk"
    assert not {"image", "image.part"} & set(names(tmp_path))


def test_disk_full_while_writing_leaves_nothing(
    server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.etag = ""  # nothing to remember, so nothing to forget before the part is opened
    (tmp_path / "image.part").symlink_to("/dev/full")
    monkeypatch.setattr(downloads._Transfer, "_remember", lambda self, response: None)
    with pytest.raises(ExhaustedError, match="not enough disk space"):
        fetch(server, tmp_path / "image")
    assert names(tmp_path) == []


def test_a_file_without_a_checksum_is_taken_as_it_is(server: Behaviour, tmp_path: Path) -> None:
    asyncio.run(download(server.url(), tmp_path / "image", expected=None))
    assert (tmp_path / "image").read_bytes() == CONTENT


def test_a_long_checksum_is_checked_too(server: Behaviour, tmp_path: Path) -> None:
    good = Checksum("sha512", hashlib.sha512(CONTENT).hexdigest())
    asyncio.run(download(server.url(), tmp_path / "image", expected=good))
    bad = Checksum("sha512", "0" * 128)
    with pytest.raises(HostError, match=f"has SHA512 {good.digest}"):
        asyncio.run(download(server.url(), tmp_path / "other", expected=bad))
    assert names(tmp_path) == ["image"]


def test_missing_file_is_not_found(server: Behaviour, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="404"):
        asyncio.run(download(server.url("/none"), tmp_path / "x", expected=None))
    assert names(tmp_path) == []


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(HostError, match=r"the server can't be reached: .*refused"):
        asyncio.run(download("http://127.0.0.1:1/x", tmp_path / "x", expected=None))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/x", "data:,x", "/etc/passwd", "http://"]
)
def test_other_schemes_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="can't be downloaded"):
        asyncio.run(download(url, tmp_path / "x", expected=None))


def test_redirects_end_and_stay_with_http(server: Behaviour, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="redirect"):
        asyncio.run(download(server.url("/loop"), tmp_path / "x", expected=None))
    with pytest.raises((HostError, InvalidArgumentError)):
        asyncio.run(download(server.url("/away"), tmp_path / "x", expected=None))
    assert names(tmp_path) == []


def test_checksum_is_found_by_name(server: Behaviour) -> None:
    assert asyncio.run(fetch_checksum(server.url("/SHA256SUMS"), "image")) == checksum(CONTENT)
    with pytest.raises(NotFoundError, match="no checksum of 'other'"):
        asyncio.run(fetch_checksum(server.url("/SHA256SUMS"), "other"))
