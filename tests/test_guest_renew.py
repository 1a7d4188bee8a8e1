"""The program that renews a guest's random numbers is what its source says."""

import subprocess
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def assemble(source: str, directory: Path) -> bytes:
    """Give what the commands in the source's own head make of it."""
    (directory / "renew.S").write_text(source)
    commands = [line[4:].split() for line in source.splitlines() if line.startswith("#   ")]
    assert [command[0] for command in commands] == ["as", "objcopy"]
    for command in commands:
        subprocess.run(command, cwd=directory, check=True)
    return (directory / "renew.bin").read_bytes()


def test_the_kept_program_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    source = (TEMPLATES / "renew.S").read_text()
    kept = (TEMPLATES / "renew.bin").read_bytes()
    assert assemble(source, tmp_path) == kept
    assert assemble(source.replace("0x40085203", "0x40085204"), tmp_path) != kept
