"""Downloads over HTTP: resumed where they broke, checked before they get their name.

Owns `<destination>.part` and `<destination>.part.json` beside it, which remember what is there
already and of which version of the file. What the file is for is the caller's.
"""

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit

from oscloudd.errors import ExhaustedError, HostError, InvalidArgumentError, NotFoundError
from oscloudd.host.checksums import Checksum, checksum_of, parse_checksums
from oscloudd.host.images import publish
from oscloudd.host.resources import disk_free_bytes

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_REPORT_SECONDS = 0.1
_ATTEMPTS = 5
_STALL_SECONDS = 30.0
_CHECKSUMS_MAX_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)")

OnProgress = Callable[[int, int | None], None]


class _ConnectionCutError(Exception):
    """The connection ended or stalled before the file did; what came is kept."""


class _CancelledError(Exception):
    """The task that waited for the download is gone."""


async def download(
    url: str,
    destination: Path,
    *,
    expected: Checksum | None,
    on_progress: OnProgress | None = None,
    stall_seconds: float = _STALL_SECONDS,
    attempts: int = _ATTEMPTS,
) -> None:
    """Bring `url` to `destination`, which appears whole, checked and durable or not at all.

    `on_progress` gets the bytes there are and how many there will be (None if the server doesn't
    say), in the loop's thread, ten times a second. A connection that breaks, or stands still for
    `stall_seconds`, is taken up again, `attempts` times in all, and then by the next call. A wrong
    digest or a full disk leaves nothing of it. Raises HostError (unreachable, wrong digest),
    NotFoundError, ExhaustedError for a full disk.
    """
    check_url(url)
    loop = asyncio.get_running_loop()

    def report(received_bytes: int, total_bytes: int | None) -> None:
        if on_progress is not None:
            loop.call_soon_threadsafe(on_progress, received_bytes, total_bytes)

    transfer = _Transfer(url, destination, report, stall_seconds)
    try:
        await asyncio.to_thread(transfer.run, attempts, expected)
    except asyncio.CancelledError:
        transfer.cancelled.set()
        raise
    except ExhaustedError:
        transfer.forget()  # kept, it would keep the disk full
        raise


async def fetch_checksum(
    checksums_url: str, file_name: str, *, stall_seconds: float = _STALL_SECONDS
) -> Checksum:
    """Give what a vendor's list of checksums has for `file_name`; raises NotFoundError."""
    check_url(checksums_url)
    text = await asyncio.to_thread(_fetch_text, checksums_url, stall_seconds)
    checksum = parse_checksums(text).get(file_name)
    if checksum is None:
        raise NotFoundError(f"{checksums_url} has no checksum of {file_name!r}")
    return checksum


class _Transfer:
    """One download in its worker thread; `cancelled` may be set from any other."""

    def __init__(
        self, url: str, destination: Path, report: OnProgress, stall_seconds: float
    ) -> None:
        self.cancelled = threading.Event()
        self._url = url
        self._destination = destination
        self._part = destination.with_name(destination.name + ".part")
        self._memory = destination.with_name(destination.name + ".part.json")
        self._report = report
        self._stall_seconds = stall_seconds

    def run(self, attempts: int, expected: Checksum | None) -> None:
        try:
            self._fetch_all(attempts)
            if expected is not None:
                self._check(expected)
            publish(self._part, self._destination)
        except OSError as error:
            raise _disk_error(error, self._destination) from error
        self._memory.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what has come."""
        self._memory.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _fetch_all(self, attempts: int) -> None:
        for attempt in range(1, attempts + 1):
            try:
                self._fetch()
            except _ConnectionCutError as error:
                _log.info("%s: %s (attempt %d of %d)", self._url, error, attempt, attempts)
                if attempt == attempts:
                    raise HostError(
                        f"the download of {self._url} broke: {error}",
                        hint="start it again: it goes on where it stopped",
                    ) from error
            else:
                return

    def _fetch(self) -> None:
        validator = self._find_validator()
        offset = self._part.stat().st_size if validator else 0
        headers = {"Range": f"bytes={offset}-", "If-Range": validator} if validator else {}
        try:
            response = _open(self._url, headers, self._stall_seconds)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not validator:
                raise _refused(self._url, error) from error
            # The part is as long as the file, or longer than what the file has become.
            self.forget()
            response = _open_fresh(self._url, self._stall_seconds)
        with response:
            self._check_cancelled()
            self._receive(response, self._place(response, offset))

    def _place(self, response: http.client.HTTPResponse, offset: int) -> int:
        """Give where the response's bytes go: behind the part, or to the beginning."""
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            self._remember(response)
            return 0
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            self.forget()
            raise _ConnectionCutError("the server sent another piece than was asked for")
        return offset

    def _receive(self, response: http.client.HTTPResponse, offset: int) -> None:
        total = None if response.length is None else offset + response.length
        if total is not None and disk_free_bytes(self._destination.parent) < total - offset:
            raise _no_space(self._destination, total - offset)
        with self._part.open("r+b" if offset else "wb") as part:
            part.seek(offset)
            received = self._copy(response, part, offset, total)
        if total is not None and received < total:
            raise _ConnectionCutError(f"the connection ended after {received} of {total} bytes")
        self._report(received, total)

    def _copy(
        self, response: http.client.HTTPResponse, part: IO[bytes], received: int, total: int | None
    ) -> int:
        next_report = 0.0
        while chunk := self._read(response):
            self._check_cancelled()
            part.write(chunk)
            received += len(chunk)
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + _REPORT_SECONDS
                self._report(received, total)
        return received

    def _check_cancelled(self) -> None:
        # The next download of the same file may be at work already.
        if self.cancelled.is_set():
            raise _CancelledError

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            # read1 gives what has come; read would wait for a whole chunk and lose it when cut off.
            return response.read1(_CHUNK_BYTES)
        except (http.client.HTTPException, OSError) as error:
            raise _ConnectionCutError(str(error) or type(error).__name__) from error

    def _check(self, expected: Checksum) -> None:
        found = checksum_of(self._part, expected.algorithm)
        if found != expected:
            self.forget()
            raise HostError(
                f"{self._url} has {found}, but {expected.digest} was announced",
                hint="the download was damaged or replaced; try again later",
                digest=found.digest,
                expected=expected.digest,
            )

    def _find_validator(self) -> str | None:
        """Give what identifies the version of which the part is the beginning."""
        try:
            memory = json.loads(self._memory.read_text(encoding="utf-8"))
            if memory["url"] == self._url and self._part.stat().st_size > 0:
                return str(memory["validator"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return None

    def _remember(self, response: http.client.HTTPResponse) -> None:
        self.forget()
        etag = response.headers.get("ETag", "")
        # RFC 9110, 13.1.5: a weak tag can't stand in If-Range.
        strong_etag = "" if etag.startswith("W/") else etag
        validator = strong_etag or response.headers.get("Last-Modified", "")
        if validator:
            memory = json.dumps({"url": self._url, "validator": validator})
            self._memory.write_text(memory, encoding="utf-8")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, never to another scheme than http and https, never off https."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        check_url(newurl)
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise InvalidArgumentError(f"{req.full_url} leads off https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str], stall_seconds: float) -> http.client.HTTPResponse:
    # Built by hand: urllib's ordinary opener knows file:, ftp: and data: too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "oscloud", **headers})
    try:
        return cast(http.client.HTTPResponse, opener.open(request, timeout=stall_seconds))
    except urllib.error.HTTPError:
        raise
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise _ConnectionCutError(f"the server can't be reached: {reason}") from error


def _open_fresh(url: str, stall_seconds: float) -> http.client.HTTPResponse:
    try:
        return _open(url, {}, stall_seconds)
    except urllib.error.HTTPError as error:
        raise _refused(url, error) from error


def _fetch_text(url: str, stall_seconds: float) -> str:
    try:
        with _open_fresh(url, stall_seconds) as response:
            data = response.read(_CHECKSUMS_MAX_BYTES + 1)
    except (_ConnectionCutError, http.client.HTTPException, OSError) as error:
        raise HostError(f"{url} can't be read: {error}") from error
    if len(data) > _CHECKSUMS_MAX_BYTES:
        raise HostError(f"{url} is longer than a list of checksums can be")
    return data.decode("utf-8", "replace")


def _refused(url: str, error: urllib.error.HTTPError) -> HostError | NotFoundError:
    with contextlib.closing(error):
        if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            return NotFoundError(f"there is no {url} (HTTP status {error.code})")
        return HostError(f"{url} was refused with HTTP status {error.code} {error.reason}")


def check_url(url: str) -> None:
    """Raise InvalidArgumentError unless it is an address of http or https."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgumentError(
            f"{url!r:.200} can't be downloaded", hint="use an http:// or https:// address"
        )


def _disk_error(error: OSError, destination: Path) -> ExhaustedError | HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(destination, None)
    return HostError(f"{destination} can't be written: {error.strerror or error}")


def _no_space(destination: Path, needed_bytes: int | None) -> ExhaustedError:
    needed = "" if needed_bytes is None else f": {needed_bytes} bytes are missing yet"
    return ExhaustedError(
        f"there is not enough disk space for {destination}{needed}",
        hint="free some and start the download again",
        resource="disk",
    )
