"""The parameters of `template_import` and `vm_import` turned into what the cloud is asked for."""

from urllib.parse import urlsplit

from oscloudd.api.params import TemplateImportParams, VmImportParams
from oscloudd.cloud.template_files import check_template_name
from oscloudd.cloud.template_making import ImportRequest
from oscloudd.cloud.vm_archive import MAX_ARCHIVE_BYTES
from oscloudd.cloud.vm_import import VmImportRequest
from oscloudd.errors import InvalidArgumentError
from oscloudd.host.checksums import parse_checksum
from oscloudd.host.downloads import check_url
from oscloudd.host.image_header import MAX_SIZE_BYTES
from oscloudd.units import check_name

_MAX_URL_LENGTH = 2000
_MAX_WORDS_LENGTH = 255


def build_import(params: TemplateImportParams) -> ImportRequest:
    """Check what can be checked without looking at anything; raises InvalidArgumentError."""
    if [params.url is not None, params.size is not None, params.pieces].count(True) != 1:
        raise InvalidArgumentError(
            "an image comes from its url, or is sent by the caller with its size, or in pieces: "
            "give one of them",
            parameter="url",
        )
    source = _words(params.file_name, "file_name")
    if params.url is None:
        _check_bytes(params.size, MAX_SIZE_BYTES)
        _check_waits(params)
    else:
        _check_address(params.url)
        source = params.url
    checksum = params.sha256
    return ImportRequest(
        name=check_template_name(params.name),
        source=source or "a file",
        url=params.url or "",
        size_bytes=params.size,
        expected=None if checksum is None else parse_checksum(checksum, parameter="sha256"),
        format=params.format,
        os=_words(params.os, "os") or params.name,
        firmware=params.firmware,
        identity=params.identity,
    )


def build_vm_import(params: VmImportParams) -> VmImportRequest:
    """Check what can be checked without looking at anything; raises InvalidArgumentError."""
    if (params.size is None) != params.pieces:
        raise InvalidArgumentError(
            "a vm is sent by the caller with its size, or in pieces: give one of them",
            parameter="size",
        )
    _check_bytes(params.size, MAX_ARCHIVE_BYTES)
    return VmImportRequest(
        source=_words(params.file_name, "file_name") or "the file",
        size_bytes=params.size,
        name=None if params.name is None else check_name(params.name),
        network=params.network,
        has_new_identity=params.new_identity,
    )


def _check_bytes(size: int | None, most: int) -> None:
    if size is not None and not 0 < size <= most:
        raise InvalidArgumentError(
            f"size {size} is not between 1 byte and {most >> 40} TiB", parameter="size"
        )


def _check_waits(params: TemplateImportParams) -> None:
    if not params.wait:
        raise InvalidArgumentError(
            "the caller has to stay until its file is there",
            hint="leave wait out, or give a url",
            parameter="wait",
        )


def _check_address(url: str) -> None:
    if len(url) > _MAX_URL_LENGTH or not (url.isascii() and url.isprintable()) or " " in url:
        raise InvalidArgumentError(
            f"url {url!r:.200} has characters no address has, or more than {_MAX_URL_LENGTH}",
            parameter="url",
        )
    check_url(url)
    if urlsplit(url).username is not None:
        raise InvalidArgumentError(
            "a url with a user or password in it is not taken: it would be kept and shown",
            parameter="url",
        )


def _words(text: str, parameter: str) -> str:
    if not text.isprintable() or len(text) > _MAX_WORDS_LENGTH:
        raise InvalidArgumentError(
            f"{parameter} {text!r:.80} has control characters or is longer than "
            f"{_MAX_WORDS_LENGTH}",
            parameter=parameter,
        )
    return text
