"""The table of methods: one visible list, each a name, the shape of its parameters, and a handler.

A handler turns checked parameters into a call of the cloud. Nothing here decides anything.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from oscloudd.api.bodies import receive_body
from oscloudd.api.caller import Caller
from oscloudd.api.imports import build_import, build_vm_import
from oscloudd.api.networks import build_network, build_nics
from oscloudd.api.params import (
    DiskCreateParams,
    DiskExportParams,
    DiskParams,
    DiskResizeParams,
    EventWatchParams,
    JobListParams,
    JobParams,
    JobWaitParams,
    NetworkCreateParams,
    NetworkParams,
    NicAddParams,
    NicDeleteParams,
    Params,
    PortAddParams,
    PortListParams,
    PortParams,
    SnapshotCreateParams,
    SnapshotParams,
    SnapshotRestoreParams,
    StopGuestsParams,
    TemplateImportParams,
    TemplateJobParams,
    TemplateParams,
    TemplateWarmParams,
    VmCloneParams,
    VmCreateParams,
    VmDiskParams,
    VmImportParams,
    VmLogParams,
    VmParams,
    VmPublishParams,
    VmQemuCommandParams,
    VmRenameParams,
    VmSetParams,
    VmStartParams,
    VmStopParams,
    VmWaitParams,
    check_job_id,
    check_limit,
    check_seconds,
    check_since,
    check_wait,
)
from oscloudd.cloud.cloud import Cloud
from oscloudd.cloud.disks import DiskRequest
from oscloudd.cloud.jobs import Order
from oscloudd.cloud.port_specs import parse_name, parse_spec
from oscloudd.cloud.taken import NicRequest
from oscloudd.cloud.template_files import check_template_name
from oscloudd.cloud.vm_archive import MAX_ARCHIVE_BYTES
from oscloudd.cloud.vm_clone import CloneRequest
from oscloudd.cloud.vm_create import MAX_CPUS, VmRequest
from oscloudd.cloud.vms import VmSettings
from oscloudd.errors import InvalidArgumentError
from oscloudd.guest.readiness import Sign
from oscloudd.guest.seed import check_user_data
from oscloudd.host.image_header import MAX_SIZE_BYTES
from oscloudd.host.keys import check_public_key
from oscloudd.units import check_name, parse_rate, parse_size

_MAX_LOG_LINES = 100_000
# The longest of qemu 7.2 has 37 characters.
_MAX_COMMAND_LENGTH = 100
# The document goes over a serial line: a password that long is a mistake.
_MAX_PASSWORD_LENGTH = 256
_MAX_DESCRIPTION_LENGTH = 1000


@dataclass(frozen=True)
class Method:
    """A method's parameters and what runs it.

    One with `is_list` costs more the more there is: only a few run at once, and the others wait,
    so that no flood of them makes somebody wait who wants to know of one vm.
    """

    shape: type[Params]
    handler: Callable[[Cloud, Any, Caller], Awaitable[object]]
    is_list: bool = False


async def _daemon_info(cloud: Cloud, _params: Params, caller: Caller) -> object:
    info = await cloud.info()
    you = caller.credentials._asdict()
    return {**{name: getattr(info, name) for name in info.__struct_fields__}, "caller": you}


async def _daemon_stop_guests(cloud: Cloud, params: StopGuestsParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    return await cloud.host_shutdown.stop_all(_order(caller), seconds)


def _order(caller: Caller, *, wait: bool = True) -> Order:
    return Order(caller.credentials.uid, caller.on_progress, wait)


async def _vm_create(cloud: Cloud, params: VmCreateParams, caller: Caller) -> object:
    request = build_request(
        params, cloud.config.guest.default_image, cloud.config.guest.root_password
    )
    return await cloud.creator.create(request, _order(caller, wait=params.wait != "none"))


async def _vm_clone(cloud: Cloud, params: VmCloneParams, caller: Caller) -> object:
    request = CloneRequest(
        name=check_name(params.name),
        snapshot=params.snapshot,
        mem_size=_parse_size(params.mem_size, parameter="mem_size"),
        disk_size=_parse_size(params.disk_size, parameter="disk_size"),
        cpus=params.cpus,
        ip=params.ip,
        wait=params.wait,
    )
    if params.cpus is not None:
        _check_cpus(params.cpus)
    order = _order(caller, wait=params.wait != "none")
    return await cloud.cloner.clone(params.vm, request, order)


def _parse_size(value: int | str | None, *, parameter: str) -> int | None:
    return None if value is None else parse_size(value, parameter=parameter)


async def _vm_start(cloud: Cloud, params: VmStartParams, caller: Caller) -> object:
    return await cloud.power.start(params.vm, _order(caller, wait=params.wait))


async def _vm_stop(cloud: Cloud, params: VmStopParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    order = _order(caller, wait=params.wait)
    return await cloud.power.stop(params.vm, order, force=params.force, timeout_seconds=seconds)


async def _vm_restart(cloud: Cloud, params: VmStopParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    order = _order(caller, wait=params.wait)
    return await cloud.power.restart(params.vm, order, force=params.force, timeout_seconds=seconds)


async def _vm_delete(cloud: Cloud, params: VmStopParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    order = _order(caller, wait=params.wait)
    return await cloud.power.delete(params.vm, order, force=params.force, timeout_seconds=seconds)


async def _vm_suspend(cloud: Cloud, params: VmStartParams, caller: Caller) -> object:
    return await cloud.power.suspend(params.vm, _order(caller, wait=params.wait))


async def _vm_rename(cloud: Cloud, params: VmRenameParams, caller: Caller) -> object:
    return await cloud.vms.rename(params.vm, params.name, _order(caller))


async def _vm_set(cloud: Cloud, params: VmSetParams, caller: Caller) -> object:
    size = params.mem_size
    if params.cpus is not None:
        _check_cpus(params.cpus)
    settings = VmSettings(
        name=params.name if params.name is None else check_name(params.name),
        cpus=params.cpus,
        mem_size=size if size is None else parse_size(size, parameter="mem_size"),
        autostart=params.autostart,
        restart=params.restart,
        protect=params.protect,
        bandwidth=_parse_bandwidth(params.bandwidth),
        network=None if params.network is None else tuple(build_nics(params.network, None)),
    )
    if settings == VmSettings():
        names = ", ".join(VmSettings.__struct_fields__)
        raise InvalidArgumentError(
            "there is nothing to set", hint=f"give one of: {names}", parameter="autostart"
        )
    return await cloud.vms.set(params.vm, settings, _order(caller))


async def _snapshot_create(cloud: Cloud, params: SnapshotCreateParams, caller: Caller) -> object:
    if len(params.description) > _MAX_DESCRIPTION_LENGTH:
        raise InvalidArgumentError(
            f"description is longer than {_MAX_DESCRIPTION_LENGTH}", parameter="description"
        )
    order = _order(caller, wait=params.wait)
    return await cloud.snapshots.create(
        params.vm, check_name(params.name), params.description, order, memory=params.memory
    )


async def _snapshot_restore(cloud: Cloud, params: SnapshotRestoreParams, caller: Caller) -> object:
    order = _order(caller, wait=params.wait)
    return await cloud.snapshots.restore(
        params.vm, params.snapshot, order, force=params.force, disk_only=params.disk_only
    )


async def _snapshot_delete(cloud: Cloud, params: SnapshotParams, caller: Caller) -> object:
    order = _order(caller, wait=params.wait)
    return await cloud.snapshots.delete(params.vm, params.snapshot, order)


def _parse_bandwidth(value: int | str | None) -> int | None:
    if value is None or value == "none":
        return None if value is None else 0
    return parse_rate(value, parameter="bandwidth")


async def _vm_wait(cloud: Cloud, params: VmWaitParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    wanted = check_wait(params)
    if isinstance(wanted, Sign):
        return await caller.unless_gone(cloud.vms.wait_sign(params.vm, wanted, seconds))
    return await caller.unless_gone(cloud.vms.wait(params.vm, wanted, seconds))


async def _vm_log(cloud: Cloud, params: VmLogParams, _caller: Caller) -> object:
    if not 1 <= params.lines <= _MAX_LOG_LINES:
        raise InvalidArgumentError(
            f"lines {params.lines} is not between 1 and {_MAX_LOG_LINES}", parameter="lines"
        )
    return await cloud.vms.log(params.vm, params.source, params.lines)


async def _vm_console(cloud: Cloud, params: VmParams, caller: Caller) -> object:
    caller.attachment = await cloud.vms.console(params.vm)
    return {"escape": None, "log_tail": ""}


async def _vm_qemu_command(cloud: Cloud, params: VmQemuCommandParams, _caller: Caller) -> object:
    if not 1 <= len(params.command) <= _MAX_COMMAND_LENGTH:
        raise InvalidArgumentError(
            f"command {params.command!r:.60} is empty or longer than {_MAX_COMMAND_LENGTH}",
            hint="give the name of a QMP command, such as query-status",
            parameter="command",
        )
    return await cloud.vms.qemu_command(params.vm, params.command, params.arguments)


async def _nic_add(cloud: Cloud, params: NicAddParams, caller: Caller) -> object:
    request = NicRequest(params.network, params.ip)
    return await cloud.nics.add(params.vm, request, _order(caller))


async def _nic_delete(cloud: Cloud, params: NicDeleteParams, caller: Caller) -> object:
    return await cloud.nics.delete(params.vm, params.nic, _order(caller))


async def _port_add(cloud: Cloud, params: PortAddParams, _caller: Caller) -> object:
    return await cloud.ports.add(params.vm, parse_spec(params.port, parameter="port"))


async def _port_delete(cloud: Cloud, params: PortParams, _caller: Caller) -> object:
    return await cloud.ports.delete(parse_name(str(params.port), parameter="port"))


async def _disk_create(cloud: Cloud, params: DiskCreateParams, caller: Caller) -> object:
    size = None if params.size is None else parse_size(params.size, parameter="size")
    request = DiskRequest(check_name(params.name), size, params.template)
    return await cloud.disks.create(request, _order(caller))


async def _disk_attach(cloud: Cloud, params: VmDiskParams, caller: Caller) -> object:
    return await cloud.attachments.attach(params.vm, params.disk, _order(caller))


async def _disk_detach(cloud: Cloud, params: VmDiskParams, caller: Caller) -> object:
    return await cloud.attachments.detach(params.vm, params.disk, _order(caller))


async def _disk_resize(cloud: Cloud, params: DiskResizeParams, caller: Caller) -> object:
    size = parse_size(params.size, parameter="size")
    return await cloud.attachments.resize(params.disk, size, _order(caller))


async def _disk_export(cloud: Cloud, params: DiskExportParams, caller: Caller) -> object:
    order = _order(caller)
    exporting = cloud.exports.disk(params.disk, params.format, caller.send, order)
    return await caller.unless_gone(exporting)


async def _vm_export(cloud: Cloud, params: VmParams, caller: Caller) -> object:
    exporting = cloud.exports.vm(params.vm, caller.send, _order(caller))
    return await caller.unless_gone(exporting)


async def _vm_import(cloud: Cloud, params: VmImportParams, caller: Caller) -> object:
    request = build_vm_import(params)
    body = receive_body(caller.connection, request.size_bytes, MAX_ARCHIVE_BYTES)
    return await cloud.importer.take(request, body, _order(caller))


async def _vm_publish(cloud: Cloud, params: VmPublishParams, caller: Caller) -> object:
    name = check_template_name(params.template)
    return await cloud.publisher.publish(params.vm, name, _order(caller, wait=params.wait))


async def _template_build(cloud: Cloud, params: TemplateJobParams, caller: Caller) -> object:
    return await cloud.templates.build(params.template, _order(caller, wait=params.wait))


async def _template_download(cloud: Cloud, params: TemplateJobParams, caller: Caller) -> object:
    return await cloud.templates.download(params.template, _order(caller, wait=params.wait))


async def _template_import(cloud: Cloud, params: TemplateImportParams, caller: Caller) -> object:
    request = build_import(params)
    body = None
    if not request.url:
        body = receive_body(caller.connection, request.size_bytes, MAX_SIZE_BYTES)
    return await cloud.templates.take(request, body, _order(caller, wait=params.wait))


async def _job_list(cloud: Cloud, params: JobListParams, _caller: Caller) -> object:
    return await cloud.jobs.list(check_limit(params.limit))


async def _job_info(cloud: Cloud, params: JobParams, _caller: Caller) -> object:
    return await cloud.jobs.info(check_job_id(params.job))


async def _job_wait(cloud: Cloud, params: JobWaitParams, caller: Caller) -> object:
    seconds = check_seconds(params.timeout, parameter="timeout")
    job_id = check_job_id(params.job)
    return await caller.unless_gone(cloud.jobs.wait(job_id, seconds, caller.on_progress))


async def _job_cancel(cloud: Cloud, params: JobParams, _caller: Caller) -> object:
    return await cloud.jobs.cancel(check_job_id(params.job))


async def _event_watch(_cloud: Cloud, params: EventWatchParams, caller: Caller) -> object:
    since, limit = check_since(params.since), check_limit(params.limit)
    return await caller.event_stream.watch(
        caller.connection, since, follow=params.follow, limit=limit
    )


async def _template_warm(cloud: Cloud, params: TemplateWarmParams, caller: Caller) -> object:
    mem_size = parse_size(params.mem_size, parameter="mem_size")
    disk_size = parse_size(params.disk_size, parameter="disk_size")
    order = _order(caller, wait=params.wait)
    _check_cpus(params.cpus)
    warming = cloud.warm_images.warm(params.template, mem_size, params.cpus, disk_size, order)
    job = await warming
    return await cloud.template_info(params.template) if params.wait else job


METHODS: dict[str, Method] = {
    "daemon_info": Method(Params, _daemon_info),
    "daemon_doctor": Method(Params, lambda cloud, _, __: cloud.doctor.examine()),
    "daemon_stop_guests": Method(StopGuestsParams, _daemon_stop_guests),
    "vm_create": Method(VmCreateParams, _vm_create),
    "vm_list": Method(Params, lambda cloud, _, __: cloud.vms.list(), is_list=True),
    "vm_info": Method(VmParams, lambda cloud, params, _: cloud.vms.info(params.vm)),
    "vm_start": Method(VmStartParams, _vm_start),
    "vm_stop": Method(VmStopParams, _vm_stop),
    "vm_restart": Method(VmStopParams, _vm_restart),
    "vm_pause": Method(VmParams, lambda cloud, params, _: cloud.power.pause(params.vm)),
    "vm_resume": Method(
        VmParams, lambda cloud, params, caller: cloud.power.resume(params.vm, _order(caller))
    ),
    "vm_suspend": Method(VmStartParams, _vm_suspend),
    "vm_delete": Method(VmStopParams, _vm_delete),
    "vm_clone": Method(VmCloneParams, _vm_clone),
    "vm_rename": Method(VmRenameParams, _vm_rename),
    "vm_set": Method(VmSetParams, _vm_set),
    "vm_export": Method(VmParams, _vm_export),
    "vm_import": Method(VmImportParams, _vm_import),
    "vm_publish": Method(VmPublishParams, _vm_publish),
    "vm_wait": Method(VmWaitParams, _vm_wait),
    "vm_log": Method(VmLogParams, _vm_log, is_list=True),
    "vm_console": Method(VmParams, _vm_console),
    "vm_qemu_command": Method(VmQemuCommandParams, _vm_qemu_command),
    "snapshot_create": Method(SnapshotCreateParams, _snapshot_create),
    "snapshot_list": Method(
        VmParams, lambda cloud, params, _: cloud.snapshots.list(params.vm), is_list=True
    ),
    "snapshot_restore": Method(SnapshotRestoreParams, _snapshot_restore),
    "snapshot_delete": Method(SnapshotParams, _snapshot_delete),
    "disk_list": Method(Params, lambda cloud, _, __: cloud.disks.list(), is_list=True),
    "disk_info": Method(DiskParams, lambda cloud, params, _: cloud.disks.info(params.disk)),
    "disk_create": Method(DiskCreateParams, _disk_create),
    "disk_attach": Method(VmDiskParams, _disk_attach),
    "disk_detach": Method(VmDiskParams, _disk_detach),
    "disk_resize": Method(DiskResizeParams, _disk_resize),
    "disk_delete": Method(DiskParams, lambda cloud, params, _: cloud.disks.delete(params.disk)),
    "disk_export": Method(DiskExportParams, _disk_export),
    "network_list": Method(Params, lambda cloud, _, __: cloud.networks.list(), is_list=True),
    "network_info": Method(
        NetworkParams, lambda cloud, params, _: cloud.networks.info(params.network)
    ),
    "network_create": Method(
        NetworkCreateParams,
        lambda cloud, params, _: cloud.network_maker.create(build_network(params)),
    ),
    "network_delete": Method(
        NetworkParams, lambda cloud, params, _: cloud.network_maker.delete(params.network)
    ),
    "nic_add": Method(NicAddParams, _nic_add),
    "nic_delete": Method(NicDeleteParams, _nic_delete),
    "port_add": Method(PortAddParams, _port_add),
    "port_list": Method(
        PortListParams, lambda cloud, params, _: cloud.ports.list(params.vm), is_list=True
    ),
    "port_delete": Method(PortParams, _port_delete),
    "template_list": Method(Params, lambda cloud, _, __: cloud.templates.list(), is_list=True),
    "template_info": Method(
        TemplateParams, lambda cloud, params, _: cloud.template_info(params.template)
    ),
    "template_build": Method(TemplateJobParams, _template_build),
    "template_download": Method(TemplateJobParams, _template_download),
    "template_import": Method(TemplateImportParams, _template_import),
    "template_delete": Method(
        TemplateParams, lambda cloud, params, _: cloud.template_delete(params.template)
    ),
    "template_warm": Method(TemplateWarmParams, _template_warm),
    "job_list": Method(JobListParams, _job_list, is_list=True),
    "job_info": Method(JobParams, _job_info),
    "job_wait": Method(JobWaitParams, _job_wait),
    "job_cancel": Method(JobParams, _job_cancel),
    "event_watch": Method(EventWatchParams, _event_watch),
}


def build_request(params: VmCreateParams, image: str, password: str) -> VmRequest:
    """Check what can be checked without looking at anything; raises InvalidArgumentError."""
    keys = [params.ssh_key] if isinstance(params.ssh_key, str) else params.ssh_key
    ports = [params.publish] if isinstance(params.publish, str) else params.publish
    _check_cpus(params.cpus)
    chosen = password if params.password is None else params.password
    if not chosen.isprintable() or len(chosen) > _MAX_PASSWORD_LENGTH:
        raise InvalidArgumentError(
            "password has control characters or is longer than 256", parameter="password"
        )
    if params.disk is not None and (params.disk_size, params.image) != (None, None):
        raise InvalidArgumentError(
            "disk can't be given with image or disk_size: it has both",
            hint="leave them out; to make the disk larger: oscloudctl disk-resize",
            parameter="disk",
        )
    disk_size = "10G" if params.disk_size is None else params.disk_size
    first_nic, *other_nics = build_nics(params.network, params.ip)
    return VmRequest(
        name=check_name(params.name),
        image=params.image if params.image is not None else image,
        network=first_nic.network,
        mem_size=parse_size(params.mem_size, parameter="mem_size"),
        disk_size=parse_size(disk_size, parameter="disk_size"),
        disk=params.disk,
        cpus=params.cpus,
        ssh_keys=tuple(check_public_key(key) for key in keys),
        ip=first_nic.ip,
        password=chosen,
        user_data=check_user_data(params.user_data),
        wait=params.wait,
        autostart=params.autostart,
        restart=params.restart,
        warm=params.warm,
        publish=tuple(parse_spec(port, parameter="publish") for port in ports),
        bandwidth=_parse_bandwidth(params.bandwidth) or 0,
        other_nics=tuple(other_nics),
    )


def _check_cpus(cpus: int) -> None:
    if not 1 <= cpus <= MAX_CPUS:
        raise InvalidArgumentError(f"cpus {cpus} is not between 1 and {MAX_CPUS}", parameter="cpus")
