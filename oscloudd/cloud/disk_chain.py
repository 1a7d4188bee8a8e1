"""What a disk consists of: the one place that knows the files below it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from oscloudd.cloud.disk_records import DiskRecord
from oscloudd.cloud.layers import layer_disk
from oscloudd.cloud.template_files import ReadyTemplate
from oscloudd.cloud.vm_paths import disk_file
from oscloudd.cloud.vm_records import VmRecord
from oscloudd.cloud.warm_files import frozen_disk
from oscloudd.config import Config
from oscloudd.errors import HostError
from oscloudd.host.image_chain import Layer
from oscloudd.host.image_header import read_backing_name

# layers/7/disk.qcow2: what is above is the state directory, which may be another by now.
_NAMING_PARTS = 3


def disk_chain(
    config: Config,
    disk: DiskRecord | VmRecord,
    template: ReadyTemplate | None,
    layer_ids: Iterable[int],
) -> list[Layer]:
    """Give the images of a disk, or of a vm's root disk, top first: each reads what it lacks from
    the next.

    `layer_ids` are what `read_chain` says; without a template it began empty. Only the first is
    written to.
    """
    disk_id = disk.id if isinstance(disk, DiskRecord) else disk.disk_id
    overlays = [disk_file(config, disk_id), *(layer_disk(config, each) for each in layer_ids)]
    if disk.warm_image is not None:
        overlays.append(frozen_disk(config, disk.warm_image))
    chain = [Layer(path, "qcow2") for path in overlays]
    if template is not None:
        chain.append(Layer(template.image, template.declaration.image.format))
    return chain


def check_chain(chain: Sequence[Layer], template: ReadyTemplate | None) -> None:
    """Raise HostError unless each image of a disk was made to stand on the next. Blocks.

    After an older copy of the database was put back, the rows tell of a disk as it was then: its
    guest would read parts of two disks, and write what it makes of them.
    """
    top, *frozen = chain
    _check(top, frozen[:1], stands_on_nothing=_is_whole(template) and len(frozen) == 1)
    check_frozen(frozen, template)


def check_frozen(chain: Sequence[Layer], template: ReadyTemplate | None) -> None:
    """Raise HostError unless each image that nobody writes to belongs on the next. Blocks.

    A layer may say that it stands on one further down. Merged with those between, it has all that
    they have, and a daemon that died then has left their rows: read through them or not, it reads
    the same. No other disk's is taken for it, since a layer is never made anew under its id.
    """
    for number, layer in enumerate(chain, 1):
        _check(layer, chain[number:], stands_on_nothing=_is_whole(template))


def stands_on(layer: Layer, below: Layer) -> bool:
    """Tell whether one image says that it stands on the other; raises HostError. Blocks."""
    return _read_name(layer) == _naming(below.path)


def _check(layer: Layer, below: Sequence[Layer], *, stands_on_nothing: bool) -> None:
    named = _read_name(layer)
    expected = [_naming(each.path) for each in below] or [()]
    if named is None or named in expected or (named == () and stands_on_nothing):
        return
    raise HostError(
        f"{layer.path} stands on {'/'.join(named) or 'nothing'}, and the database says "
        f"on {below[0].path if below else 'nothing'}",
        hint="if an older copy of the database was put back, put the newer one back",
    )


def _is_whole(template: ReadyTemplate | None) -> bool:
    # An imported vm's disk stands on nothing, whatever its template is.
    return template is not None and template.has_no_image


def _read_name(layer: Layer) -> tuple[str, ...] | None:
    """Give by what an image names the one it stands on; None for a format that can't."""
    if layer.format != "qcow2":
        return None
    try:
        with layer.path.open("rb") as image:
            return _naming(Path(read_backing_name(image)))
    except OSError as error:
        raise HostError(f"{layer.path} can't be read: {error.strerror}") from error


def _naming(path: Path) -> tuple[str, ...]:
    return path.parts[-_NAMING_PARTS:]
