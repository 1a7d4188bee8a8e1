"""An image as vendors have it, for tests: built once, and kept until what builds it changes."""

import hashlib
import subprocess
from pathlib import Path

from kept import KEPT, ROOT, keep

SOURCES = (ROOT / "tests/cloud_image/build", ROOT / "templates/build-functions")


def ensure_vendor_image() -> Path:
    """Give the image, a qcow2."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()
    return keep(KEPT / f"built/vendor_image-{digest[:16]}", _build) / "disk.qcow2"


def _build(directory: Path) -> None:
    directory.mkdir()
    subprocess.run([SOURCES[0], directory], check=True, stdout=subprocess.DEVNULL)
