"""What is wanted against what is seen: restart policies, the host's boot, qemus that hang."""

import os
import signal
from typing import Any

import pytest
from daemon_process import Box, RpcError


def kill(box: Box, vm: dict[str, Any], number: int = signal.SIGKILL) -> None:
    assert vm["pid"] in box.qemus()
    os.kill(vm["pid"], number)


def seen(box: Box, name: str) -> tuple[str, str, str]:
    vm = box.call("vm_info", vm=name)
    return vm["state"], vm["wanted_state"], vm["reason"]


def revived(box: Box, vm: dict[str, Any]) -> dict[str, Any]:
    """Wait until a vm runs as another process."""

    def is_new() -> bool:
        now = box.call("vm_info", vm=vm["id"])
        return now["state"] == "RUNNING" and now["pid"] not in (None, vm["pid"])

    box.until(is_new, "the vm started again")
    now: dict[str, Any] = box.call("vm_info", vm=vm["id"])
    return now


def stays_down(box: Box, vm: dict[str, Any]) -> None:
    """A second vm that is killed after it has come back, and the first has not."""
    other = box.create(f"other{vm['id']}", restart="always")
    kill(box, other)
    revived(box, other)
    assert box.call("vm_info", vm=vm["id"])["pid"] is None
    box.call("vm_delete", vm=other["id"], force=True)


@pytest.mark.parametrize("policy", ["on-failure", "always"])
def test_a_vm_that_is_killed_is_started_again(box: Box, policy: str) -> None:
    vm = box.create("web", restart=policy)
    assert (vm["restart"], vm["autostart"]) == (policy, "no")
    kill(box, vm)
    again = revived(box, vm)
    kill(box, again)
    assert revived(box, again)["wanted_state"] == "RUNNING"


def test_without_a_policy_it_stays_down_and_says_why(box: Box) -> None:
    vm = box.create("web")
    kill(box, vm)
    box.wait("web", "CRASHED")
    assert seen(box, "web") == (
        "CRASHED",
        "RUNNING",
        "qemu was ended by SIGKILL, which was not ours",
    )
    stays_down(box, vm)


def test_a_guest_that_powers_itself_off_is_no_failure(box: Box) -> None:
    vm = box.create("web", restart="on-failure")
    box.call("vm_qemu_command", vm="web", command="system_powerdown")
    box.wait("web", "STOPPED")
    assert seen(box, "web") == ("STOPPED", "STOPPED", "the guest powered itself off")
    stays_down(box, vm)


def test_a_guest_that_powers_itself_off_is_started_again_if_always(box: Box) -> None:
    vm = box.create("web", restart="always")
    box.call("vm_qemu_command", vm="web", command="system_powerdown")
    revived(box, vm)


def test_no_policy_revives_what_its_user_has_stopped(box: Box) -> None:
    vm = box.create("web", restart="always")
    box.call("vm_stop", vm="web", force=True)
    assert seen(box, "web") == ("STOPPED", "STOPPED", "stopped by the user")
    stays_down(box, vm)
    box.end(signal.SIGKILL)
    box.start()
    stays_down(box, vm)


def test_a_stop_while_a_start_is_put_off_stands(box: Box) -> None:
    vm = box.create("web-crash_after_cont", restart="always")
    box.wait(vm["id"], "CRASHED")
    box.call("vm_stop", vm=vm["id"])
    assert box.call("vm_info", vm=vm["id"])["wanted_state"] == "STOPPED"
    stays_down(box, vm)


def test_a_policy_set_on_a_vm_that_is_down_takes_effect(box: Box) -> None:
    vm = box.create("web")
    kill(box, vm)
    box.wait("web", "CRASHED")
    assert box.call("vm_set", vm="web", restart="on-failure")["restart"] == "on-failure"
    revived(box, vm)
    changed = box.call("vm_set", vm="web", autostart="last-state")
    assert (changed["autostart"], changed["restart"]) == ("last-state", "on-failure")


def test_a_vm_killed_while_the_daemon_was_away_is_started_by_the_next(box: Box) -> None:
    vm = box.create("web", restart="on-failure")
    box.end(signal.SIGKILL)
    kill(box, vm)
    box.until(lambda: not box.qemus(), "the end of qemu")
    box.start()
    revived(box, vm)


def reboot(box: Box) -> None:
    """What the database and the host look like after the host has booted anew."""
    box.end(signal.SIGKILL)
    for pid in box.qemus():
        os.kill(pid, signal.SIGKILL)
    box.until(lambda: not box.qemus(), "the end of all qemus")
    earlier = "00000000-0000-0000-0000-000000000000"
    box.rows("UPDATE vm SET qemu_boot_id = ? WHERE qemu_boot_id IS NOT NULL", earlier)
    box.rows("UPDATE meta SET value = ? WHERE name = 'boot_id'", earlier)
    box.start()


def test_a_boot_of_the_host_starts_what_is_meant_to_start(box: Box) -> None:
    for name, autostart in (("no", "no"), ("yes", "yes"), ("last", "last-state")):
        box.create(f"{name}-ran", autostart=autostart, restart="always")
        box.create(f"{name}-stopped", autostart=autostart, restart="always")
        box.call("vm_stop", vm=f"{name}-stopped", force=True)
    reboot(box)
    for name in ("yes-ran", "yes-stopped", "last-ran"):
        box.wait(name, "RUNNING")
    assert seen(box, "no-ran") == ("STOPPED", "STOPPED", "the host was rebooted")
    for name in ("no-stopped", "last-stopped"):
        assert seen(box, name) == ("STOPPED", "STOPPED", "stopped by the user")
    assert len(box.qemus()) == 3
    # A daemon that merely starts anew starts no vm.
    box.call("vm_stop", vm="yes-ran", force=True)
    box.end()
    box.start()
    assert seen(box, "yes-ran")[0] == "STOPPED"


def test_a_host_that_goes_down_takes_no_wish_with_it(box: Box) -> None:
    box.create("last", autostart="last-state", restart="always")
    box.create("no")
    hung = box.create("hung", autostart="yes")
    os.kill(hung["pid"], signal.SIGSTOP)
    box.wait("hung", "UNRESPONSIVE")
    box.create("off", autostart="last-state")
    box.call("vm_stop", vm="off", force=True)
    answer = box.call("daemon_stop_guests", timeout=10)
    assert (sorted(answer["stopped"]), answer["left"]) == (["hung", "last", "no"], [])
    assert not box.qemus()
    for name in ("last", "no", "hung"):
        assert seen(box, name) == ("STOPPED", "RUNNING", "stopped with the host")
    assert box.call("daemon_stop_guests") == {"stopped": [], "left": []}
    reboot(box)
    for name in ("last", "hung"):
        box.wait(name, "RUNNING")
    for name in ("no", "off"):
        assert seen(box, name)[:2] == ("STOPPED", "STOPPED")


def test_a_hung_qemu_is_told_and_holds_up_nobody(box: Box) -> None:
    vm, other = box.create("web"), box.create("shop")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.wait("web", "UNRESPONSIVE")
    assert "does not answer" in seen(box, "web")[2]
    assert {each["name"] for each in box.call("vm_list")} == {"web", "shop"}
    assert box.call("vm_restart", vm="shop")["pid"] != other["pid"]
    with pytest.raises(RpcError) as refused:
        box.call("vm_stop", vm="web")
    assert refused.value.kind == "invalid_state"
    assert "--force" in refused.value.data["hint"]
    os.kill(vm["pid"], signal.SIGCONT)
    box.wait("web", "RUNNING")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.wait("web", "UNRESPONSIVE")
    assert box.call("vm_stop", vm="web", force=True)["state"] == "STOPPED"


def test_a_qemu_that_hangs_when_a_daemon_starts_is_left_alone(box: Box) -> None:
    vm, other = box.create("web"), box.create("shop")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.end(signal.SIGKILL)
    box.start()
    assert box.call("vm_info", vm="shop")["pid"] == other["pid"]
    box.wait("web", "UNRESPONSIVE")
    assert box.call("vm_restart", vm="shop", force=True)["state"] == "RUNNING"
    os.kill(vm["pid"], signal.SIGCONT)
    assert box.wait("web", "RUNNING")["pid"] == vm["pid"]
    assert "login:" in box.call("vm_log", vm="web")["text"]
    assert box.call("vm_stop", vm="web")["state"] == "STOPPED"


def test_the_same_when_it_never_answers_again(box: Box) -> None:
    vm = box.create("web")
    os.kill(vm["pid"], signal.SIGSTOP)
    box.end(signal.SIGKILL)
    box.start()
    box.wait("web", "UNRESPONSIVE")
    assert box.call("vm_delete", vm="web", force=True)["deleted"] == vm["id"]


def restart_with(box: Box, min_free_disk: str) -> None:
    box.end()
    config = box.root / "oscloud.toml"
    kept = config.read_text().partition("[limits]")[0]
    config.write_text(f'{kept}[limits]\nmin_free_disk = "{min_free_disk}"\n')
    box.start()


def test_a_full_disk_pauses_until_there_is_space_and_a_user_for_as_long_as_he_likes(
    box: Box,
) -> None:
    for name in ("web", "shop"):
        box.create(name)
    restart_with(box, "1000000T")
    for name in ("web", "shop"):
        box.call("vm_qemu_command", vm=name, command="x-disk-full")
        assert "the host's disk is full" in box.wait(name, "PAUSED")["reason"]
    assert box.call("vm_pause", vm="web")["reason"] == "paused by the user"
    restart_with(box, "1M")
    box.wait("shop", "RUNNING")
    assert seen(box, "web") == ("PAUSED", "RUNNING", "paused by the user")
    assert box.call("vm_resume", vm="web")["state"] == "RUNNING"
    # Resumed by hand and paused again, the disk is no longer why.
    box.call("vm_qemu_command", vm="shop", command="x-disk-full")
    box.wait("shop", "RUNNING")
