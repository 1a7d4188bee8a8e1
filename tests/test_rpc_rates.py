"""A vm's bandwidth: set, shown, kept through restarts, and put back."""

import re
import signal
import subprocess

import pytest
from daemon_process import Box, RpcError


def limits(box: Box) -> dict[str, int]:
    """Give the bytes a second of each tap's two directions."""
    command = [
        "ip",
        "netns",
        "exec",
        box.namespace,
        "nft",
        "list",
        "table",
        "netdev",
        "oscloud_rates",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    chains = re.findall(r"chain (\w+) \{.+?rate over ([0-9]+) (\w*)bytes/second", done.stdout, re.S)
    scale = {"": 1, "k": 1024, "m": 1 << 20}
    return {name: int(rate) * scale[unit] for name, rate, unit in chains}


def both(rate: int) -> dict[str, int]:
    return {"osctap0_ingress": rate, "osctap0_egress": rate}


def test_a_bandwidth_is_set_shown_and_taken_away(box: Box) -> None:
    vm = box.create("web", bandwidth="80M")
    assert vm["bandwidth"] == 80_000_000
    assert limits(box) == both(10_000_000)
    assert box.create("other")["bandwidth"] is None
    assert box.call("vm_set", vm="web", bandwidth=8_000_000)["bandwidth"] == 8_000_000
    assert limits(box) == both(1_000_000)
    for way in ("stop", "kill", "flush", "restart"):
        if way == "stop":
            box.call("vm_stop", vm="web", force=True)
            box.call("vm_start", vm="web")
        elif way == "restart":
            box.call("vm_restart", vm="web", force=True)
        else:
            if way == "kill":
                box.end(signal.SIGKILL)
            flush = ["ip", "netns", "exec", box.namespace, "nft", "flush", "ruleset"]
            subprocess.run(flush, check=True)
            if way == "kill":
                box.start()
        box.until(lambda: limits(box) == both(1_000_000), f"the limit after {way}")
    assert box.call("vm_set", vm="web", bandwidth="none")["bandwidth"] is None
    assert limits(box) == {}
    box.call("vm_set", vm="web", bandwidth="1G")
    box.call("vm_delete", vm="web")
    assert limits(box) == {}
    box.create("web")
    assert limits(box) == {}
    for rate in ("", "fast", "1", 0, -5, "9999G"):
        with pytest.raises(RpcError) as refused:
            box.call("vm_set", vm="web", bandwidth=rate)
        assert refused.value.kind == "invalid_argument"
