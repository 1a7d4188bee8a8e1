"""The daemon killed at every transaction, process start and renaming of bringing and deleting one.

A template is there whole or not at all, and nothing is left that the next daemon does not see to.
"""

import os
from collections.abc import Iterator

import pytest
from bad_images import qcow2
from cloud_accounts import settle
from daemon_process import IMAGE
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from image_server import ImageServer, serve_images
from test_kill_matrix import ask_to_die, count_deaths, wait_for_death

NAME = "mine"
WHOLE = {"digest", "disk.qcow2", "template.toml"}
matrix = pytest.mark.parametrize(
    ("at", "when"),
    [(at, when) for at in ("transaction", "process", "renaming") for when in ("before", "after")],
)


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    os.environ["no_proxy"] = "*"
    return zygote_box


@pytest.fixture(scope="module")
def server(box: ZygoteBox) -> Iterator[ImageServer]:
    with serve_images(box) as server:
        server.put("disk.img", qcow2())
        yield server


def left(box: ZygoteBox) -> dict[str, set[str]]:
    """Give what there is of templates but the box's own: directories, and the files in each."""
    found = (box.root / "state/templates").iterdir()
    return {path.name: set(os.listdir(path)) for path in found if path.name != IMAGE}


def die(box: ZygoteBox, death: Death, method: str, **params: str) -> bool:
    """Have the daemon die at this call; False when it had come to rest before."""
    _question, died = ask_to_die(box, death, method, **params)
    if died:
        wait_for_death(box)
        box.start()
    settle(box)
    return died


@matrix
def test_killed_while_importing(box: ZygoteBox, server: ImageServer, at: str, when: str) -> None:
    def kill_at(number: int) -> bool:
        died = die(
            box, Death(at, number, when), "template_import", name=NAME, url=server.url("disk.img")
        )
        there = left(box)
        kept = there.pop(f".download-{NAME}", set())
        assert kept <= {"image", "image.part", "image.part.json"}
        assert there in ({}, {NAME: WHOLE}), there
        if not there:
            box.call("template_import", name=NAME, url=server.url("disk.img"))
            assert left(box) == {NAME: WHOLE}
        box.call("template_delete", template=NAME)
        assert left(box) == {}
        return died

    assert count_deaths(kill_at) > 0


@matrix
def test_killed_while_deleting(box: ZygoteBox, server: ImageServer, at: str, when: str) -> None:
    def kill_at(number: int) -> bool:
        box.call("template_import", name=NAME, url=server.url("disk.img"))
        died = die(box, Death(at, number, when), "template_delete", template=NAME)
        there = left(box)
        assert there in ({}, {NAME: WHOLE}), there
        if there:
            assert died
            box.call("template_delete", template=NAME)
        return died

    deaths = count_deaths(kill_at)
    assert deaths > 0 or at == "process"
