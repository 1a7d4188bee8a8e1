"""Taking in a vm that was exported: read as it comes, checked, and there whole or not at all.

Its rows are written as soon as its manifest is known, as those of a vm that is being made: who dies
on the way leaves one that the next daemon removes with all its files; its data disks are not kept
until they are whole, and go with it. Each of its disks is one image; what it boots with besides is
in `kernel_templates`.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from peewee import IntegrityError

from oscloudd.cloud.archive_stream import ArchiveStream
from oscloudd.cloud.disk_records import DiskRecord, read_disks
from oscloudd.cloud.jobs import Job, Jobs, Order
from oscloudd.cloud.kernel_templates import KernelTemplates
from oscloudd.cloud.networks import NetworkRecord, Networks, read_network, takes_ipv6
from oscloudd.cloud.new_identity import Access, draw_identity
from oscloudd.cloud.operations import Operations
from oscloudd.cloud.outgoing import describe_disk
from oscloudd.cloud.ports import Ports
from oscloudd.cloud.states import VmState, WantedState
from oscloudd.cloud.taken import (
    Given,
    NicRequest,
    allocate,
    draw_uuid,
    insert_nic,
    is_mac_taken,
)
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.vm_archive import (
    DISK,
    SEED,
    VARIABLES,
    ExportedDisk,
    ExportedVm,
    Manifest,
    Member,
)
from oscloudd.cloud.vm_create import MAX_CPUS, check_name_is_free
from oscloudd.cloud.vm_paths import disk_file, vm_paths
from oscloudd.cloud.vm_records import VmInfo, VmRecord, describe, read_vm
from oscloudd.cloud.vm_states import VmStates, insert_state_event, write_state
from oscloudd.cloud.vm_steps import VmSteps
from oscloudd.config import Config
from oscloudd.errors import InUseError, InvalidArgumentError, NotFoundError, UnavailableError
from oscloudd.guest.hooks import Hooks
from oscloudd.guest.identity import build_document
from oscloudd.guest.seed import build_seed_files, write_seed
from oscloudd.host.firmware import UEFI_VARIABLES, check_uefi
from oscloudd.host.image_check import check_image
from oscloudd.host.images import durable
from oscloudd.host.keys import HostKey, check_public_key, make_host_key
from oscloudd.host.users import resolve_qemu_user
from oscloudd.machine.arguments import PORTS
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

    `size_bytes` is None where the caller does not know it. `source` is what its owner calls the
    file; `name` and `network` None are as in the file. With `has_new_identity` its guest is told at
    its next boot that it is another one.
    """

    source: str
    size_bytes: int | None
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
            _check_firmware(manifest)
            template = await job.interruptible(self._kernels.take(stream, manifest, job))
            try:
                made = await self._insert(
                    settings, manifest.disks, request, template, job.owner_uid
                )
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
            await job.interruptible(self._take_files(stream, made, job))
            job.cancellable = False
            return await self._states.change(lambda: _write_made(made.vm.id))
        except asyncio.CancelledError:
            raise  # the daemon stops, and the next one clears up
        except BaseException:
            await self._steps.demolish(made.vm)
            raise

    async def _take_files(self, stream: ArchiveStream, made: "_Made", job: Job) -> None:
        paths = vm_paths(self._config, made.vm.id, made.vm.disk_id)
        images = {DISK: (paths.disk, made.vm.disk_size)}
        for disk in made.data:
            member = describe_disk(disk).member
            images[member] = (disk_file(self._config, disk.id), disk.size)
        for path, _size in images.values():
            # Closed: an image is readable by all for as long as qemu-img is asked about it.
            path.parent.mkdir(mode=0o700, parents=True)
        files = {SEED: paths.seed, VARIABLES: paths.variables}
        files |= {member: path for member, (path, _size) in images.items()}
        for member, path in files.items():
            await stream.save(member, path)
        job.report("checking", "comparing checksums, and looking at what the images are")
        await stream.check()
        for member, (path, size_bytes) in images.items():
            await self._judge(member, path, size_bytes)
        if made.seed:
            paths.seed.unlink(missing_ok=True)
            await asyncio.to_thread(write_seed, paths.seed, made.seed)
        for path in filter(Path.exists, files.values()):
            await asyncio.to_thread(durable, path)
        for path, _size in images.values():
            await asyncio.to_thread(durable, path.parent)

    async def _judge(self, member: str, path: Path, size_bytes: int) -> None:
        await asyncio.to_thread(path.chmod, 0o444)
        judged = await check_image(path, "qcow2", self._user, called=member)
        await asyncio.to_thread(path.chmod, 0o600)
        if judged.virtual_size_bytes != size_bytes:
            raise InvalidArgumentError(
                f"{member} in it has {judged.virtual_size_bytes} bytes, and its manifest says "
                f"{size_bytes}"
            )

    async def _insert(
        self,
        settings: ExportedVm,
        disks: list[ExportedDisk],
        request: VmImportRequest,
        template: ReadyTemplate,
        owner: int,
    ) -> "_Made":
        network = settings.network if request.network is None else request.network
        key = await make_host_key(self._config.keys_path) if request.has_new_identity else None
        try:
            return await self._database.run(
                lambda: self._reserve(settings, disks, network, template, key, owner)
            )
        except IntegrityError as error:
            raise UnavailableError(
                "another vm was given the same resources at the same moment", hint="try again"
            ) from error

    def _reserve(
        self,
        settings: ExportedVm,
        disks: list[ExportedDisk],
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
        slots = _free_slots(settings, disks)
        if key is None:
            given = _claim(settings, network, self._ports.host_ports(), slots)
            vm = _insert_rows(settings, given, network, template, owner_uid, dual_stack=False)
            return _Made(vm, _insert_disks(vm, disks), {})
        told_by = template.declaration.guest.identity
        if told_by == "dhcp":
            raise InvalidArgumentError("its guest can't be told: it asks for its address only")
        by_serial = told_by == "serial"
        if by_serial and template.kernel is None:
            raise InvalidArgumentError("its guest can't be told: it boots with a kernel of its own")
        others = [NicRequest(nic.network) for nic in settings.nics]
        given = allocate(network, None, self._ports.host_ports(), others=others, slots=slots)
        unique = draw_uuid()
        has_ipv6 = takes_ipv6(template)
        identity = draw_identity(
            settings.name, network, given, key, Access(is_kept=True, is_copy=True),
            uuid_hex=unique.hex, resolvers=self._networks.resolvers(network), has_ipv6=has_ipv6,
        )  # fmt: skip
        other = msgspec.structs.replace(
            settings,
            uuid=str(unique),
            mac=identity.mac,
            host_keys=key.public,
            identified=False,
            seed_document=build_document(identity) if by_serial else "",
        )
        seed = {} if by_serial else build_seed_files(identity, other.uuid, "", Hooks())
        vm = _insert_rows(other, given, network, template, owner_uid, dual_stack=has_ipv6)
        return _Made(vm, _insert_disks(vm, disks), seed)


@dataclass(frozen=True)
class _Made:
    """A vm that has its rows, its data disks, and the files of the seed it is to have in place of
    its own.
    """

    vm: VmRecord
    data: list[DiskRecord]
    seed: dict[str, bytes]


def _check_settings(vm: ExportedVm, request: VmImportRequest) -> ExportedVm:
    """Give what a vm of the file is to be; raises InvalidArgumentError for what none can be."""
    keys = vm.host_keys.splitlines()
    macs = [vm.mac, *(nic.mac for nic in vm.nics)]
    checks = {
        "uuid": _UUID.fullmatch(vm.uuid),
        "mac": all(map(_MAC.fullmatch, macs)) and len({*macs}) == len(macs),
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


def _check_firmware(manifest: Manifest) -> None:
    """Raise HostError or InvalidArgumentError where this host's UEFI is not the guest's."""
    if manifest.template.firmware != "uefi":
        return
    check_uefi()
    size_bytes = UEFI_VARIABLES.stat().st_size
    if Member(VARIABLES, size_bytes) not in manifest.members:
        raise InvalidArgumentError(
            f"{VARIABLES} in it is for another firmware than this host's, whose has {size_bytes} "
            "bytes"
        )


def _free_slots(settings: ExportedVm, disks: list[ExportedDisk]) -> list[int]:
    """Give the slots that its data disks leave to its further cards; raises where that is too few.

    The manifest does not say which slots those had.
    """
    taken = {disk.slot for disk in disks}
    free = [slot for slot in range(1, PORTS + 1) if slot not in taken]
    if len(settings.nics) > len(free):
        raise InvalidArgumentError(
            f"it has {len(settings.nics)} further network cards and {len(disks)} data disks in its "
            f"manifest, and a vm has {PORTS} of both at most"
        )
    return free


def _claim(
    settings: ExportedVm, network: NetworkRecord, host_ports: set[int], slots: list[int]
) -> Given:
    """Give a vm what it had, in a transaction; raises InUseError where another has it."""
    try:
        others = [NicRequest(nic.network, nic.ip) for nic in settings.nics]
        given = allocate(network, settings.ip, host_ports, others=others, slots=slots)
    except (InUseError, InvalidArgumentError) as error:
        error.hint = _KEPT
        raise
    macs = [nic.mac for nic in settings.nics]
    for mac in (settings.mac, *macs):
        if is_mac_taken(mac):
            raise InUseError(f"mac {mac} belongs to another vm", hint=_KEPT)
    kept = zip(given.others, macs, strict=True)
    return replace(given, others=tuple(replace(nic, mac=mac) for nic, mac in kept))


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
    for nic in given.others:
        insert_nic(vm.id, nic)
    insert_state_event(vm.id, vm.name, vm.state, "", vm.wanted_state)
    return read_vm(vm.id)


def _insert_disks(vm: VmRecord, disks: list[ExportedDisk]) -> list[DiskRecord]:
    """Give a vm its data disks; one whose name another has gets a piece of the vm's uuid to it."""
    for disk in disks:
        is_taken = Disk.select().where(Disk.name == disk.name).exists()
        Disk.create(
            name=f"{disk.name[:52]}-{vm.uuid[:8]}-{disk.slot}" if is_taken else disk.name,
            size=disk.size,
            vm_id=vm.id,
            slot=disk.slot,
            created_at=time.time(),
        )
    return read_disks(Disk.vm_id == vm.id)


def _write_made(vm_id: int) -> VmRecord:
    Disk.update(is_kept=True).where(Disk.vm_id == vm_id).execute()
    write_state(vm_id, VmState.STOPPED, "imported")
    return read_vm(vm_id)
