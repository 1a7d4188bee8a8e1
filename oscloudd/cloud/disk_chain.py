"""What a disk consists of: the one place that knows the files below it."""

from collections.abc import Iterable

from oscloudd.cloud.disk_records import DiskRecord
from oscloudd.cloud.layers import layer_disk
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.vm_paths import disk_file
from oscloudd.cloud.warm_files import frozen_disk
from oscloudd.config import Config
from oscloudd.host.flatten import Layer


def disk_chain(
    config: Config, disk: DiskRecord, template: ReadyTemplate | None, layer_ids: Iterable[int]
) -> list[Layer]:
    """Give the images of a disk, top first: each reads what it lacks from the next.

    `layer_ids` are what `read_chain` says; without a template it began empty. Only the first is
    written to.
    """
    overlays = [disk_file(config, disk.id), *(layer_disk(config, each) for each in layer_ids)]
    if disk.warm_image is not None:
        overlays.append(frozen_disk(config, disk.warm_image))
    chain = [Layer(path, "qcow2") for path in overlays]
    if template is not None:
        chain.append(Layer(template.image, template.declaration.image.format))
    return chain
