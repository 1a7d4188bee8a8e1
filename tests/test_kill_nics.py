"""The daemon killed at every transaction and renaming of giving a vm that is off its cards anew.

It has them and its other settings all, or what it had; nobody else's address is left with it.
"""

from typing import Any

import pytest
from cloud_accounts import check_accounted
from daemon_zygote import ZygoteBox
from dying_daemon import Death
from test_kill_matrix import count_deaths
from test_kill_templates import die

WAS = {"network": ["default", "lab", "tight"], "cpus": 1, "name": "web"}
WANTED = {"network": ["default", "tight", "more"], "cpus": 2, "name": "blog"}


@pytest.fixture(scope="module")
def box(zygote_box: ZygoteBox) -> ZygoteBox:
    for number, name in enumerate(("lab", "tight", "more")):
        zygote_box.call("network_create", name=name, subnet=f"10.{20 + number}.0.0/29")
    zygote_box.create("web", network=WAS["network"])
    zygote_box.call("vm_stop", vm="web", force=True)
    return zygote_box


def settings(box: ZygoteBox) -> dict[str, Any]:
    [vm] = box.call("vm_list")
    networks = sorted(nic["network"] for nic in vm["nics"])
    return {"network": networks, "cpus": vm["cpus"], "name": vm["name"]}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["transaction", "renaming"])
def test_killed_while_its_cards_are_set(box: ZygoteBox, at: Any, when: Any) -> None:
    as_it_was, as_wanted = ({**each, "network": sorted(each["network"])} for each in (WAS, WANTED))
    ends = []
    [vm] = box.call("vm_list")

    def kill_at(number: int) -> bool:
        died = die(box, Death(at, number, when), "vm_set", vm=vm["id"], **WANTED)
        check_accounted(box)
        ends.append(settings(box))
        assert ends[-1] in (as_it_was, as_wanted)
        assert died or ends[-1] == as_wanted
        box.call("vm_set", vm=vm["id"], **WAS)
        check_accounted(box)
        return died

    assert count_deaths(kill_at) > 0
    assert at == "renaming" or as_it_was in ends
