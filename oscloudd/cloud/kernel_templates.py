"""What imported vms boot with: kernel, initrd and how, as templates that have no image.

A vm's disk always stands on a template. That of an imported vm is whole in itself, and its template
is one whose image is nothing but a hole. It is named by its content, so that vms of the same kind
share it, and goes with the last disk that stands on it.
"""

import asyncio
import hashlib
import re
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec

from oscloudd.cloud.archive_stream import ArchiveStream
from oscloudd.cloud.jobs import Job
from oscloudd.cloud.template_files import (
    DECLARATION,
    Boot,
    Declaration,
    Guest,
    Image,
    ReadyTemplate,
    Source,
    check_template_name,
    format_declaration,
)
from oscloudd.cloud.template_making import seal
from oscloudd.cloud.templates import MAKING, Templates
from oscloudd.cloud.vm_archive import INITRD, KERNEL, ExportedTemplate, Manifest
from oscloudd.config import Config
from oscloudd.errors import AlreadyExistsError, CloudError, InvalidArgumentError
from oscloudd.host.images import durable
from oscloudd.units import parse_size

_NAME = re.compile(r"(.+)-import-[0-9a-f]{16}", re.ASCII)
_IMAGE = "disk.raw"
# What it reads as wherever a disk has nothing: zeros, for which any size does.
_IMAGE_BYTES = 1 << 20
# The longest command line a Linux kernel on x86 takes (COMMAND_LINE_SIZE).
_MAX_TEXT_LENGTH = 2048
# With the digest behind it, a name is not longer than others.
_KEPT_NAME_LENGTH = 30


class KernelTemplates:
    """Makes and removes them; they are in the directory of all templates."""

    def __init__(self, config: Config, templates: Templates) -> None:
        self._directory = config.state_path / "templates"
        self._templates = templates
        # Those that disks are about to stand on, and who decides whether one stays.
        self._wanted: Counter[str] = Counter()
        self._deciding = asyncio.Lock()

    async def take(self, stream: ArchiveStream, manifest: Manifest, job: Job) -> ReadyTemplate:
        """Give the template of a vm that is coming in, made if there is none like it.

        It stays until `let_go`, which is to follow. Raises InvalidArgumentError for one that can't
        be, and what reading from `stream` does.
        """
        settings = _check_settings(manifest.template)
        # No template has a name that begins with a dot.
        making = self._directory / f"{MAKING}.import-{job.id}"
        await asyncio.to_thread(making.mkdir, parents=True)
        try:
            digests = {
                name: digest
                for name in (KERNEL, INITRD)
                if (digest := await stream.save(name, making / name)) is not None
            }
            declaration = _declare(settings, digests)
            text = format_declaration(declaration)
            (making / DECLARATION).write_text(text, encoding="utf-8")
            with (making / _IMAGE).open("wb") as image:
                image.truncate(_IMAGE_BYTES)
            content = hashlib.sha256(f"{text}{sorted(digests.items())}".encode()).hexdigest()
            name = f"{_base_name(settings.name)}-import-{content[:16]}"
            await asyncio.to_thread(seal, making)
            async with self._deciding:
                return await self._keep(making, name, declaration)
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def let_go(self, template: ReadyTemplate) -> None:
        """It is kept by a disk from now on, or not needed."""
        self._wanted[template.name] -= 1

    async def _keep(self, making: Path, name: str, declaration: Declaration) -> ReadyTemplate:
        if self._templates.find_ready(name) is None:
            await asyncio.to_thread(making.rename, self._directory / name)
            await asyncio.to_thread(durable, self._directory / name)
        found = self._templates.get_ready(name)
        if found.declaration != declaration:
            raise AlreadyExistsError(f"template {name} is there, and another one than is needed")
        self._wanted[name] += 1
        return found

    async def prune(self) -> None:
        """Remove those that no disk stands on any more."""
        for path in self._directory.glob("*-import-*"):
            found = self._templates.find_ready(path.name) if _NAME.fullmatch(path.name) else None
            if found is not None and found.has_no_image:
                async with self._deciding:
                    if not self._wanted[found.name]:
                        with suppress(CloudError):
                            await self._templates.delete(found.name)


def _check_settings(settings: ExportedTemplate) -> ExportedTemplate:
    check_template_name(settings.name)
    parse_size(settings.min_mem_size, parameter="min_mem_size")
    for key, text in msgspec.structs.asdict(settings).items():
        if not text.isprintable() or len(text) > _MAX_TEXT_LENGTH:
            raise InvalidArgumentError(f"{key} in its manifest is none that a template can have")
    return settings


def _declare(settings: ExportedTemplate, digests: dict[str, str]) -> Declaration:
    return Declaration(
        description=f"what vms of {_base_name(settings.name)} boot with that were imported",
        os=settings.os,
        source=Source(kind="vm", format="raw"),
        guest=Guest(identity=settings.identity, login_prompt=settings.login_prompt),
        boot=Boot(
            kernel=KERNEL if KERNEL in digests else "",
            initrd=INITRD if INITRD in digests else "",
            cmdline=settings.cmdline,
            firmware=settings.firmware,
        ),
        image=Image(file=_IMAGE, format="raw"),
        min_mem_size=settings.min_mem_size,
    )


def _base_name(name: str) -> str:
    """Give a template's name without what an earlier import has added to it."""
    match = _NAME.fullmatch(name)
    return (match[1] if match else name)[:_KEPT_NAME_LENGTH]
