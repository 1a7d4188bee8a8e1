"""The whole cloud, put together: what the front door hands requests to."""

import asyncio
import logging
import os
import shutil
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import msgspec

from oscloudd import __version__
from oscloudd.cloud.bridge_keeping import BridgeKeeper
from oscloudd.cloud.changes import Changes
from oscloudd.cloud.data_disks import DataDisks
from oscloudd.cloud.disk_attachments import DiskAttachments
from oscloudd.cloud.disks import Disks
from oscloudd.cloud.doctor import Doctor
from oscloudd.cloud.events import Events
from oscloudd.cloud.exports import Exports
from oscloudd.cloud.firewall import Firewall
from oscloudd.cloud.first_starts import FirstStarts
from oscloudd.cloud.flattening import Flattener
from oscloudd.cloud.host_shutdown import HostShutdown
from oscloudd.cloud.jobs import Jobs
from oscloudd.cloud.keeper import Keeper
from oscloudd.cloud.kernel_templates import KernelTemplates
from oscloudd.cloud.layer_chains import LayerChains
from oscloudd.cloud.layer_merging import LayerMerger
from oscloudd.cloud.leftovers import Leftovers
from oscloudd.cloud.names import Names
from oscloudd.cloud.network_making import NetworkMaker
from oscloudd.cloud.networks import Networks
from oscloudd.cloud.nic_changes import NicChanges
from oscloudd.cloud.nics import Nics
from oscloudd.cloud.operations import Operations, count_steps
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.publishing import Publisher
from oscloudd.cloud.rates import Rates
from oscloudd.cloud.reconcile import Reconciler
from oscloudd.cloud.snapshot_steps import SnapshotSteps
from oscloudd.cloud.snapshots import Snapshots
from oscloudd.cloud.spare import SpareMaker
from oscloudd.cloud.start_slots import StartSlots
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.suspension import Suspension
from oscloudd.cloud.templates import TemplateDeleted, Templates
from oscloudd.cloud.vm_clone import VmCloner
from oscloudd.cloud.vm_create import VmCreator
from oscloudd.cloud.vm_import import VmImporter
from oscloudd.cloud.vm_power import VmPower
from oscloudd.cloud.vm_states import VmStates
from oscloudd.cloud.vms import Vms
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.cloud.warm_pool import WarmPool
from oscloudd.config import Config
from oscloudd.errors import CloudError
from oscloudd.host.users import resolve_qemu_user
from oscloudd.machine.accelerator import Accelerator, choose_accelerator
from oscloudd.machine.qemu_version import inspect_qemu
from oscloudd.store.database import Database

_log = logging.getLogger(__name__)
_HOUSEKEEPING_SECONDS = 600.0
_DATABASE_SECONDS = 20.0


class DaemonInfo(msgspec.Struct, frozen=True):
    """What `daemon_info` says of the daemon; who the caller is comes from the front door."""

    version: str
    pid: int
    uptime_seconds: float
    socket: str
    accelerator: str
    accelerator_reason: str
    qemu_version: str
    vms: dict[str, int]
    state_dir: str
    runtime_dir: str
    log_dir: str


class Cloud:
    """Owns the nouns and the order in which they start and stop."""

    def __init__(self, config: Config, database: Database) -> None:
        self.config = config
        self._database = database
        self._started = time.monotonic()
        user = resolve_qemu_user(config.qemu.user)
        # Tells in 0.2 s on most machines, in 4 s where KVM opens but does not work: nobody but
        # the first vm waits for it.
        self._qemu = asyncio.create_task(inspect_qemu(config.qemu.binary), name="qemu version")
        self._accelerator = asyncio.create_task(self._choose(), name="accelerator")
        self.changes = Changes()
        self.events = Events(database, self.changes)
        self.states = VmStates(database, self.changes)
        self.jobs = Jobs(database, self.changes, count_steps)
        self._firewall = Firewall(database, self.events)
        self.names = Names(config, database, self.events)
        self.networks = Networks(config, database, self._firewall, self.names)
        self.network_maker = NetworkMaker(database, self.networks, self.changes)
        self.ports = Ports(database, self.changes)
        self._rates = Rates(database)
        self.templates = Templates(config, database, self.jobs)
        self.disks = Disks(config, database, self.templates, self.jobs)
        chains = LayerChains(config, database)
        data_disks = DataDisks(config, database, self.templates, chains)
        nics = Nics(database, self.networks)
        self._leftovers = Leftovers(
            config, database, self.networks, self._firewall, self.events, chains
        )
        slots = StartSlots(config.limits.max_parallel_starts)
        self._supervisor = Supervisor(
            config,
            database,
            self.states,
            nics,
            self.templates,
            user,
            self._accelerator,
            slots,
            data_disks,
            chains,
        )
        self.warm_images = WarmImages(
            config, database, self.templates, self.jobs, user, self._accelerator, self._qemu
        )
        self._spares = SpareMaker(
            config, database, self.templates, self.warm_images, user, self._accelerator
        )
        self._pool = WarmPool(config, self.warm_images, self._spares, slots)
        self.warm_images.on_made = self._pool.stir
        self.warm_images.stood_on = self._pool.images
        suspension = Suspension(config, self.templates, self._accelerator)
        first_starts = FirstStarts(
            config,
            self.states,
            self.templates,
            self._supervisor,
            self.warm_images,
            self._pool,
            slots,
            self.events,
        )
        merger = LayerMerger(config, database, self.templates, chains)
        steps = SnapshotSteps(
            config,
            self.states,
            self._supervisor,
            first_starts,
            slots,
            suspension,
            data_disks,
            nics,
            self.ports,
            self.names,
            self._rates,
            merger,
        )
        operations = Operations(database, self.jobs, steps)
        self._bridges = BridgeKeeper(
            self.states, self._supervisor, operations, nics, self.ports, self.events
        )
        self.attachments = DiskAttachments(database, self.disks, operations, self._supervisor)
        self.nics = NicChanges(database, operations, self._supervisor, steps, self.names)
        flattener = Flattener(config, self.templates, operations, chains)
        self.exports = Exports(config, database, self.templates, self.jobs, flattener)
        self.publisher = Publisher(database, self.templates, flattener)
        self._kernels = KernelTemplates(config, self.templates)
        self.importer = VmImporter(
            config,
            database,
            self.states,
            self.networks,
            self.ports,
            self._kernels,
            self.jobs,
            operations,
            steps,
        )
        self.power = VmPower(
            config,
            database,
            self.states,
            self._supervisor,
            suspension,
            self.jobs,
            operations,
            self._pool,
        )
        self.snapshots = Snapshots(config, database, suspension, self.jobs, operations)
        self._keeper = Keeper(self.states, operations, self.power, self.events)
        self._supervisor.on_ended = self._keeper.consider
        self.host_shutdown = HostShutdown(database, operations, self._keeper)
        self.vms = Vms(
            config,
            database,
            self.states,
            self._supervisor,
            operations,
            self._keeper,
            self._rates,
            self.templates,
            self.nics,
        )
        self.creator = VmCreator(
            config,
            database,
            self.networks,
            self.templates,
            self.jobs,
            operations,
            self.warm_images,
            self._pool,
            self.ports,
        )
        self.cloner = VmCloner(database, self.snapshots, self.creator)
        self._reconciler = Reconciler(
            config, database, self.states, self._supervisor, steps, operations, self._keeper
        )
        self.doctor = Doctor(
            config,
            self.networks,
            self.templates,
            user,
            self._accelerator,
            self._leftovers,
            self._firewall,
            self.names,
        )
        self._background: list[asyncio.Task[None]] = []

    async def prepare(self) -> None:
        """Do what must be done before anybody may ask for anything; asks no qemu."""
        await asyncio.to_thread(self.templates.remove_leftovers)
        await asyncio.to_thread(self.exports.prepare)
        shutil.rmtree(self.config.keys_path, ignore_errors=True)
        self.config.keys_path.mkdir(mode=0o700)
        await self.warm_images.remove_leftovers()
        await self._spares.remove_leftovers()
        await self._leftovers.protect_foreign_ids()
        await self.networks.ensure_default()
        await self.ports.prepare()
        await self._reconciler.prepare()
        await self.names.prepare()

    def start(self) -> None:
        """Take hold of what runs and keep house, in the background."""
        self.creator.prepare()
        for work in (
            self._firewall.keep(),
            self.ports.keep(),
            self._rates.keep(),
            self._bridges.keep(),
            self._reconciler.run(),
            self._keep_warm(),
            self._keep_house(),
            self._keep_database(),
        ):
            self._background.append(asyncio.create_task(work))

    async def stop(self) -> None:
        """Let go of everything; vms run on."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._keeper.close()
        await self.jobs.close()
        await self.creator.close()
        await self.ports.close()
        await self.names.close()
        self._rates.close()
        self._bridges.close()
        await self._pool.close()
        await self._supervisor.close()
        self._firewall.close()
        for chosen in (self._accelerator, self._qemu):
            chosen.cancel()
        await asyncio.gather(self._accelerator, self._qemu, return_exceptions=True)

    async def _keep_warm(self) -> None:
        """Have warm images at hand, then spares of the one used last."""
        await self.warm_images.load()
        await self._pool.run()

    async def _keep_house(self) -> None:
        """Sweep out what nobody owns and forget what is old, now and then."""
        while True:
            for work in (
                self.ports.sync,
                self._rates.sync,
                self._leftovers.sweep,
                self.events.prune,
                self.jobs.prune,
                self.warm_images.prune,
                self._kernels.prune,
                self._database.refill_ballast,
            ):
                try:
                    await work()
                except Exception:
                    # One thing that can't be done does not keep the others.
                    _log.exception("housekeeping")
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)

    async def _keep_database(self) -> None:
        """Use the database now and then: a server hangs up on who is silent for a minute."""
        while True:
            await asyncio.sleep(_DATABASE_SECONDS)
            with suppress(CloudError):
                await self._database.run(lambda: None)

    async def info(self) -> DaemonInfo:
        """Describe the daemon."""
        chosen = await asyncio.shield(self._accelerator)
        version = await asyncio.shield(self._qemu)
        vms = await self.vms.list()
        return DaemonInfo(
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            socket=str(self.config.socket_path),
            accelerator=chosen.name,
            accelerator_reason=chosen.reason,
            qemu_version=version.version,
            vms=dict(Counter(vm.state for vm in vms)),
            state_dir=self.config.state_dir,
            runtime_dir=self.config.runtime_dir,
            log_dir=self.config.log_dir,
        )

    async def template_info(self, name: str) -> dict[str, Any]:
        """Describe one template with the warm images there are of it; raises NotFoundError."""
        info = await self.templates.info(name)
        warm = await self.warm_images.list_of(name, self._pool.count_ready())
        return {**msgspec.structs.asdict(info), "warm": warm}

    async def template_delete(self, name: str) -> TemplateDeleted:
        """Remove a template with the warm images of it; raises InUseError while a disk needs it."""
        warm = await self.warm_images.list_of(name, self._pool.count_ready())
        deleted = await self.templates.delete(name)
        await self._pool.forget({image.name for image in warm})
        await self.warm_images.prune()
        return deleted

    async def _choose(self) -> Accelerator:
        config = self.config
        version = await asyncio.shield(self._qemu)
        return await choose_accelerator(
            config.accelerator,
            config.qemu.binary,
            version.version,
            resolve_qemu_user(config.qemu.user),
            config.runtime_path / "accelerator.json",
        )
