"""Waiting for what a guest shows of itself, and what is said when it does not."""

import threading
from typing import Any

import pytest
from daemon_process import LIMIT_SECONDS, Box, RpcError

ADDRESS = "192.168.0.2"


def wait(box: Box, sign: str, timeout: float = LIMIT_SECONDS) -> Any:
    return box.call("vm_wait", vm="web", timeout=timeout, **{"for": sign})


def test_a_sign_is_waited_for_until_it_is_there(box: Box) -> None:
    box.create("web")
    found: list[str] = []

    def look(sign: str) -> None:
        found.append(wait(box, sign)["name"])

    signs = ("ssh", "port:22", "address", "running")
    waiting = [threading.Thread(target=look, args=[sign]) for sign in signs]
    for thread in waiting:
        thread.start()
    with box.sshd_at(ADDRESS):
        for thread in waiting:
            thread.join(LIMIT_SECONDS)
        assert found == ["web"] * len(signs)
        # The address is there, and nobody listens.
        with pytest.raises(RpcError, match="connection refused") as refused:
            wait(box, "port:80", timeout=0.5)
        assert refused.value.kind == "timeout"
        assert "192.168.0.2 port 80 within 0.5 s" in refused.value.message
        for sign in ("address", "ready"):
            assert wait(box, sign)["name"] == "web"


def test_a_guest_that_shows_nothing_or_is_off_is_told(box: Box) -> None:
    box.create("web")
    with pytest.raises(RpcError, match=r"within 0.5 s: (nothing came back|no route to host)"):
        wait(box, "ssh", timeout=0.5)
    failed: list[RpcError] = []

    def look() -> None:
        with pytest.raises(RpcError) as error:
            wait(box, "ssh")
        failed.append(error.value)

    waiting = threading.Thread(target=look)
    waiting.start()
    box.call("vm_stop", vm="web", force=True)
    waiting.join(LIMIT_SECONDS)
    with pytest.raises(RpcError) as error:
        wait(box, "port:80")
    for each in (failed[0], error.value):
        assert each.kind == "invalid_state"
        assert "it is STOPPED" in each.message
        assert "vm-start web" in each.data["hint"]
