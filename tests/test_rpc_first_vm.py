"""The first vm of a template that is declared only: the template is made on the way."""

import threading
from typing import Any

import pytest
from daemon_process import LIMIT_SECONDS, Box, RpcError

DECLARATION = """\
description = "Made when it is needed"
os = "Fake 2"
min_mem_size = "64M"
[source]
kind = "build"
[guest]
identity = "serial"
"""
# Goes on when it is let, or when it has waited for long enough.
BUILD = """\
#!/bin/sh
echo once >>{root}/builds
echo "progress: 40 half of it"
for _ in $(seq 300); do
    [ ! -e {root}/go ] || break
    sleep 0.1
done
[ ! -e {root}/fail ] || {{ echo out of luck; exit 3; }}
qemu-img create -q -f qcow2 "$1/disk.qcow2" 1M
"""


@pytest.fixture
def declared(box: Box) -> Box:
    """Give a daemon that has the template `made` declared."""
    box.end()
    directory = box.root / "declared/made"
    directory.mkdir(parents=True)
    (directory / "template.toml").write_text(DECLARATION)
    (directory / "build").write_text(BUILD.format(root=box.root))
    (directory / "build").chmod(0o755)
    config = box.root / "oscloud.toml"
    known = f'template_dirs = ["{box.root}/declared"]'
    config.write_text(config.read_text().replace("template_dirs = []", known))
    box.start()
    return box


def builds(box: Box) -> int:
    path = box.root / "builds"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_it_is_made_once_for_all_who_want_a_vm(declared: Box) -> None:
    vms: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []

    def create(name: str) -> None:
        with declared.connect() as line:
            given = {"mem_size": "64M", "disk_size": "16M", "wait": "started", "image": "made"}
            vms.append(line.call("vm_create", heard.append, name=name, **given))

    threads = [threading.Thread(target=create, args=(name,)) for name in ("web", "shop")]
    for thread in threads:
        thread.start()
    told = ("building", "half of it", 0.4)
    declared.until(lambda: [stage(step) for step in heard].count(told) == 2, "both to be told")
    assert declared.call("vm_list") == []
    (declared.root / "go").touch()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert sorted(vm["name"] for vm in vms) == ["shop", "web"]
    assert {vm["os"] for vm in vms} == {"made"}
    assert builds(declared) == 1
    assert declared.call("template_info", template="made")["used_by"] == 2


def stage(step: dict[str, Any]) -> tuple[str, str, float | None]:
    return step["stage"], step["message"], step["fraction"]


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"name": "taken"}, "already_exists"),
        ({"network": "none"}, "not_found"),
        ({"mem_size": "32M"}, "invalid_argument"),
        ({"mem_size": "64T"}, "exhausted"),
        ({"user_data": "#cloud-config\n"}, "invalid_argument"),
        ({"image": "unheard_of"}, "not_found"),
        ({"wait": "none"}, "invalid_state"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else one,
)
def test_nobody_waits_for_it_to_be_refused_then(
    declared: Box, params: dict[str, Any], kind: str
) -> None:
    declared.create("taken")
    with pytest.raises(RpcError) as refused:
        declared.create(**{"name": "web", "image": "made", **params})
    assert refused.value.kind == kind
    assert builds(declared) == 0


def test_a_making_that_fails_says_why_and_leaves_no_vm(declared: Box) -> None:
    (declared.root / "go").touch()
    (declared.root / "fail").touch()
    with pytest.raises(RpcError, match="status 3") as failed:
        declared.create("web", image="made")
    assert failed.value.kind == "host_failure"
    assert declared.call("vm_list") == []
    assert declared.call("template_info", template="made")["state"] == "MISSING"
    (declared.root / "fail").unlink()
    assert declared.create("web", image="made")["os"] == "made"
    assert builds(declared) == 2
