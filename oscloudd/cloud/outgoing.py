"""What goes out in an export: files and archives in pieces, hashed and counted on their way."""

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import IO

import msgspec

from oscloudd import __version__
from oscloudd.cloud.disk_records import DiskRecord
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.template_files import Declaration, ReadyTemplate
from oscloudd.cloud.vm_archive import (
    END,
    INITRD,
    KERNEL,
    MANIFEST,
    SEED,
    SUMS,
    ExportedDisk,
    ExportedTemplate,
    ExportedVm,
    Manifest,
    Member,
    archive_bytes,
    build_header,
    build_sums,
    padding,
)
from oscloudd.cloud.vm_paths import VmPaths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.errors import HostError

# Takes one piece; raises CloudError when nobody wants more.
Sink = Callable[[bytes], Awaitable[None]]

_PIECE_BYTES = 256 << 10
_REPORT_SECONDS = 0.1


# What the manifest says as the vm's record does.
_SAME = frozenset(ExportedVm.__struct_fields__) - {"identified", "seed_document"}


class Outgoing:
    """What is sent in one export, its digest, and how far it is of `total_bytes`."""

    def __init__(self, job: Job, what: str, sink: Sink, total_bytes: int) -> None:
        self.sent_bytes = 0
        self.digest = hashlib.sha256()
        self._job = job
        self._what = what
        self._sink = sink
        self._total_bytes = total_bytes
        self._next_report = 0.0
        job.report("sending", what, 0.0)

    async def send(self, data: bytes) -> None:
        """Send some bytes, in pieces; raises what the sink raises."""
        self.digest.update(data)
        for start in range(0, len(data), _PIECE_BYTES):
            await self._pass_on(data[start : start + _PIECE_BYTES])

    async def send_file(self, file: IO[bytes]) -> str:
        """Send a file from its first byte to its last, and give its SHA-256; raises HostError."""
        digest = hashlib.sha256()
        file.seek(0)
        while piece := await asyncio.to_thread(_read, file, digest, self.digest):
            await self._pass_on(piece)
        return digest.hexdigest()

    async def _pass_on(self, piece: bytes) -> None:
        await self._sink(piece)
        self.sent_bytes += len(piece)
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + _REPORT_SECONDS
            self._job.report("sending", self._what, self.sent_bytes / self._total_bytes)


async def send_archive(
    job: Job, manifest: Manifest, members: dict[str, IO[bytes]], sink: Sink
) -> Outgoing:
    """Send a vm's archive and give what was sent; raises what the sink raises, and HostError."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    sums = dict.fromkeys((MANIFEST, *members), "0" * 64)
    sizes = [len(text), *map(size_of, members.values()), len(build_sums(sums))]
    outgoing = Outgoing(job, manifest.vm.name, sink, archive_bytes(sizes))
    made_at = manifest.made_at
    sums[MANIFEST] = hashlib.sha256(text).hexdigest()
    await outgoing.send(build_header(MANIFEST, len(text), made_at) + text + padding(len(text)))
    for name, file in members.items():
        size = size_of(file)
        await outgoing.send(build_header(name, size, made_at))
        sums[name] = await outgoing.send_file(file)
        await outgoing.send(padding(size))
    last = build_sums(sums)
    await outgoing.send(build_header(SUMS, len(last), made_at) + last + padding(len(last)) + END)
    return outgoing


def open_others(stack: ExitStack, template: ReadyTemplate, paths: VmPaths) -> dict[str, IO[bytes]]:
    """Open what a vm needs besides its disks and is never written to; raises HostError."""
    seed = paths.seed if paths.seed.exists() else None
    files = {KERNEL: template.kernel, INITRD: template.initrd, SEED: seed}
    try:
        return {
            name: stack.enter_context(path.open("rb", buffering=0))
            for name, path in files.items()
            if path is not None
        }
    except OSError as error:
        raise HostError(f"{error.filename} can't be read: {error.strerror}") from error


def describe_disk(disk: DiskRecord) -> ExportedDisk:
    """Give what the manifest says of a data disk."""
    assert disk.slot is not None
    return ExportedDisk(disk.slot, disk.name, disk.size)


def describe_vm(
    vm: VmRecord,
    document: str,
    declaration: Declaration,
    members: dict[str, IO[bytes]],
    disks: list[ExportedDisk],
) -> Manifest:
    """Give the manifest of a vm whose guest is still to be told `document`, "" for nothing."""
    return Manifest(
        format="oscloud-vm",
        version=1,
        made_at=time.time(),
        made_by=__version__,
        vm=msgspec.convert(
            {
                "identified": bool(vm.identified),
                "seed_document": document,
                **{name: getattr(vm, name) for name in _SAME},
                "nics": [
                    {"network": nic.network, "ip": nic.ip, "mac": nic.mac} for nic in vm.other_nics
                ],
            },
            ExportedVm,
        ),
        template=ExportedTemplate(
            name=vm.template,
            os=declaration.os,
            cmdline=declaration.boot.cmdline,
            identity=declaration.guest.identity,
            login_prompt=declaration.guest.login_prompt,
            min_mem_size=declaration.min_mem_size,
            firmware=declaration.boot.firmware,
        ),
        disks=disks,
        members=[Member(name, size_of(file)) for name, file in members.items()],
    )


def size_of(file: IO[bytes]) -> int:
    """Give how many bytes an open file has."""
    return os.fstat(file.fileno()).st_size


def _read(file: IO[bytes], *digests: "hashlib._Hash") -> bytes:
    try:
        piece = file.read(_PIECE_BYTES)
    except OSError as error:
        raise HostError(f"what is to be sent can't be read: {error.strerror}") from error
    for digest in digests:
        digest.update(piece)
    return piece
