"""A box with a warm image of the fake qemu's guest, whose daemons keep spares of it, or none."""

from typing import Any

from cloud_accounts import tail
from daemon_process import IMAGE
from daemon_zygote import ZygoteBox

MEM_SIZE = "64M"


class SpareBox(ZygoteBox):
    """A cloud that keeps one spare, or none."""

    def restart(self, pool: int, *, wait: bool = True) -> None:
        """Have a daemon with a pool of this size, and with `wait` its spares ready."""
        if self.daemon is not None:
            assert self.end() == 0, tail(self)
        path = self.root / "oscloud.toml"
        before, _, rest = path.read_text().partition("[warm]\n")
        warm = f'mode = "auto"\npool = {pool}\n'
        path.write_text(f"{before}[warm]\n{warm}{rest[rest.index('[qemu]') :]}")
        self.start()
        if wait:
            self.until(lambda: self.count_spares() == pool, f"a pool of {pool}")

    def warm(self) -> None:
        """Make the warm image."""
        self.call("template_warm", template=IMAGE, mem_size=MEM_SIZE, disk_size="16M")

    def count_spares(self) -> int:
        warm = self.call("template_info", template=IMAGE)["warm"]
        return sum(image["spares"] for image in warm)

    def traces(self) -> dict[str, Any]:
        found = super().traces()
        left = [
            str(path.relative_to(self.root))
            for pattern in ("run/spares/*", "state/spares/*")
            for path in self.root.glob(pattern)
        ]
        return found | ({"spares": left} if left else {})
