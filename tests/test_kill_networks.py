"""The daemon killed at every transaction and process of making and deleting a network.

It is there or it is not, and of one that is not neither its bridge nor its rules stay.
"""

import pytest
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import count_deaths
from test_kill_templates import die
from test_rpc_firewall import ruleset
from test_rpc_networks import bridges, names

matrix = pytest.mark.parametrize(
    ("at", "when"),
    [(at, when) for at in ("transaction", "process") for when in ("before", "after")],
)


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    return zygote_box


def use(box: ZygoteBox) -> str:
    """Have the network's bridge and rules there; give the bridge's name."""
    box.create("web", network="lab")
    box.call("vm_delete", vm="web", force=True)
    bridge: str = box.call("network_info", network="lab")["bridge"]
    assert bridge in bridges(box)
    assert bridge in ruleset(box)
    return bridge


@matrix
def test_killed_while_making(box: ZygoteBox, at: str, when: str) -> None:
    def kill_at(number: int) -> bool:
        died = die(box, Death(at, number, when), "network_create", name="lab")
        if "lab" not in names(box):
            box.call("network_create", name="lab")
        use(box)
        box.call("network_delete", network="lab")
        return died

    assert count_deaths(kill_at) >= 1


@matrix
def test_killed_while_deleting(box: ZygoteBox, at: str, when: str) -> None:
    def kill_at(number: int) -> bool:
        box.call("network_create", name="lab")
        bridge = use(box)
        died = die(box, Death(at, number, when), "network_delete", network="lab")
        if "lab" in names(box):
            box.call("network_delete", network="lab")
        # A daemon that starts sweeps.
        box.until(lambda: bridge not in bridges(box), "the end of the bridge")
        box.until(lambda: bridge not in ruleset(box), "the end of its rules")
        return died

    assert count_deaths(kill_at) >= 1
