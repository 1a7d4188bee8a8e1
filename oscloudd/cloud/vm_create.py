"""Making a vm: everything checked, everything reserved in one transaction, then built step by step.

Whatever fails on the way, all of it is undone; a daemon that dies on the way finds the vm in state
CREATING at its next start and does the same.
"""

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from peewee import IntegrityError

from oscloudd.cloud.allocation import (
    allocate_address,
    first_free_index,
    first_free_serial_port,
    mac_of,
)
from oscloudd.cloud.jobs import Job, Jobs, OnProgress
from oscloudd.cloud.networks import NetworkRecord, Networks, read_network
from oscloudd.cloud.states import VmState, WantedState
from oscloudd.cloud.supervisor import Supervisor
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_power import VmPower, check_memory
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.cloud.vm_states import VmStates
from oscloudd.config import Config
from oscloudd.errors import (
    AlreadyExistsError,
    CloudError,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from oscloudd.guest.identity import GuestIdentity, build_document, hostname_of, make_machine_id
from oscloudd.guest.seed import build_seed_files, write_seed
from oscloudd.host.images import create_overlay, durable, image_info
from oscloudd.host.keys import HostKeys, make_host_keys
from oscloudd.host.resources import disk_free_bytes
from oscloudd.machine.console_log import read_log_tail
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Vm
from oscloudd.store.models import Job as JobRow

# A new overlay takes 200 KiB; a guest that boots writes some tens of MiB.
_LEAST_FREE_DISK_BYTES = 256 << 20
# qemu 7.2 takes 255 processors on q35 without x2APIC.
MAX_CPUS = 255
_CONSOLE_LINES = 15


@dataclass(frozen=True)
class VmRequest:
    """What is asked for, checked as far as it can be without looking at anything."""

    name: str
    image: str
    network: str | int
    mem_size: int
    disk_size: int
    cpus: int
    ssh_keys: tuple[str, ...]
    ip: str | None
    password: str
    user_data: str
    wait: str


class VmCreator:
    """Makes vms."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        networks: Networks,
        templates: Templates,
        supervisor: Supervisor,
        power: VmPower,
        jobs: Jobs,
    ) -> None:
        self._config = config
        self._database = database
        self._states = states
        self._networks = networks
        self._templates = templates
        self._supervisor = supervisor
        self._power = power
        self._jobs = jobs
        self._identities: dict[int, GuestIdentity] = {}

    async def create(self, request: VmRequest, owner_uid: int, listener: OnProgress) -> VmInfo:
        """Make a vm, and answer when it has come as far as `request.wait` says."""
        template = self._templates.get_ready(request.image)
        await self._check_fits(request, template)
        keys = await make_host_keys()
        job = await self._jobs.begin("vm_create", request.name, owner_uid, listener)
        job.report("reserving", f"reserving name, address and disk of {request.name}")
        reserve = partial(self._reserve, request, template, keys, owner_uid, job.id)
        vm = await self._insert(reserve, job)
        launched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._jobs.run(job, self._make(vm, request, template, job, launched))
        # A failure before the start ends the task; one after it is told to those who wait for it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if request.wait == "started":
            await asyncio.wait([task, launched], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        elif request.wait == "ready":
            await asyncio.shield(task)
        return describe(await self._power.get(vm.id))

    async def _check_fits(self, request: VmRequest, template: ReadyTemplate) -> None:
        least = template.declaration.min_mem_bytes
        if request.mem_size < least:
            raise InvalidArgumentError(
                f"mem_size {request.mem_size} is too small for {request.image}",
                hint=f"give it at least {template.declaration.min_mem_size}",
                parameter="mem_size",
            )
        if request.user_data and template.declaration.guest.identity != "cloud-init":
            raise InvalidArgumentError(
                f"user_data is for images with cloud-init, and {request.image} has none",
                hint="leave user_data out, or choose another image",
                parameter="user_data",
            )
        check_memory(request.mem_size)
        info = await image_info(template.image, template.declaration.image.format)
        if request.disk_size < info.virtual_size_bytes:
            raise InvalidArgumentError(
                f"disk_size {request.disk_size} is smaller than the image {request.image}",
                hint=f"give it at least {info.virtual_size_bytes} bytes",
                parameter="disk_size",
            )
        free = disk_free_bytes(self._config.state_path)
        if free < _LEAST_FREE_DISK_BYTES:
            raise ExhaustedError(
                f"{self._config.state_path} has {free} bytes free: too few for another disk",
                hint="free some space, or delete a vm",
                resource="disk",
            )

    async def _insert(self, reserve: "partial[int]", job: Job) -> VmRecord:
        try:
            vm_id = await self._database.run(reserve)
        except CloudError as error:
            await self._jobs.fail(job, error.message)
            raise
        except IntegrityError as error:
            await self._jobs.fail(job, "lost a race for a name or an address")
            raise UnavailableError(
                "another vm was given the same resources at the same moment", hint="try again"
            ) from error
        return await self._power.get(vm_id)

    def _reserve(
        self,
        request: VmRequest,
        template: ReadyTemplate,
        keys: HostKeys,
        owner_uid: int,
        job_id: int,
    ) -> int:
        """Insert the rows; inside a transaction, so nobody else can be given the same."""
        network = read_network(request.network)
        _check_name_is_free(request.name)
        taken = list(
            Vm.select(Vm.network, Vm.ip, Vm.tap_interface_idx, Vm.qemu_serial_port).tuples()
        )
        addresses = {ip for network_id, ip, _, _ in taken if network_id == network.id}
        unique = uuid.uuid4()
        address = allocate_address(network.subnet, addresses, request.ip, network=network.name)
        identity = self._identity(request, network, address, mac_of(unique.hex), keys)
        now = time.time()
        disk = Disk.create(
            # Not the vm's name alone: that may be given to another once this vm is renamed.
            name=f"{request.name[:54]}-{unique.hex[:8]}",
            size=request.disk_size,
            template_name=template.name,
            created_at=now,
        )
        by_serial = template.declaration.guest.identity == "serial"
        vm = Vm.create(
            name=request.name,
            uuid=str(unique),
            disk=disk,
            network=network.id,
            mem_size=request.mem_size,
            cpus=request.cpus,
            ip=address,
            mac=identity.mac,
            tap_interface_idx=first_free_index({tap for _, _, tap, _ in taken}),
            qemu_serial_port=first_free_serial_port({port for _, _, _, port in taken}),
            state=VmState.CREATING,
            wanted_state=WantedState.RUNNING,
            host_keys=f"{keys.ed25519_public}\n{keys.ecdsa_public}",
            seed_document=build_document(identity) if by_serial else "",
            owner_uid=owner_uid,
            created_at=now,
        )
        JobRow.update(vm_id=vm.id).where(JobRow.id == job_id).execute()
        self._identities[vm.id] = identity
        return int(vm.id)

    def _identity(
        self, request: VmRequest, network: NetworkRecord, address: str, mac: str, keys: HostKeys
    ) -> GuestIdentity:
        return GuestIdentity(
            hostname=hostname_of(request.name),
            address=address,
            prefix_length=network.subnet.prefixlen,
            gateway=network.gateway,
            mac=mac,
            dns=self._networks.resolvers(network),
            root_password=request.password,
            authorized_keys=request.ssh_keys,
            host_keys=keys,
            machine_id=make_machine_id(),
        )

    async def _make(
        self,
        vm: VmRecord,
        request: VmRequest,
        template: ReadyTemplate,
        job: Job,
        launched: "asyncio.Future[None]",
    ) -> None:
        try:
            async with self._power.lock(vm.id):
                await self._lay_out(vm, request, template, job)
                await self._supervisor.launch(vm, job.report)
            launched.set_result(None)
            await self._supervisor.settled(vm.id)
            job.report("done", f"{vm.name} is ready at {vm.ip}", 1.0)
        except asyncio.CancelledError:
            raise  # the daemon stops: the next one adopts the vm, or undoes what there is of it
        except BaseException as error:
            await self._explain(vm, error)
            # Whoever was told that it started has a vm; it stays, with the reason for its end.
            if request.wait != "started" or not launched.done():
                await self._undo(vm)
            raise

    async def _lay_out(
        self, vm: VmRecord, request: VmRequest, template: ReadyTemplate, job: Job
    ) -> None:
        job.report("disk", f"making a disk on {template.name}")
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        for directory in (paths.disk_directory, paths.qemu_log.parent):
            directory.mkdir(parents=True, exist_ok=True)
        await create_overlay(
            paths.disk, template.image, template.declaration.image.format, request.disk_size
        )
        identity = self._identities.pop(vm.id)
        if template.declaration.guest.identity == "cloud-init":
            job.report("seed", "writing the guest's seed")
            files = build_seed_files(identity, vm.uuid, request.user_data)
            await asyncio.to_thread(write_seed, paths.seed, files)
            await asyncio.to_thread(durable, paths.seed)

    async def _explain(self, vm: VmRecord, error: BaseException) -> None:
        """Put the guest's last words into the error before they are removed."""
        if isinstance(error, CloudError):
            log = vm_paths(self._config, vm.id, vm.disk_id).console_log
            tail = await asyncio.to_thread(read_log_tail, log)
            lines = tail.decode("utf-8", "replace").splitlines()[-_CONSOLE_LINES:]
            error.details.setdefault("console", "\n".join(lines))

    async def _undo(self, vm: VmRecord) -> None:
        self._identities.pop(vm.id, None)
        with suppress(CloudError):
            # A vm that its user has stopped or deleted meanwhile is as its user wants it.
            seen = await self._states.find(vm.id)
            if seen is not None and seen.wanted_state == WantedState.RUNNING:
                async with self._power.lock(vm.id):
                    await self._power.demolish(await self._database.run(lambda: read_vm(vm.id)))


def _check_name_is_free(name: str) -> None:
    if Vm.select().where(Vm.name == name).exists():
        raise AlreadyExistsError(
            f"vm {name!r} already exists",
            hint=f"choose another name, or delete it: oscloudctl vm-delete {name}",
            object="vm",
            name=name,
        )
