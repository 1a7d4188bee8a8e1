"""Making templates: built here, downloaded from a vendor, or an image that a user brings.

Fills the directory it is given with the image, what goes with it, and a declaration. When that
becomes a template, and who may ask for it, is `templates`' affair.
"""

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from oscloudd.cloud.jobs import Job
from oscloudd.cloud.template_files import (
    DECLARATION,
    DIGEST,
    FILES,
    Boot,
    Declaration,
    Firmware,
    Guest,
    Identity,
    Image,
    Source,
    format_declaration,
    read_declaration,
)
from oscloudd.cloud.template_hooks import pack_files
from oscloudd.config import Config
from oscloudd.errors import HostError
from oscloudd.host.checksums import Checksum
from oscloudd.host.downloads import download, fetch_checksum
from oscloudd.host.image_check import ImageFormat, Judged, check_image
from oscloudd.host.images import durable, sha256_of
from oscloudd.host.transient_services import run_apart
from oscloudd.host.uploads import receive
from oscloudd.host.users import resolve_qemu_user

DOWNLOAD = ".download-"
# debian_12 takes 70 s on two idle cores; a slow mirror takes the rest.
_BUILD_SECONDS = 3600
_PROGRESS = "progress: "
_IMAGE = "image"


@dataclass(frozen=True)
class ImportRequest:
    """An image that a user brings: from `url`, or else `size_bytes` that the caller sends.

    `source` is what its owner calls it; `size_bytes`, `expected` and `format` are None where nobody
    said.
    """

    name: str
    source: str
    url: str
    size_bytes: int | None
    expected: Checksum | None
    format: ImageFormat | None
    os: str
    firmware: Firmware
    identity: Identity


class TemplateMaker:
    """Makes the files of templates; downloads that were cut stay in `directory` for the next."""

    def __init__(self, config: Config, directory: Path) -> None:
        self._directory = directory
        self._least_free_bytes = config.limits.min_free_disk_bytes()
        self._user = resolve_qemu_user(config.qemu.user).name

    async def build(self, declared: Path, making: Path, job: Job) -> None:
        """Run the template's own `build` program."""
        await _run_build(declared, making, job)
        _copy_declaration(declared, making)

    async def download(self, declared: Path, making: Path, job: Job) -> None:
        """Fetch the image from its vendor and check it against the vendor's checksum."""
        declaration = read_declaration(declared)
        source = declaration.source
        job.report("checksum", f"asking for the checksum of {source.file_name}")
        expected = await fetch_checksum(source.checksums_url, source.file_name)
        await self._fetch(source.url, expected, making, job)
        await self._check(making, source.format, source.file_name, job)
        (making / _IMAGE).rename(making / declaration.image.file)
        _copy_declaration(declared, making)

    async def take(
        self, request: ImportRequest, body: AsyncIterator[bytes] | None, making: Path, job: Job
    ) -> None:
        """Take an image from its address, or from the caller, who sends it as `body`."""
        if body is None:
            await self._fetch(request.url, request.expected, making, job)
        else:
            await self._receive(request, body, making, job)
        judged = await self._check(making, request.format, request.source, job)
        file_name = f"disk.{judged.format}"
        (making / _IMAGE).rename(making / file_name)
        declaration = Declaration(
            description=f"imported from {request.source}",
            os=request.os,
            source=Source(kind="import", url=request.url, format=judged.format),
            guest=Guest(identity=request.identity),
            boot=Boot(firmware=request.firmware),
            image=Image(file=file_name, format=judged.format),
        )
        text = format_declaration(declaration)
        (making / DECLARATION).write_text(text, encoding="utf-8")

    async def _fetch(self, url: str, expected: Checksum | None, making: Path, job: Job) -> None:
        # Outside of the directory being made: a download cut short goes on from where it was.
        kept = self._directory / f"{DOWNLOAD}{job.target}"
        kept.mkdir(exist_ok=True)

        def report(received_bytes: int, total_bytes: int | None) -> None:
            if total_bytes:
                job.report("downloading", url, received_bytes / total_bytes)
            else:
                job.report("downloading", f"{received_bytes >> 20} MiB of {url}")

        try:
            await download(url, kept / _IMAGE, expected=expected, on_progress=report)
            (kept / _IMAGE).rename(making / _IMAGE)
        finally:
            can_go_on = (kept / f"{_IMAGE}.part.json").exists()
            if job.cancel_requested or not can_go_on:
                shutil.rmtree(kept, ignore_errors=True)

    async def _receive(
        self, request: ImportRequest, body: AsyncIterator[bytes], making: Path, job: Job
    ) -> None:
        def report(received_bytes: int) -> None:
            if request.size_bytes is None:
                job.report("receiving", f"{received_bytes >> 20} MiB of {request.source}")
            else:
                job.report("receiving", request.source, received_bytes / request.size_bytes)

        report(0)
        await receive(
            body,
            making / _IMAGE,
            expected=request.expected,
            least_free_bytes=self._least_free_bytes,
            on_progress=report,
        )

    async def _check(self, making: Path, said: ImageFormat | None, called: str, job: Job) -> Judged:
        job.report("checking", "looking at what the image is")
        # qemu-img is asked as a user who can't enter the directory, but may read the open file.
        (making / _IMAGE).chmod(0o444)
        return await check_image(making / _IMAGE, said, self._user, called=called)


def _copy_declaration(declared: Path, making: Path) -> None:
    """Copy the declaration, and what is declared for guests with cloud-init."""
    shutil.copyfile(declared / DECLARATION, making / DECLARATION)
    declaration = read_declaration(making)
    if declaration.guest.identity == "cloud-init" and (packed := pack_files(declared, declaration)):
        (making / FILES).write_bytes(packed)


async def _run_build(declared: Path, making: Path, job: Job) -> None:
    program = declared / "build"
    if not os.access(program, os.X_OK):
        raise HostError(f"{program} is missing or not executable")
    job.report("building", f"building {declared.name} from Debian packages")

    def take(line: str) -> None:
        if line.startswith(_PROGRESS):
            percent, _, message = line.removeprefix(_PROGRESS).partition(" ")
            fraction = float(percent) / 100 if percent.isdigit() else None
            job.report("building", message, fraction)

    unit = f"oscloud-build-{declared.name}.service"
    argv = [str(program), str(making)]
    await run_apart(argv, unit, timeout_seconds=_BUILD_SECONDS, on_line=take)


def seal(making: Path) -> None:
    """Make the files read-only and durable, the digest last: it is what makes a template."""
    declaration: Declaration = read_declaration(making)
    boot = declaration.boot
    hooks = FILES if (making / FILES).exists() else ""
    for name in filter(None, (declaration.image.file, boot.kernel, boot.initrd, hooks)):
        if not (making / name).is_file():
            raise HostError(f"the template was made without its file {name!r}")
        # Kernel and initrd are opened again by qemu's own user, hence readable by all.
        (making / name).chmod(0o444)
        durable(making / name)
    durable(making / DECLARATION)
    digest = sha256_of(making / declaration.image.file)
    (making / DIGEST).write_text(f"sha256:{digest}\n")
    durable(making / DIGEST)
