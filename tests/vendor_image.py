"""An image as vendors have it, for tests: built once, and kept until what builds it changes."""

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

from guest_cloud import ROOT

BUILT = ROOT / ".run/test/built"
SOURCES = (ROOT / "tests/cloud_image/build", ROOT / "templates/build-functions")


def ensure_vendor_image() -> Path:
    """Give the image, a qcow2; who comes while it is being built waits for that."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    kept = BUILT / f"vendor_image-{digest.hexdigest()[:16]}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "vendor_image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for stale in BUILT.glob("vendor_image-*"):
                shutil.rmtree(stale)
            part = kept.with_suffix(".part")
            part.mkdir()
            subprocess.run([SOURCES[0], part], check=True, stdout=subprocess.DEVNULL)
            part.rename(kept)
    return kept / "disk.qcow2"
