"""A vendor's server on loopback, in a box's namespace: files of a directory, with misbehaviours.

    python tests/image_server.py DIRECTORY     says its port, then serves until it is killed

GET /NAME gives a file. ?cut=N ends the first answer after N bytes; ?hold=N stops every answer after
N bytes until the file `release` is there. The file `log` gets a line for each request: the path and
the Range. A range is answered with what was asked for, if If-Range has the file's ETag.
"""

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

from daemon_process import LIMIT_SECONDS, Box


@dataclass
class ImageServer:
    directory: Path
    port: int

    def url(self, name: str, **misbehaviour: int) -> str:
        query = "&".join(f"{key}={value}" for key, value in misbehaviour.items())
        return f"http://127.0.0.1:{self.port}/{name}" + (f"?{query}" if query else "")

    def put(self, name: str, content: bytes) -> str:
        (self.directory / name).write_bytes(content)
        return name

    def requests(self) -> list[str]:
        log = self.directory / "log"
        return log.read_text().splitlines() if log.exists() else []

    def release(self) -> None:
        (self.directory / "release").touch()


@contextlib.contextmanager
def serve_images(box: Box) -> Iterator[ImageServer]:
    """Serve the box's daemon from an empty directory."""
    directory = box.root / "www"
    directory.mkdir()
    command = ["ip", "netns", "exec", box.namespace, sys.executable, __file__, str(directory)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        yield ImageServer(directory, int(server.stdout.readline()))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


class Handler(http.server.BaseHTTPRequestHandler):
    directory: Path
    cut: ClassVar[set[str]] = set()
    lock = threading.Lock()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = self.directory / parts.path.lstrip("/")
        wanted = self.headers.get("Range", "")
        with self.lock, (self.directory / "log").open("a") as log:
            log.write(f"{parts.path} {wanted}".strip() + "\n")
        if not path.is_file():
            self.send_error(404)
            return
        content, etag = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
        start = 0
        if wanted and self.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", place)
        else:
            self.send_response(200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.send_slowly(content[start:], parse_qs(parts.query))

    def send_slowly(self, content: bytes, query: dict[str, list[str]]) -> None:
        if "cut" in query and self.path not in self.cut:
            self.cut.add(self.path)
            self.wfile.write(content[: int(query["cut"][0])])
            return
        if "hold" in query:
            size = int(query["hold"][0])
            self.wfile.write(content[:size])
            self.wfile.flush()
            content = content[size:]
            end = time.monotonic() + LIMIT_SECONDS
            while not (self.directory / "release").exists() and time.monotonic() < end:
                time.sleep(0.01)
        self.wfile.write(content)


if __name__ == "__main__":
    Handler.directory = Path(sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        print(httpd.server_address[1], flush=True)
        httpd.serve_forever()
