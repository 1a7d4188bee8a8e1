"""Making a vm: everything checked, everything reserved in one transaction with the job's row.

What is then done, step by step, is in `operations`; whatever fails on the way, all of it is undone.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from peewee import IntegrityError

from oscloudd.cloud.allocation import mac_of
from oscloudd.cloud.disk_records import DiskRecord, check_can_boot, read_disk
from oscloudd.cloud.disk_sizes import check_room
from oscloudd.cloud.job_rows import insert_job
from oscloudd.cloud.jobs import Job, JobInfo, Jobs, Order
from oscloudd.cloud.memory import check_memory
from oscloudd.cloud.networks import NetworkRecord, Networks, read_network, takes_ipv6
from oscloudd.cloud.new_identity import Access, draw_identity
from oscloudd.cloud.operations import OPERATIONS, Operations
from oscloudd.cloud.port_specs import PortSpec
from oscloudd.cloud.ports import Ports, insert_ports
from oscloudd.cloud.spare import Spare
from oscloudd.cloud.states import VmState, WantedState
from oscloudd.cloud.taken import (
    NicRequest,
    allocate,
    draw_uuid,
    insert_nic,
    is_mac_taken,
)
from oscloudd.cloud.template_files import Declaration, Identity, ReadyTemplate
from oscloudd.cloud.templates import Templates
from oscloudd.cloud.vm_records import VmInfo, describe, read_vm
from oscloudd.cloud.vm_states import insert_state_event
from oscloudd.cloud.warm_files import WarmImage
from oscloudd.cloud.warm_images import WarmImages
from oscloudd.cloud.warm_making import DEFAULT_DISK_SIZE, Shape
from oscloudd.cloud.warm_pool import WarmPool
from oscloudd.config import Config
from oscloudd.errors import (
    AlreadyExistsError,
    CloudError,
    InvalidArgumentError,
    InvalidStateError,
    UnavailableError,
)
from oscloudd.guest.identity import (
    GuestIdentity,
    build_document,
    build_instance_document,
)
from oscloudd.host.firmware import check_uefi
from oscloudd.host.images import virtual_size_bytes
from oscloudd.host.keys import HostKey, HostKeys
from oscloudd.host.passwords import hash_password
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Layer, Vm
from oscloudd.store.models import Job as JobRow
from oscloudd.units import format_size

# qemu 7.2 takes 255 processors on q35 without x2APIC.
MAX_CPUS = 255


@dataclass(frozen=True)
class Original:
    """What the disk of a clone stands on: a layer, and the warm image below that if any."""

    layer_id: int
    warm_image: str | None


@dataclass(frozen=True)
class VmRequest:
    """What is asked for, checked as far as it can be without looking at anything.

    `network` and `ip` are its first card's, `other_nics` the further ones. A clone has an
    `original`, and who may log in is on its disk: keys and password are of no use.
    """

    name: str
    image: str
    network: str | int
    mem_size: int
    disk_size: int
    disk: str | int | None
    cpus: int
    ssh_keys: tuple[str, ...]
    ip: str | None
    password: str
    user_data: str
    wait: str
    autostart: str = "no"
    restart: str = "no"
    warm: str | None = None
    original: Original | None = None
    publish: tuple[PortSpec, ...] = ()
    bandwidth: int = 0
    other_nics: tuple[NicRequest, ...] = ()


class VmCreator:
    """Makes vms."""

    def __init__(
        self,
        config: Config,
        database: Database,
        networks: Networks,
        templates: Templates,
        jobs: Jobs,
        operations: Operations,
        warm_images: WarmImages,
        pool: WarmPool,
        ports: Ports,
    ) -> None:
        self._config = config
        self._ports = ports
        self._database = database
        self._networks = networks
        self._templates = templates
        self._jobs = jobs
        self._operations = operations
        self._warm_images = warm_images
        self._pool = pool
        self._keys = HostKeys(config.keys_path)

    def prepare(self) -> None:
        """Have at hand what the first vm needs."""
        self._keys.prepare()

    async def close(self) -> None:
        """Make no keys any more."""
        await self._keys.close()

    async def create(self, request: VmRequest, order: Order) -> VmInfo | JobInfo:
        """Make a vm, and answer when it has come as far as `request.wait` says.

        With "none" that is at once, and the answer is the job; its template has to be there then.
        Else one that is declared only is made first.
        """
        if request.disk is not None:
            request = await self._on_disk(request, request.disk)
        template = await self._get_template(request, order)
        self._check_fits(request, template)
        warm = await self._find_warm(request, template)
        return await self._make(request, template, warm, order)

    async def clone(self, request: VmRequest, order: Order) -> VmInfo | JobInfo:
        """Make a vm whose disk stands on its `original`, and answer as `create` does."""
        template = self._templates.get_ready(request.image)
        check_room(self._config, "vm")
        return await self._make(request, template, None, order)

    async def _make(
        self, request: VmRequest, template: ReadyTemplate, warm: WarmImage | None, order: Order
    ) -> VmInfo | JobInfo:
        key = await self._keys.take()
        async with self._ports.reserving(request.publish):
            row = await self._insert(request, template, warm, key, order)
        job, task = await self._operations.begin_made(row, order)
        task.add_done_callback(lambda _done: self._keys.prepare())
        if request.wait == "none" or not order.wait:
            return await self._jobs.info(job.id)
        if request.wait == "started":
            started = asyncio.ensure_future(self._started(job))
            await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
            started.cancel()
            if task.done():
                task.result()
        else:
            await asyncio.shield(task)
        return describe(await self._database.run(lambda: read_vm(row.vm_id)))

    async def _on_disk(self, request: VmRequest, key: int | str) -> VmRequest:
        """Have what a vm is to be follow from the disk that it is to begin on; it boots."""
        disk = await self._database.run(lambda: read_disk(key))
        if disk.template is None:
            raise InvalidStateError(
                f"disk {disk.name!r} stands on no template: nothing tells what it boots with",
                hint="make one that has a system: oscloudctl disk-create NAME --template "
                f"{self._config.guest.default_image}; or attach this one to a vm: oscloudctl "
                f"disk-attach VM {disk.name}",
            )
        if request.warm == "only":
            raise InvalidArgumentError(
                "a vm on a disk of its own can't begin warm",
                hint="leave warm out",
                parameter="warm",
            )
        return replace(request, disk=disk.id, image=disk.template, disk_size=disk.size, warm="off")

    async def _get_template(self, request: VmRequest, order: Order) -> ReadyTemplate:
        """Give the template, made first if need be; nobody waits for one to be refused then."""
        is_there = self._templates.find_ready(request.image) is not None
        if is_there or request.wait == "none" or not order.wait:
            return self._templates.get_ready(request.image)
        _check_suits(request, self._templates.get_declaration(request.image))
        await self._database.run(lambda: self._check_can_reserve(request))
        return await self._templates.ensure(request.image, order)

    async def _find_warm(self, request: VmRequest, template: ReadyTemplate) -> WarmImage | None:
        """Choose the warm image a new vm begins with; raises InvalidStateError if it must."""
        mode = self._config.warm.mode if request.warm is None else request.warm
        # A saved machine has one card, and its guest is told of one.
        if mode == "off" or (request.other_nics and mode != "only"):
            return None
        if request.user_data:  # for a first boot, which a clone has none of
            if mode == "only":
                raise InvalidArgumentError(
                    "a vm with user_data can't begin warm: cloud-init takes them in at first boot",
                    hint="leave user_data out, or warm",
                    parameter="warm",
                )
            return None
        if request.other_nics:
            raise InvalidArgumentError(
                "a vm with several network cards can't begin warm",
                hint="leave warm out, or add the other cards afterwards: oscloudctl nic-add",
                parameter="warm",
            )
        shape = Shape(template, request.mem_size, request.cpus, request.disk_size)
        warm = await self._warm_images.find(shape)
        if warm is None and mode == "only":
            raise InvalidStateError(
                f"there is no warm image of {template.name} with mem_size {request.mem_size}, "
                f"cpus {request.cpus} and a disk of at most {request.disk_size} bytes",
                hint=f"make one: oscloudctl template-warm {template.name} "
                f"--mem-size {format_size(request.mem_size)} --cpus {request.cpus} "
                f"--disk-size {format_size(min(request.disk_size, DEFAULT_DISK_SIZE))}",
            )
        if warm is not None:
            warm.mark_used()
        return warm

    async def _started(self, job: Job) -> None:
        running = [step.name for step in OPERATIONS["vm_create"].steps].index("running")
        await job.passed(running + 1)

    def _check_fits(self, request: VmRequest, template: ReadyTemplate) -> None:
        if template.has_no_image:
            raise InvalidArgumentError(
                f"template {request.image} has no image: it is what imported vms boot with",
                hint="choose another: oscloudctl template-list",
                parameter="image",
            )
        _check_suits(request, template.declaration)
        if template.is_uefi:
            check_uefi()
        if request.disk is not None:
            return
        least = virtual_size_bytes(template.image, template.declaration.image.format)
        if request.disk_size < least:
            raise InvalidArgumentError(
                f"disk_size {request.disk_size} is smaller than the image {request.image}",
                hint=f"give it at least {least} bytes",
                parameter="disk_size",
            )
        check_room(self._config, "vm")

    async def _insert(
        self,
        request: VmRequest,
        template: ReadyTemplate,
        warm: WarmImage | None,
        key: HostKey,
        order: Order,
    ) -> JobRow:
        spare = None if warm is None else self._pool.claim(warm)
        try:
            await self._pool.make_room(request.mem_size)
            return await self._database.run(
                lambda: self._reserve(request, template, warm, spare, key, order.owner_uid)
            )
        except BaseException as error:
            if spare is not None:
                await self._give_back(spare, error)
            if isinstance(error, IntegrityError):
                raise UnavailableError(
                    "another vm was given the same resources at the same moment", hint="try again"
                ) from error
            raise

    async def _give_back(self, spare: Spare, error: BaseException) -> None:
        # Nothing was wrong with it where the request was refused. Else a vm may have its uuid or
        # its tap after all, and it would be in the way of the next one, too.
        if isinstance(error, CloudError) and not isinstance(error, UnavailableError):
            self._pool.give_back(spare)
        else:
            await self._pool.end_claimed(spare.uuid)

    async def check_can_clone(self, request: VmRequest) -> None:
        """Say what stands against a vm before anything is done to its original."""
        _check_suits(request, self._templates.get_ready(request.image).declaration)

        def check() -> None:
            network = self._check_can_reserve(request)
            host_ports = self._ports.host_ports()
            allocate(network, request.ip, host_ports, others=request.other_nics)

        await self._database.run(check)

    def _check_can_reserve(self, request: VmRequest) -> NetworkRecord:
        """Say in a transaction what stands against a vm; give the network it is to be in."""
        network = read_network(request.network)
        check_name_is_free(request.name)
        check_memory(request.mem_size, self._config.limits.overcommit)
        return network

    def _reserve(
        self,
        request: VmRequest,
        template: ReadyTemplate,
        warm: WarmImage | None,
        spare: Spare | None,
        key: HostKey,
        owner_uid: int,
    ) -> JobRow:
        """Insert the rows, the job's among them; nobody else can be given the same."""
        _check_still_there(request, template, warm)
        network = self._check_can_reserve(request)
        unique = draw_uuid() if spare is None else uuid.UUID(spare.uuid)
        if is_mac_taken(mac_of(unique.hex)):
            raise UnavailableError("the spare clone has another vm's MAC", hint="try again")
        given = allocate(
            network,
            request.ip,
            self._ports.host_ports(),
            others=request.other_nics,
            tap_index=None if spare is None else spare.tap_index,
        )
        there = None if request.disk is None else read_disk(request.disk)
        identity = draw_identity(
            request.name, network, given, key, _access_of(request, template, there),
            uuid_hex=unique.hex, resolvers=self._networks.resolvers(network),
            has_ipv6=takes_ipv6(template),
        )  # fmt: skip
        told_by = template.declaration.guest.identity
        if told_by == "dhcp":
            self._networks.check_serves_dhcp()
        if there is not None:
            check_can_boot(there, takes_identity_once=told_by == "serial")
        now = time.time()
        vm = Vm.create(
            name=request.name,
            uuid=str(unique),
            disk=_insert_disk(request, template, warm, unique, now) if there is None else there.id,
            network=network.id,
            mem_size=request.mem_size,
            cpus=request.cpus,
            ip=given.ip,
            dual_stack=takes_ipv6(template),
            mac=identity.mac,
            tap_interface_idx=given.tap_index,
            qemu_serial_port=given.serial_port,
            state=VmState.CREATING,
            wanted_state=WantedState.RUNNING,
            host_keys="" if told_by == "dhcp" else key.public,
            seed_document=_document_for(identity, str(unique), warm, told_by),
            autostart=request.autostart,
            restart=request.restart,
            bandwidth=request.bandwidth,
            owner_uid=owner_uid,
            created_at=now,
        )
        for nic in given.others:
            insert_nic(vm.id, nic)
        insert_ports(vm.id, vm.name, request.publish)
        return _insert_job(request, vm, identity if told_by == "cloud-init" else None, spare)


def _check_still_there(request: VmRequest, template: ReadyTemplate, warm: WarmImage | None) -> None:
    """Say what of that which a vm is to stand on has gone since it was chosen."""
    if not template.image.exists():
        raise UnavailableError(
            f"template {template.name} has just been deleted", hint="choose another image"
        )
    if warm is not None and not warm.directory.exists():
        raise UnavailableError(f"warm image {warm.name} has just been removed", hint="try again")
    if request.original is not None and not _is_layer(request.original.layer_id):
        raise UnavailableError(
            "what was to be cloned has just been deleted", hint="see: oscloudctl vm-list"
        )


def _access_of(request: VmRequest, template: ReadyTemplate, there: DiskRecord | None) -> Access:
    """Give who may log in; a copy of another guest's disk has accounts already."""
    has_accounts = template.has_identity or (there is not None and bool(there.has_identity))
    return Access(
        hash_password(request.password),
        request.ssh_keys,
        is_kept=request.original is not None,
        is_copy=request.original is not None or has_accounts,
    )


def _insert_disk(
    request: VmRequest,
    template: ReadyTemplate,
    warm: WarmImage | None,
    unique: uuid.UUID,
    created_at: float,
) -> int:
    """Insert the row of a vm's own disk, and give its id."""
    original = request.original
    return int(
        Disk.create(
            # Not the vm's name alone: that may be given to another once this vm is renamed.
            name=f"{request.name[:54]}-{unique.hex[:8]}",
            size=request.disk_size,
            template_name=template.name,
            warm_image=original.warm_image if original is not None else warm and warm.name,
            layer_id=None if original is None else original.layer_id,
            created_at=created_at,
        ).id
    )


def _document_for(
    identity: GuestIdentity, instance_id: str, warm: WarmImage | None, told_by: Identity
) -> str:
    """Give what a vm is told by ourselves; one that boots with cloud-init has its seed."""
    if told_by == "serial":
        return build_document(identity)
    return "" if warm is None else build_instance_document(identity, instance_id)


def _insert_job(
    request: VmRequest, vm: Vm, identity: GuestIdentity | None, spare: Spare | None
) -> JobRow:
    params: dict[str, Any] = {"wait": request.wait}
    if spare is not None:
        params["spare"] = spare.uuid
    if identity is not None:  # it goes into a seed, which a later daemon may have to write
        params |= {"identity": msgspec.to_builtins(identity), "user_data": request.user_data}
    insert_state_event(vm.id, vm.name, vm.state, "", vm.wanted_state)
    kind = "vm_create" if request.original is None else "vm_clone"
    first = OPERATIONS[kind].steps[0].name
    return insert_job(kind, vm.name, vm.owner_uid, stage=first, vm_id=vm.id, params=params)


def _check_suits(request: VmRequest, declaration: Declaration) -> None:
    """Say what a template's declaration has against a vm."""
    if request.mem_size < declaration.min_mem_bytes:
        raise InvalidArgumentError(
            f"mem_size {request.mem_size} is too small for {request.image}",
            hint=f"give it at least {declaration.min_mem_size}",
            parameter="mem_size",
        )
    if request.user_data and declaration.guest.identity != "cloud-init":
        raise InvalidArgumentError(
            f"user_data is for images with cloud-init, and {request.image} has none",
            hint="leave user_data out, or choose another image",
            parameter="user_data",
        )


def _is_layer(layer_id: int) -> bool:
    return bool(Layer.select().where(Layer.id == layer_id, Layer.whole).exists())


def check_name_is_free(name: str) -> None:
    """Raise AlreadyExistsError in a transaction where a vm of this name is there."""
    if Vm.select().where(Vm.name == name).exists():
        raise AlreadyExistsError(
            f"vm {name!r} already exists",
            hint=f"choose another name, or delete it: oscloudctl vm-delete {name}",
            object="vm",
            name=name,
        )
