"""What is removed of a vm's files, and what is not."""

from pathlib import Path

from oscloudd.cloud.vm_paths import VmPaths


def test_a_disk_that_is_kept_keeps_nothing_of_its_vms(tmp_path: Path) -> None:
    paths = VmPaths(tmp_path / "run", tmp_path / "disk", tmp_path / "log", tmp_path / "console")
    for directory in (paths.run_directory, paths.disk_directory, paths.suspended):
        directory.mkdir()
    for path in (paths.disk, paths.seed, paths.variables, paths.qemu_log, paths.console_log):
        path.touch()
    paths.remove(keeps_disk=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["disk", paths.disk.name]
    paths.remove()
    assert list(tmp_path.iterdir()) == []
