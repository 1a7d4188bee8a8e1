"""The whole cloud, put together: what the front door hands requests to."""

import asyncio
import os
import time
from collections import Counter

import msgspec

from oscloudd import __version__
from oscloudd.cloud.disks import Disks
from oscloudd.cloud.doctor import Doctor
from oscloudd.cloud.jobs import Jobs
from oscloudd.cloud.networks import Networks
from oscloudd.cloud.reconcile import reconcile
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_create import VmCreator
from oscloudd.cloud.vm_power import VmPower
from oscloudd.cloud.vm_states import VmStates
from oscloudd.cloud.vms import Vms
from oscloudd.config import Config
from oscloudd.host.users import resolve_qemu_user
from oscloudd.machine.accelerator import Accelerator, choose_accelerator
from oscloudd.machine.qemu_version import inspect_qemu
from oscloudd.store.database import Database


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
        self.states = VmStates(database)
        self.jobs = Jobs(database)
        self.networks = Networks(config, database)
        self.disks = Disks(config, database)
        self.templates = Templates(config, database, self.jobs)
        self._supervisor = Supervisor(
            config, database, self.states, self.networks, self.templates, user, self._accelerator
        )
        self.vms = Vms(config, database, self.states, self._supervisor)
        self.power = VmPower(config, database, self.states, self._supervisor)
        self.creator = VmCreator(
            config,
            database,
            self.states,
            self.networks,
            self.templates,
            self._supervisor,
            self.power,
            self.jobs,
        )
        self.doctor = Doctor(config, self.networks, self.templates, user, self._accelerator)

    async def start(self) -> None:
        """Make what must be there, and compare what the database says with what runs."""
        await asyncio.to_thread(self.templates.remove_leftovers)
        await self.jobs.end_unfinished()
        await self.networks.ensure_default()
        await reconcile(self._database, self.states, self._supervisor, self.power)

    async def stop(self) -> None:
        """Let go of everything; vms run on."""
        await self.jobs.close()
        await self._supervisor.close()
        for task in (self._accelerator, self._qemu):
            task.cancel()
        await asyncio.gather(self._accelerator, self._qemu, return_exceptions=True)

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
