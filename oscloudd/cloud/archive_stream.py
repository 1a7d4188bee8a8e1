"""An archive of a vm as it comes in: its members in their order, each checked on its way."""

import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from oscloudd.cloud.vm_archive import (
    BLOCK_BYTES,
    END,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SUMS_BYTES,
    SUMS,
    Manifest,
    archive_bytes,
    build_sums,
    check_sums,
    padding,
    parse_header,
    parse_manifest,
)
from oscloudd.errors import InvalidArgumentError
from oscloudd.host.uploads import receive


class ArchiveStream:
    """Reads an archive from `body`, from its manifest to its checksums, once.

    `size_bytes` is None where nobody knew: the manifest tells, and from then on how far it is. All
    of it raises InvalidArgumentError for what is no archive of ours, and what `body` raises.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        size_bytes: int | None,
        least_free_bytes: int,
        on_progress: Callable[[float], None],
    ) -> None:
        self._body = body
        self._size_bytes = size_bytes
        self._least_free_bytes = least_free_bytes
        self._on_progress = on_progress
        self._buffer = b""
        self._read_bytes = 0
        self._whole_bytes = 0
        self._digests: dict[str, str] = {}
        self._sizes: dict[str, int] = {}

    async def read_manifest(self) -> Manifest:
        """Read the first member; says at once whether the rest can be all there."""
        text = await self._read_small(MANIFEST, MAX_MANIFEST_BYTES)
        self._digests[MANIFEST] = hashlib.sha256(text).hexdigest()
        manifest = parse_manifest(text)
        self._sizes = {member.name: member.size for member in manifest.members}
        sums = build_sums(dict.fromkeys((MANIFEST, *self._sizes), "0" * 64))
        whole = archive_bytes([len(text), *self._sizes.values(), len(sums)])
        if self._size_bytes not in (None, whole):
            raise InvalidArgumentError(
                f"it has {self._size_bytes} bytes, and {whole} by its manifest: it is cut off, or "
                "not as it was exported",
                hint="copy or export it again",
            )
        self._whole_bytes = whole
        return manifest

    async def save(self, name: str, destination: Path) -> str | None:
        """Write a member to a new file and give its SHA-256; None where the vm has no such file.

        Raises ExhaustedError, too.
        """
        size = self._sizes.get(name)
        if size is None:
            return None
        await self._expect(name, size)
        before = self._read_bytes

        def report(received_bytes: int) -> None:
            self._on_progress((before + received_bytes) / self._whole_bytes)

        found = await receive(
            self._chunks(size),
            destination,
            expected=None,
            least_free_bytes=self._least_free_bytes,
            on_progress=report,
        )
        await self._take(len(padding(size)))
        self._digests[name] = found.digest
        return found.digest

    async def check(self) -> None:
        """Read the last member and the end, and compare what is said there with what came."""
        check_sums(await self._read_small(SUMS, MAX_SUMS_BYTES), self._digests)
        end = await self._take(len(END))
        if end != END or self._buffer or await anext(self._body, None) is not None:
            raise InvalidArgumentError("it goes on behind its end", hint="copy or export it again")

    async def _read_small(self, name: str, most_bytes: int) -> bytes:
        size = await self._expect(name, None)
        if size > most_bytes:
            raise InvalidArgumentError(f"its {name} has more than {most_bytes} bytes")
        content = await self._take(size)
        await self._take(len(padding(size)))
        return content

    async def _expect(self, name: str, size_bytes: int | None) -> int:
        """Read a header, which must be that of `name`; give the size it says."""
        found, size = parse_header(await self._take(BLOCK_BYTES))
        if found != name or size_bytes not in (None, size):
            raise InvalidArgumentError(
                f"it has {found!r:.80} with {size} bytes where {name} should be"
            )
        return size

    async def _take(self, size_bytes: int) -> bytes:
        taken = bytearray()  # a chunk may be a single byte, and an object of its own has 34
        async for chunk in self._chunks(size_bytes):
            taken += chunk
        return bytes(taken)

    async def _chunks(self, size_bytes: int) -> AsyncIterator[bytes]:
        """Give the next so many bytes, as they come."""
        left = size_bytes
        while left:
            if not self._buffer:
                self._buffer = await self._next()
            chunk, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(chunk)
            self._read_bytes += len(chunk)
            yield chunk

    async def _next(self) -> bytes:
        try:
            return await anext(self._body)
        except StopAsyncIteration as error:
            raise InvalidArgumentError("it is cut off") from error
