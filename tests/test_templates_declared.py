"""The templates that come with the program: each can be read, and says where it is from."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from oscloudd.cloud.template_files import find_declarations, read_declaration

DECLARED = find_declarations([str(Path(__file__).parent.parent / "templates")])


def test_they_are_these() -> None:
    assert sorted(DECLARED) == [
        "debian_12", "debian_12_cloud", "fedora", "tiny", "ubuntu_22.04", "ubuntu_24.04",
    ]  # fmt: skip


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_downloaded_is_checked_and_boots_by_itself(name: str) -> None:
    declaration = read_declaration(DECLARED[name])
    source = declaration.source
    assert declaration.guest.takes_ipv6
    if source.kind != "download":
        assert (DECLARED[name] / "build").is_file()
        return
    assert (urlsplit(source.url).scheme, urlsplit(source.checksums_url).scheme) == (
        "https", "https",
    )  # fmt: skip
    assert source.url.rpartition("/")[0] == source.checksums_url.rpartition("/")[0]
    assert source.url.endswith(f"/{source.file_name}")
    assert source.format == declaration.image.format
    assert (declaration.guest.identity, declaration.boot.kernel) == ("cloud-init", "")
