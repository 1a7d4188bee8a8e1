"""Names of guests: each network's name server kept running, and told which guest is who."""

import asyncio
import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Interface, IPv4Network

from oscloudd.cloud.allocation import gateway_of
from oscloudd.cloud.events import Events
from oscloudd.cloud.nic_records import NicRecord
from oscloudd.cloud.states import VmState
from oscloudd.cloud.vm_records import VmRecord, read_vms
from oscloudd.config import Config
from oscloudd.errors import CloudError, NotFoundError
from oscloudd.guest.identity import hostname_of
from oscloudd.host.network.dhcp import NamedGuest
from oscloudd.host.network.host_names import can_find_guests, lead_to_guests
from oscloudd.host.network.interfaces import find_index
from oscloudd.host.network.name_server import (
    NameServer,
    delete_guest,
    find_barrier,
    find_name_server,
    find_told,
    is_installed,
    is_outdated,
    start_name_server,
    write_guest,
)
from oscloudd.host.processes import open_process
from oscloudd.host.sessions import end_session
from oscloudd.store.database import Database
from oscloudd.store.models import Network

_log = logging.getLogger(__name__)
# A name server that ends again and again is started again at ever longer intervals.
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0
# What ends a name server does not ask where it answered.
_NO_SUBNET = IPv4Network("0.0.0.0/0")
# One that has run for so long was well.
_WELL_SECONDS = 60.0


class Names:
    """The name servers of this cloud, by bridge."""

    def __init__(self, config: Config, database: Database, events: Events) -> None:
        self._directory = config.runtime_path / "names"
        self._database = database
        self._events = events
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._servers: dict[str, NameServer] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._host_knows: dict[str, int | None] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self.is_available = is_installed()

    def server(
        self,
        bridge: str,
        subnet: IPv4Network,
        *,
        isolated: bool = False,
        upstream: tuple[str, ...] = (),
    ) -> NameServer:
        """Give where a network's name server is, and whom it asks."""
        gateway = IPv4Interface((gateway_of(subnet), subnet.prefixlen))
        return NameServer(bridge, gateway, self._directory / bridge, isolated, upstream)

    async def prepare(self) -> None:
        """Write down the names of all vms, and serve where vms run; forget who is gone."""
        networks = await self._database.run(_read_networks)
        bridges = {bridge for bridge, *_ in networks}
        for path in self._directory.glob("*"):
            if path.name not in bridges:  # its network was deleted, and a daemon died in that
                await self.end(path.name, _NO_SUBNET)
        # One that is being deleted may have lost its name already, and would keep it.
        vms = [vm for vm in await self._database.run(read_vms) if vm.state != VmState.DELETING]
        known = {(nic.bridge, str(vm.id)) for vm in vms for nic in vm.nics}
        for bridge, subnet, *_ in networks:
            here = {number for other, number in known if other == bridge}
            _forget_others(self.server(bridge, subnet), here)
        for vm in vms:
            self.publish(vm)
        running = _running_bridges(vms)
        for bridge, subnet, isolated, upstream in networks:
            if bridge in running:
                self._keep(self.server(bridge, subnet, isolated=isolated, upstream=upstream))

    async def serve(
        self, bridge: str, subnet: IPv4Network, *, isolated: bool, upstream: tuple[str, ...]
    ) -> None:
        """Have a network's name server answer, or be tried again and again behind our back."""
        if self.is_available:
            server = self.server(bridge, subnet, isolated=isolated, upstream=upstream)
            self._keep(server)
            await self._answered[bridge].wait()
            self._tell_host(server)

    def publish(self, vm: VmRecord) -> None:
        """Have a vm found by its name in each network it is in, at its addresses there.

        And told that address when it asks. May be called again, and after it got another name.
        """
        if self.is_available:
            for nic in vm.nics:
                guest = NamedGuest(nic.mac, nic.ip, nic.ip6, hostname_of(vm.name))
                write_guest(self._server_of(nic), vm.id, guest)

    def forget(self, vm: VmRecord, nics: Iterable[NicRecord] | None = None) -> None:
        """Have a vm found by its name no longer, or not by these cards; may be called again."""
        for nic in vm.nics if nics is None else nics:
            delete_guest(self._server_of(nic), vm.id, nic.mac, nic.ip)

    async def close(self) -> None:
        """Leave the name servers of networks with running vms alone, and end the others."""
        working = [*self._keeping.values(), *self._telling]
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        try:
            vms = await self._database.run(read_vms)
        except CloudError:  # then nobody can tell which are needed
            return
        running = _running_bridges(vms)
        for server in self._servers.values():
            if server.bridge not in running:
                await _end(server)

    async def end(self, bridge: str, subnet: IPv4Network) -> None:
        """End the name server of a network that is being deleted; may be called again."""
        keeping = self._keeping.pop(bridge, None)
        if keeping is not None:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        self._servers.pop(bridge, None)
        server = self.server(bridge, subnet)
        await _end(server)
        await asyncio.to_thread(shutil.rmtree, server.directory, ignore_errors=True)

    def find_troubles(self) -> list[str]:
        """Give what is wrong with the name servers that should answer."""
        troubles = []
        for server in self._servers.values():
            barrier = find_barrier(server)
            if find_name_server(server) is None:
                troubles.append(f"that of {server.bridge} does not run")
            elif barrier is not None:
                troubles.append(f"that of {server.bridge} may not read below {barrier}")
        return troubles

    def _tell_host(self, server: NameServer) -> None:
        """Have the host, too, find the guests behind a bridge: once for each that is made."""
        index = find_index(server.bridge)
        if self._host_knows.get(server.bridge) != index and can_find_guests():
            self._host_knows[server.bridge] = index
            telling = asyncio.create_task(self._lead(server), name=f"names of {server.bridge}")
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _lead(self, server: NameServer) -> None:
        try:
            await lead_to_guests(server.bridge, server.gateway.ip)
        except CloudError as error:
            self._host_knows.pop(server.bridge, None)  # the next vm's start tries again
            _log.warning("this host does not find guests by name: %s", error.message)

    def _server_of(self, nic: NicRecord) -> NameServer:
        return self.server(nic.bridge, nic.subnet)

    def _keep(self, server: NameServer) -> None:
        if self.is_available and server.bridge not in self._keeping:
            self._servers[server.bridge] = server
            self._answered[server.bridge] = asyncio.Event()
            keeping = self._keep_running(server)
            self._keeping[server.bridge] = asyncio.create_task(keeping, name=server.unit)

    async def _keep_running(self, server: NameServer) -> None:
        loop = asyncio.get_running_loop()
        pause, told = _FIRST_PAUSE_SECONDS, False
        while True:
            began = loop.time()
            try:
                await self._until_ended(server)
                why = "it ended"
            except CloudError as error:
                why = error.message
            self._answered[server.bridge].set()
            if loop.time() - began > _WELL_SECONDS:
                pause, told = _FIRST_PAUSE_SECONDS, False
            if not told:
                message = f"the name server of {server.bridge} is started again: {why}"
                _log.warning("%s", message)
                with suppress(CloudError):  # the database is away: then the next time
                    await self._events.warn(server.bridge, message)
                    told = True
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def _until_ended(self, server: NameServer) -> None:
        """Start the name server unless an earlier daemon has, and see its end."""
        if is_outdated(server):
            await _end(server)
        identity = find_name_server(server)
        if identity is None:
            await start_name_server(server)
            identity = find_name_server(server)
        if identity is None:
            return
        self._answered[server.bridge].set()
        process = open_process(identity)
        try:
            await process.wait_exit(None)
        finally:
            process.close()


def _forget_others(server: NameServer, known: set[str]) -> None:
    """Forget guests but these, as a daemon that died in the midst of it has not."""
    for path in (*server.addresses.glob("*"), *server.hosts.glob("*")):
        if path.name not in known:
            told = find_told(server, int(path.name)) if path.name.isdecimal() else None
            if told is not None:  # it may have that address still, and no other would get it
                delete_guest(server, int(path.name), *told)
            path.unlink(missing_ok=True)


async def _end(server: NameServer) -> None:
    identity = find_name_server(server)
    if identity is not None:
        with suppress(NotFoundError):
            await end_session(open_process(identity))


def _running_bridges(vms: Iterable[VmRecord]) -> set[str]:
    return {nic.bridge for vm in vms if vm.is_process_alive() for nic in vm.nics}


def _read_networks() -> list[tuple[str, IPv4Network, bool, tuple[str, ...]]]:
    """Give each network's bridge, subnet, whether it is isolated, and the servers it names."""
    rows = Network.select(
        Network.bridge_interface_idx, Network.ip, Network.mask, Network.isolated, Network.dns
    )
    return [
        (f"oscbr{index}", IPv4Network(f"{ip}/{mask}"), bool(isolated), tuple(dns.split()))
        for index, ip, mask, isolated, dns in rows.tuples()
    ]
