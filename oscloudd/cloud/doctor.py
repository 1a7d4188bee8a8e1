"""The daemon examined: what it stands on, each with a verdict and what to do about it."""

import asyncio
from typing import Literal

import msgspec

from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.leftovers import Leftovers
from oscloudd.cloud.names import Names
from oscloudd.cloud.networks import Networks
from oscloudd.cloud.templates import Templates
from oscloudd.config import Config
from oscloudd.errors import CloudError
from oscloudd.host.network.firewall import check_ruleset, find_missing_tables
from oscloudd.host.network.forwarding import find_closed_sysctl
from oscloudd.host.network.host_names import can_find_guests
from oscloudd.host.network.other_firewalls import find_obstacles
from oscloudd.host.resources import disk_free_bytes, memory_available_bytes, qemu_version
from oscloudd.host.scopes import SLICE, find_missing_controllers
from oscloudd.host.users import QemuUser
from oscloudd.machine.accelerator import Accelerator
from oscloudd.units import format_size

_LITTLE_DISK_BYTES = 5 << 30
_LITTLE_MEMORY_BYTES = 1 << 30

Verdict = Literal["ok", "warning", "failure"]


class Check(msgspec.Struct, frozen=True):
    """One thing looked at."""

    check: str
    verdict: Verdict
    message: str
    hint: str = ""


class Report(msgspec.Struct, frozen=True):
    """The answer of `daemon_doctor`; `ok` when nothing failed."""

    ok: bool
    checks: list[Check]


class Doctor:
    """Looks at the host the way a vm needs it."""

    def __init__(
        self,
        config: Config,
        networks: Networks,
        templates: Templates,
        user: QemuUser,
        accelerator: "asyncio.Task[Accelerator]",
        leftovers: Leftovers,
        firewall: Firewall,
        names: Names,
    ) -> None:
        self._config = config
        self._networks = networks
        self._templates = templates
        self._user = user
        self._accelerator = accelerator
        self._leftovers = leftovers
        self._firewall = firewall
        self._names = names

    async def examine(self) -> Report:
        """Look at everything; a check that fails is a row, never an error."""
        looks = {
            "accelerator": self._look_at_accelerator,
            "qemu": self._look_at_qemu,
            "qemu user": self._look_at_user,
            "limits": self._look_at_limits,
            "network": self._look_at_network,
            "firewall": self._look_at_firewall,
            "names": self._look_at_names,
            "disk": self._look_at_disk,
            "memory": self._look_at_memory,
            "templates": self._look_at_templates,
            "leftovers": self._look_at_leftovers,
        }
        checks = []
        for name, look in looks.items():
            try:
                verdict, message, hint = await look()
            except (CloudError, OSError) as error:
                verdict, message = "failure", str(error)
                hint = (error.hint or "") if isinstance(error, CloudError) else ""
            checks.append(Check(name, verdict, message, hint))
        return Report(all(check.verdict != "failure" for check in checks), checks)

    async def _look_at_accelerator(self) -> tuple[Verdict, str, str]:
        chosen = await asyncio.shield(self._accelerator)
        message = f"{chosen.name}: {chosen.reason}"
        if chosen.name == "kvm":
            return "ok", message, ""
        hint = "guests are emulated: slow, and by qemu's own word no boundary against hostile code"
        return "warning", message, hint

    async def _look_at_qemu(self) -> tuple[Verdict, str, str]:
        return "ok", await qemu_version(self._config.qemu.binary), ""

    async def _look_at_user(self) -> tuple[Verdict, str, str]:
        if self._user.name == "nobody":
            return (
                "warning",
                "qemu runs as nobody, which it may share with others",
                "adduser --system --group oscloud-qemu, then restart oscloudd",
            )
        return "ok", f"qemu runs as {self._user.name}", ""

    async def _look_at_limits(self) -> tuple[Verdict, str, str]:
        missing = find_missing_controllers()
        if missing is None:
            return "ok", "guests have none: the daemon was not started by systemd", ""
        if missing:
            return (
                "warning",
                f"set in {SLICE}, but not enforced: no cgroup controllers {', '.join(missing)}",
                "so it is in containers; on the host itself, boot with cgroup v2",
            )
        return "ok", f"each guest has its own in {SLICE}", ""

    async def _look_at_network(self) -> tuple[Verdict, str, str]:
        networks = await self._networks.list()
        await check_ruleset()
        wanted = self._config.network.subnet
        for network in networks:
            if network.name == "default" and network.subnet != wanted:
                return (
                    "warning",
                    f"network default is {network.subnet}: {wanted} overlaps a route of this host",
                    "set [network] subnet in oscloud.toml to choose another",
                )
        return "ok", ", ".join(f"{net.name} is {net.subnet}" for net in networks), ""

    async def _look_at_firewall(self) -> tuple[Verdict, str, str]:
        missing = await find_missing_tables() if self._firewall.is_up else []
        if missing:
            return (
                "failure",
                f"our own nft tables are missing: {', '.join(missing)}",
                "see the log for why they can't be put back",
            )
        closed = find_closed_sysctl() if self._firewall.is_up else None
        if closed is not None:
            return (
                "failure" if "ipv4" in closed else "warning",
                f"this host does not pass on all for its guests: {closed} is 0",
                f"sysctl {closed}=1, and see what sets it to 0",
            )
        bridges = [network.bridge for network in await self._networks.list()]
        obstacles = await find_obstacles(bridges[0])
        if obstacles:
            return (
                "warning",
                "; ".join(map(str, obstacles)),
                "; ".join(obstacle.fix for obstacle in obstacles),
            )
        return "ok", "nothing keeps guests from the outside", ""

    async def _look_at_names(self) -> tuple[Verdict, str, str]:
        if not self._names.is_available:
            return (
                "warning",
                "guests can't find each other by name: there is no dnsmasq",
                "apt-get install dnsmasq-base, then restart oscloudd",
            )
        troubles = self._names.find_troubles()
        if troubles:
            hint = "what has port 53 of the bridge? ss -lnup; what it may not read: chmod o+x"
            return "warning", f"name servers: {', '.join(troubles)}", hint
        this_host = (
            "and this host finds them"
            if can_find_guests()
            else "this host would with systemd-resolved: now it has vm-ssh-config"
        )
        return "ok", f"guests find each other as NAME.oscloud, {this_host}", ""

    async def _look_at_disk(self) -> tuple[Verdict, str, str]:
        free = disk_free_bytes(self._config.state_path)
        message = f"{format_size(free)} free in {self._config.state_path}"
        if free < _LITTLE_DISK_BYTES:
            return "warning", message, "guests stop when their host's disk is full: free some space"
        return "ok", message, ""

    async def _look_at_memory(self) -> tuple[Verdict, str, str]:
        available = memory_available_bytes()
        message = f"{format_size(available)} available"
        if available < _LITTLE_MEMORY_BYTES:
            return "warning", message, "stop a vm, or create smaller ones"
        return "ok", message, ""

    async def _look_at_templates(self) -> tuple[Verdict, str, str]:
        templates = await self._templates.list()
        ready = [template.name for template in templates if template.state == "READY"]
        if not ready:
            return "warning", "none is made yet", "oscloudctl template-build debian_12"
        return "ok", f"ready: {', '.join(ready)}", ""

    async def _look_at_leftovers(self) -> tuple[Verdict, str, str]:
        strangers = await self._leftovers.look()
        if not strangers:
            return "ok", "everything here is in the database", ""
        return (
            "warning",
            "; ".join(f"{stranger.name} ({', '.join(stranger.parts)})" for stranger in strangers),
            "; ".join(dict.fromkeys(stranger.why for stranger in strangers)),
        )
