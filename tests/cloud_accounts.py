"""What there is of vms on a host against what the list accounts for; asking a daemon that dies.

`check_accounted` is the invariant of every kill: nothing of a vm is missing, and nothing else is
there.
"""

import json
import time
from typing import Any

from daemon_process import Box, Line, RpcError
from fake_qemu import TORN

from oscloudd.host.network.name_server import is_installed

SETTLE_SECONDS = 90.0


def tail(box: Box, characters: int = 5000) -> str:
    """Give the end of the daemons' log, without who has asked for what."""
    lines = box.log()[-10 * characters :].splitlines(keepends=True)
    return "".join(line for line in lines if " oscloudd.api." not in line)[-characters:]


# What there must be


def expected_traces(box: Box) -> dict[str, Any]:
    """Give what `Box.traces` must find when the vms of the list are all there is."""
    vms = box.call("vm_list")
    disks = [disk["id"] for disk in box.call("disk_list")]
    bridges = {network["name"]: network["bridge"] for network in box.call("network_list")}
    nics = [(vm, nic) for vm in vms for nic in vm["nics"]]
    live = [vm for vm in vms if vm["pid"] is not None]
    logs = [f"log/vm-{vm['id']}{kind}.log" for vm in vms for kind in ("", ".console")]
    layers = needed_layers(box)
    snapshots = box.rows(
        "SELECT vm_id, snapshot.name, kind, layer_id FROM snapshot JOIN vm ON vm.id = vm_id"
        " ORDER BY snapshot.id"
    )
    expected: dict[str, Any] = {
        "layer rows": layers,
        "layers": sorted(f"state/layers/{number}" for number in layers),
        "snapshot rows": [row[:2] for row in snapshots],
        "memory of layers": sorted(
            f"state/layers/{layer}/memory" for _, _, kind, layer in snapshots if kind == "memory"
        ),
        "vm rows": sorted((vm["id"], vm["name"]) for vm in vms),
        "disk rows": sorted(disks),
        "nic rows": sorted((vm["id"], nic["slot"], nic["ip"]) for vm, nic in nics if nic["slot"]),
        "taps": sorted(nic["tap"] for vm, nic in nics if vm in live),
        "addresses": sorted(a for vm, nic in nics if vm in live for a in addresses_of(nic)),
        "ports": sorted(f"127.0.0.1:{vm['serial_port']}" for vm in live),
        "processes": sorted(vm["pid"] for vm in live),
        "run directories": sorted(f"run/vms/{vm['id']}" for vm in live),
        "disks": sorted(f"state/disks/{disk}" for disk in disks),
        "saved memory": sorted(
            f"state/disks/{vm['disk']}/suspended" for vm in vms if vm["state"] == "SUSPENDED"
        ),
        "logs": sorted(logs),
        "names": sorted(
            f"run/names/{bridges[nic['network']]}/hosts/{vm['id']}"
            for vm, nic in nics
            if is_installed()
        ),
        "port rows": sorted((vm["id"], spec) for vm in vms for spec in vm["ports"]),
        "forwarded ports": sorted(rule_of(spec, vm["ip"]) for vm in vms for spec in vm["ports"]),
    }
    return {name: what for name, what in expected.items() if what}


def needed_layers(box: Box) -> list[int]:
    """Give the layers that a disk of a vm or a snapshot stands on."""
    parents = dict(box.rows("SELECT id, parent_id FROM layer WHERE whole"))
    tops = box.rows("SELECT layer_id FROM disk UNION SELECT layer_id FROM snapshot")
    needed: set[int] = set()
    for (layer,) in tops:
        while layer is not None:
            needed.add(layer)
            layer = parents[layer]
    return sorted(needed)


def addresses_of(vm: dict[str, Any]) -> list[str]:
    """Give a vm's addresses of both families."""
    return [vm["ip"]] if vm["ip6"] is None else [vm["ip"], vm["ip6"]]


def rule_of(spec: str, guest_address: str) -> str:
    """Give what the host's rules say of a port that `vm_info` shows."""
    address, port, rest = spec.split(":")
    guest_port, protocol = rest.split("/")
    key = f"{protocol} . {port}" if address == "0.0.0.0" else f"{address} . {protocol} . {port}"
    return f"{key} : {guest_address} . {guest_port}"


def seen_traces(box: Box) -> dict[str, Any]:
    """Give what there is, without what tests themselves have put there."""
    seen = box.traces()
    off = [vm for vm in box.call("vm_list") if vm["pid"] is None]
    down = {address for vm in off for nic in vm["nics"] for address in addresses_of(nic)}
    seen["vm rows"] = sorted(seen.get("vm rows", []))
    seen["disk rows"] = sorted(number for number, _name in seen.get("disk rows", []))
    # A vm that is down keeps its address, and its neighbour entry may stay.
    seen["addresses"] = [ip for ip in seen.get("addresses", []) if ip not in down]
    # Stand-ins for sshd; the telnet ports are all on one address.
    seen["ports"] = [port for port in seen.get("ports", []) if not port.endswith(":22")]
    return {name: what for name, what in seen.items() if what}


def check_accounted(box: Box) -> None:
    """Assert that everything on the host belongs to a vm of the list, and that nothing is missing.

    What ends a moment after the answer about it gets that moment. No guest may have found that its
    memory and its disk are of two machines.
    """
    end = time.monotonic() + 10
    while (seen := seen_traces(box)) != (expected := expected_traces(box)):
        if time.monotonic() > end:
            names = sorted({*seen, *expected})
            wrong = {
                name: {"seen": seen.get(name), "expected": expected.get(name)}
                for name in names
                if seen.get(name) != expected.get(name)
            }
            raise AssertionError(f"{wrong}\n{tail(box)}")
        time.sleep(0.01)
    torn = [path.name for path in box.root.glob("log/*.console.log") if TORN in path.read_text()]
    assert not torn, (torn, tail(box))


def is_settled(box: Box) -> bool:
    """Tell whether there is nothing under way, neither a job nor a state to leave."""
    busy = "SELECT id FROM job WHERE state = 'RUNNING'"
    moving = "SELECT id FROM vm WHERE state IN ('CREATING', 'STARTING', 'STOPPING', 'DELETING')"
    return not box.rows(busy) and not box.rows(moving)


def settle_or_die(box: Box, limit_seconds: float = SETTLE_SECONDS) -> bool:
    """Wait until the daemon has nothing to do any more; False when it has died before."""
    end = time.monotonic() + limit_seconds
    while not is_settled(box):
        if box.daemon is not None and box.daemon.poll() is not None:
            return False
        if time.monotonic() > end:
            jobs = box.rows("SELECT * FROM job WHERE state = 'RUNNING'")
            vms = box.rows("SELECT id, name, state, reason FROM vm")
            raise AssertionError(f"does not settle: {jobs} {vms}\n{tail(box)}")
        time.sleep(0.003)
    return True


def settle(box: Box, limit_seconds: float = SETTLE_SECONDS) -> None:
    """Wait until the daemon has nothing to do any more."""
    assert settle_or_die(box, limit_seconds), tail(box)


# Asking a daemon that may die


class Question:
    """One request under way; what there is of an answer can be read after the daemon's death."""

    def __init__(self, box: Box, method: str, **params: Any) -> None:
        self.what = f"{method} {params}"
        self.line = Line(box.socket_path)
        self.result: Any = None
        self.error: RpcError | None = None
        self.is_answered = False
        self.progress = 0
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": 7}
        self.line.send(json.dumps(request).encode() + b"\n")

    def __enter__(self) -> "Question":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.line.__exit__()

    def read(self, *, until_progress: int | None = None) -> bool:
        """Read to the answer, or so many notifications of progress; False at the line's end."""
        while not self.is_answered and self.progress != until_progress:
            try:
                message = self.line.receive()
            except (AssertionError, ConnectionError):  # cut off
                return False
            if message.get("method") == "progress":
                self.progress += 1
                continue
            self.is_answered = True
            self.result = message.get("result")
            if "error" in message:
                self.error = RpcError(message["error"])
        return True
