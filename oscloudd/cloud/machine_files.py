"""The files of the machine of a vm: its own, those its disk stands on, those of its template."""

from collections.abc import Sequence

from oscloudd.cloud.disk_chain import check_chain, disk_chain
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.vm_paths import vm_paths
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.warm_files import WarmStart, frozen_disk
from oscloudd.config import Config
from oscloudd.host.firmware import UEFI_CODE
from oscloudd.machine.launch import MachineFiles


def machine_files(
    config: Config,
    vm: VmRecord,
    template: ReadyTemplate,
    layer_ids: Sequence[int],
    warm: WarmStart | None,
) -> MachineFiles:
    """Give the files of a vm whose disk stands on these layers, the top first, and make its run
    directory. Blocks.

    Raises HostError where the disk does not.
    """
    chain = disk_chain(config, vm, template, layer_ids)
    check_chain(chain, template)
    paths = vm_paths(config, vm.id, vm.disk_id)
    paths.run_directory.mkdir(parents=True, exist_ok=True)
    layers = chain[1 : 1 + len(layer_ids)]
    return MachineFiles(
        run_directory=paths.run_directory,
        qemu_log=paths.qemu_log,
        console_log=paths.console_log,
        disk=paths.disk,
        base=template.image,
        frozen=None if vm.warm_image is None else frozen_disk(config, vm.warm_image),
        layers=tuple(layer.path for layer in reversed(layers)),
        memory=None if warm is None else warm.memory,
        seed=paths.seed if paths.seed.exists() else None,
        kernel=template.kernel,
        initrd=template.initrd,
        firmware=UEFI_CODE if template.is_uefi else None,
        variables=paths.variables if template.is_uefi else None,
    )
