"""Taking in a vm that was exported: read as it comes, checked, and there whole or not at all.

Its rows are written as soon as its manifest is known, as those of a vm that is being made: who dies
on the way leaves one that the next daemon removes with all its files. Its disk is one image; what
it boots with besides is in `kernel_templates`.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from peewee import IntegrityError

from oscloudd.cloud.allocation import mac_of
from oscloudd.cloud.archive_stream import ArchiveStream
from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.kernel_templates import KernelTemplates
from oscloudd.cloud.networks import NetworkRecord, Networks, read_network, told_address6
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.states import VmState, WantedState
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.vm_archive import DISK, SEED, ExportedVm
from oscloudd.cloud.vm_create import MAX_CPUS, Given, allocate, check_name_is_free
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.cloud.vm_states import VmStates, insert_state_event, write_state
from oscloudd.cloud.vm_steps import VmSteps
from oscloudd.config import Config
from oscloudd.errors import InUseError, InvalidArgumentError, NotFoundError, UnavailableError
from oscloudd.guest.hooks import Hooks
from oscloudd.guest.identity import GuestIdentity, build_document, hostname_of, make_machine_id
from oscloudd.guest.seed import build_seed_files, write_seed
from oscloudd.host.image_check import check_image
from oscloudd.host.images import durable
from oscloudd.host.keys import HostKey, check_public_key, make_host_key
from oscloudd.host.users import resolve_qemu_user
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Vm
from oscloudd.units import check_name, parse_size

# Of one card alone, and set by hand or drawn: IEEE 802, the lowest bit of the first byte.
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", re.ASCII)
_DOCUMENT = re.compile(r"(?:[a-z0-9_]+=[A-Za-z0-9+/=]*\n)*", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_KEPT = "its guest has it on its disk; with --new-identity it is told at its next boot who it is"
_MOST_KEYS = 16
# What its rows have as the manifest says it.
_SAME = (
    "name", "mac", "mem_size", "cpus", "host_keys", "identified", "seed_document", "autostart",
    "restart",
)  # fmt: skip


@dataclass(frozen=True)
class VmImportRequest:
    """An exported vm of `size_bytes` that the caller sends, and what is to be different about it.

    `source` is what its owner calls the file; `name` and `network` None are as in the file. With
    `has_new_identity` its guest is told at its next boot that it is another one.
    """

    source: str
    size_bytes: int
    name: str | None
    network: str | int | None
    has_new_identity: bool


class VmImporter:
    """Imports vms, a job each."""

    def __init__(
        self,
        config: Config,
        database: Database,
        states: VmStates,
        networks: Networks,
        ports: Ports,
        kernels: KernelTemplates,
        jobs: Jobs,
        operations: Operations,
        steps: VmSteps,
    ) -> None:
        self._config = config
        self._database = database
        self._states = states
        self._networks = networks
        self._ports = ports
        self._kernels = kernels
        self._jobs = jobs
        self._operations = operations
        self._steps = steps
        self._user = resolve_qemu_user(config.qemu.user).name

    async def take(
        self, request: VmImportRequest, body: AsyncIterator[bytes], order: Order
    ) -> VmInfo:
        """Make a stopped vm of what the caller sends, with the identity it had or a new one.

        Raises InvalidArgumentError with the reason a file is refused for, AlreadyExistsError or
        InUseError for what another vm has, and ExhaustedError.
        """
        if request.name is not None:
            name = request.name
            await self._database.run(lambda: check_name_is_free(name))
        job = await self._jobs.begin("vm_import", (request.name or request.source)[:63], order)
        job.cancellable = True
        task = self._jobs.run(job, self._import(job, request, body))
        return describe(await asyncio.shield(task))

    async def _import(
        self, job: Job, request: VmImportRequest, body: AsyncIterator[bytes]
    ) -> VmRecord:
        try:
            stream = ArchiveStream(
                body,
                request.size_bytes,
                self._config.limits.min_free_disk_bytes(),
                lambda done: job.report("receiving", request.source, done),
            )
            job.report("receiving", request.source, 0.0)
            manifest = await job.interruptible(stream.read_manifest())
            settings = _check_settings(manifest.vm, request)
            template = await job.interruptible(self._kernels.take(stream, manifest, job))
            try:
                made = await self._insert(settings, request, template, job.owner_uid)
            finally:
                self._kernels.let_go(template)
            async with self._operations.lock(made.vm.id):
                return await self._complete(stream, made, job)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"{request.source} is refused: {error.message}", hint=error.hint, parameter="file"
            ) from error

    async def _complete(self, stream: ArchiveStream, made: "_Made", job: Job) -> VmRecord:
        try:
            await job.interruptible(self._take_disk(stream, made, job))
            job.cancellable = False
            return await self._states.change(lambda: _write_made(made.vm.id))
        except asyncio.CancelledError:
            raise  # the daemon stops, and the next one clears up
        except BaseException:
            await self._steps.demolish(made.vm)
            raise

    async def _take_disk(self, stream: ArchiveStream, made: "_Made", job: Job) -> None:
        vm = made.vm
        paths = vm_paths(self._config, vm.id, vm.disk_id)
        # Closed: the disk is readable by all for as long as qemu-img is asked about it.
        paths.disk_directory.mkdir(mode=0o700, parents=True)
        await stream.save(SEED, paths.seed)
        await stream.save(DISK, paths.disk)
        job.report("checking", "comparing checksums, and looking at what the image is")
        await stream.check()
        paths.disk.chmod(0o444)
        judged = await check_image(paths.disk, "qcow2", self._user, called=DISK)
        paths.disk.chmod(0o600)
        if judged.virtual_size_bytes != vm.disk_size:
            raise InvalidArgumentError(
                f"its disk has {judged.virtual_size_bytes} bytes, and its manifest says "
                f"{vm.disk_size}"
            )
        if made.seed:
            paths.seed.unlink(missing_ok=True)
            await asyncio.to_thread(write_seed, paths.seed, made.seed)
        for path in filter(Path.exists, (paths.seed, paths.disk)):
            await asyncio.to_thread(durable, path)
        await asyncio.to_thread(durable, paths.disk_directory)

    async def _insert(
        self, settings: ExportedVm, request: VmImportRequest, template: ReadyTemplate, owner: int
    ) -> "_Made":
        network = settings.network if request.network is None else request.network
        key = await make_host_key(self._config.keys_path) if request.has_new_identity else None
        try:
            return await self._database.run(
                lambda: self._reserve(settings, network, template, key, owner)
            )
        except IntegrityError as error:
            raise UnavailableError(
                "another vm was given the same resources at the same moment", hint="try again"
            ) from error

    def _reserve(
        self,
        settings: ExportedVm,
        network_key: int | str,
        template: ReadyTemplate,
        key: HostKey | None,
        owner_uid: int,
    ) -> "_Made":
        """Insert the rows of a vm whose disk is still to come, in a transaction.

        With a key it becomes somebody else than it was.
        """
        if not template.image.exists():  # by hand, with template-delete
            raise UnavailableError(
                f"template {template.name} has just been deleted", hint="try again"
            )
        try:
            network = read_network(network_key)
        except NotFoundError as error:
            error.hint = "say which one it is to be in: --network"
            raise
        check_name_is_free(settings.name)
        if key is None:
            given = _claim(settings, network, self._ports.host_ports())
            vm = _insert_rows(settings, given, network, template, owner_uid, dual_stack=False)
            return _Made(vm, {})
        by_serial = template.declaration.guest.identity == "serial"
        if by_serial and template.kernel is None:
            raise InvalidArgumentError("its guest can't be told: it boots with a kernel of its own")
        given = allocate(network, None, None, self._ports.host_ports())
        unique = uuid.uuid4()
        identity = GuestIdentity(
            hostname=hostname_of(settings.name),
            address=given.ip,
            prefix_length=network.subnet.prefixlen,
            gateway=network.gateway,
            address6=told_address6(network, template, given.ip),
            gateway6=network.gateway6 or "",
            mac=mac_of(unique.hex),
            dns=self._networks.resolvers(network),
            root_password_hash="",
            authorized_keys=(),
            host_key=key,
            machine_id=make_machine_id(),
            keeps_access=True,
        )
        other = msgspec.structs.replace(
            settings,
            uuid=str(unique),
            mac=identity.mac,
            host_keys=key.public,
            identified=False,
            seed_document=build_document(identity) if by_serial else "",
        )
        seed = {} if by_serial else build_seed_files(identity, other.uuid, "", Hooks())
        dual_stack = bool(identity.address6)
        vm = _insert_rows(other, given, network, template, owner_uid, dual_stack=dual_stack)
        return _Made(vm, seed)


@dataclass(frozen=True)
class _Made:
    """A vm that has its rows, and the files of the seed it is to have in place of its own."""

    vm: VmRecord
    seed: dict[str, bytes]


def _check_settings(vm: ExportedVm, request: VmImportRequest) -> ExportedVm:
    """Give what a vm of the file is to be; raises InvalidArgumentError for what none can be."""
    keys = vm.host_keys.splitlines()
    checks = {
        "uuid": _UUID.fullmatch(vm.uuid),
        "mac": _MAC.fullmatch(vm.mac),
        "cpus": 1 <= vm.cpus <= MAX_CPUS,
        "host_keys": len(keys) <= _MOST_KEYS,
        "seed_document": _DOCUMENT.fullmatch(vm.seed_document),
    }
    for name, is_good in checks.items():
        if not is_good:
            raise InvalidArgumentError(f"{name} in its manifest is none that a vm can have")
    parse_size(vm.mem_size, parameter="mem_size")
    parse_size(vm.disk_size, parameter="disk_size")
    return msgspec.structs.replace(
        vm,
        name=check_name(request.name or vm.name),
        host_keys="\n".join(check_public_key(key, parameter="host_keys") for key in keys),
    )


def _claim(settings: ExportedVm, network: NetworkRecord, host_ports: set[int]) -> Given:
    """Give a vm what it had, in a transaction; raises InUseError where another has it."""
    try:
        given = allocate(network, settings.ip, None, host_ports)
    except (InUseError, InvalidArgumentError) as error:
        error.hint = _KEPT
        raise
    if Vm.select().where(Vm.mac == settings.mac).exists():
        raise InUseError(f"mac {settings.mac} belongs to another vm", hint=_KEPT)
    return given


def _insert_rows(
    settings: ExportedVm,
    given: Given,
    network: NetworkRecord,
    template: ReadyTemplate,
    owner_uid: int,
    *,
    dual_stack: bool,
) -> VmRecord:
    is_taken = Vm.select().where(Vm.uuid == settings.uuid).exists()
    unique = str(uuid.uuid4()) if is_taken else settings.uuid
    now = time.time()
    disk = Disk.create(
        name=f"{settings.name[:54]}-{unique[:8]}",
        size=settings.disk_size,
        template_name=template.name,
        created_at=now,
    )
    vm = Vm.create(
        uuid=unique,
        disk=disk,
        network=network.id,
        ip=given.ip,
        dual_stack=dual_stack,
        tap_interface_idx=given.tap_index,
        qemu_serial_port=given.serial_port,
        state=VmState.CREATING,
        wanted_state=WantedState.STOPPED,
        owner_uid=owner_uid,
        created_at=now,
        **{name: getattr(settings, name) for name in _SAME},
    )
    insert_state_event(vm.id, vm.name, vm.state, "", vm.wanted_state)
    return read_vm(vm.id)


def _write_made(vm_id: int) -> VmRecord:
    write_state(vm_id, VmState.STOPPED, "imported")
    return read_vm(vm_id)
