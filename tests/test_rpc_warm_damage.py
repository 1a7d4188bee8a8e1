"""A warm image that is not what was made: a vm starts cold or is refused, and is never broken.

Which qemu it is does not matter here; `test_guest_warm_cloud` has real guests for some of it.
"""

import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud_accounts import check_accounted, tail
from daemon_process import IMAGE, Box, RpcError

ADDRESS = "192.168.7.7"
FILES = ("memory", "state", "disk.qcow2", "warm.json")
SIZES = iter(range(65, 1000))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    flip_at(path, 0)


def flip_in_the_middle(path: Path) -> None:
    flip_at(path, path.stat().st_size // 2)


def flip_at_the_end(path: Path) -> None:
    flip_at(path, path.stat().st_size - 1)


def flip_at(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def put_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_a_link(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def give_away(path: Path) -> None:
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)


DAMAGES: tuple[Callable[[Path], None], ...] = (
    cut, empty, flip, flip_in_the_middle, flip_at_the_end, Path.unlink, put_a_directory,
    put_a_link, give_away,
)  # fmt: skip


@pytest.fixture(scope="module")
def cloud(shared_box: Box) -> Iterator[Box]:
    with shared_box.sshd_at(ADDRESS):
        yield shared_box


def make_image(box: Box) -> tuple[dict[str, Any], Path]:
    """Make an image of a shape that no other test has; give the shape and its directory."""
    shape = {"mem_size": f"{next(SIZES)}M", "disk_size": "16M"}
    box.call("template_warm", template=IMAGE, **shape)
    [name] = names_of(box, shape)
    return shape, box.root / "state/warm" / name


def names_of(box: Box, shape: dict[str, Any]) -> list[str]:
    size = int(shape["mem_size"][:-1]) << 20
    every = box.call("template_info", template=IMAGE)["warm"]
    return [image["name"] for image in every if image["mem_size"] == size]


def started(box: Box, **params: Any) -> str:
    """Make a vm that is ready, see that it is whole, delete it; give how it was started."""
    vm = box.create("web", ip=ADDRESS, wait="ready", **params)
    check_accounted(box)
    console = (box.root / f"log/vm-{vm['id']}.console.log").read_text()
    assert console.rstrip().endswith("web login:"), console
    box.call("vm_delete", vm="web", force=True)
    return str(vm["started"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_what_is_damaged_is_passed_over(
    cloud: Box, file: str, damage: Callable[[Path], None]
) -> None:
    shape, directory = make_image(cloud)
    assert started(cloud, warm="only", **shape) == "warm"
    damage(directory / file)
    cloud.end()
    cloud.start()
    with pytest.raises(RpcError, match="there is no warm image") as refused:
        started(cloud, warm="only", **shape)
    assert refused.value.kind == "invalid_state"
    check_accounted(cloud)
    assert started(cloud, warm="auto", **shape) == "cold"
    # Nor is it in the way of another.
    cloud.call("template_warm", template=IMAGE, **shape)
    assert directory.name not in names_of(cloud, shape)
    assert started(cloud, warm="only", **shape) == "warm"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", ["memory", "state"])
def test_damaged_while_it_is_in_use(cloud: Box, file: str, damage: Callable[[Path], None]) -> None:
    # The memory is the daemon's own copy by then, and the state is checked at each start.
    shape, directory = make_image(cloud)
    damage(directory / file)
    assert started(cloud, warm="auto", **shape) in ("warm", "cold")
    assert "Traceback" not in tail(cloud)


def test_a_vm_whose_frozen_disk_is_gone_says_so(cloud: Box) -> None:
    shape, directory = make_image(cloud)
    cloud.create("web", ip=ADDRESS, wait="ready", warm="only", **shape)
    cloud.call("vm_stop", vm="web", force=True)
    (directory / "disk.qcow2").unlink()
    with pytest.raises(RpcError, match=f"{directory}/disk.qcow2 can't be read") as refused:
        cloud.call("vm_start", vm="web")
    assert refused.value.kind == "host_failure"
    assert cloud.call("vm_info", vm="web")["state"] == "ERROR"
    check_accounted(cloud)
    cloud.call("vm_delete", vm="web", force=True)


def test_a_clone_that_dies_while_it_is_told_is_started_cold(cloud: Box) -> None:
    shape, _ = make_image(cloud)
    vm = cloud.create("web-crash_when_told", ip=ADDRESS, wait="ready", warm="only", **shape)
    assert (vm["state"], vm["ready"], vm["started"]) == ("RUNNING", True, "cold")
    check_accounted(cloud)
    cloud.call("vm_delete", vm=vm["id"], force=True)
