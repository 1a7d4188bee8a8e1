"""Disks: the overlays vms write to."""

import msgspec

from oscloudd.cloud.missing import missing
from oscloudd.cloud.vm_paths import disk_directory
from oscloudd.config import Config
from oscloudd.store.database import Database
from oscloudd.store.models import Disk, Vm
from oscloudd.units import is_possible_id, parse_key


class DiskInfo(msgspec.Struct, frozen=True):
    """The answer of `disk_info`: `allocated` is what it takes on the host, in bytes."""

    id: int
    name: str
    size: int
    format: str
    template: str | None
    vm: str | None
    path: str
    allocated: int
    created_at: float


class Disks:
    """All disks of this cloud."""

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database

    async def list(self) -> list[DiskInfo]:
        """Describe every disk, by id."""
        return await self._database.run(
            lambda: [self._describe(row) for row in Disk.select().order_by(Disk.id)]
        )

    async def info(self, key: int | str) -> DiskInfo:
        """Describe one disk; raises NotFoundError."""
        key = parse_key(key)
        condition = Disk.id == key if isinstance(key, int) else Disk.name == key

        def read() -> DiskInfo:
            known = isinstance(key, str) or is_possible_id(key)
            row = Disk.get_or_none(condition) if known else None
            if row is None:
                raise missing("disk", key)
            return self._describe(row)

        return await self._database.run(read)

    def _describe(self, row: Disk) -> DiskInfo:
        path = disk_directory(self._config, row.id) / "disk.qcow2"
        owner = Vm.select(Vm.name).where(Vm.disk == row.id).tuples().first()
        return DiskInfo(
            id=row.id,
            name=row.name,
            size=row.size,
            format="qcow2",
            template=row.template_name,
            vm=owner[0] if owner else None,
            path=str(path),
            allocated=path.stat().st_blocks * 512 if path.exists() else 0,
            created_at=row.created_at,
        )
