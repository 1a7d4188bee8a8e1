"""The configuration file: one TOML document, every key optional, every mistake named.

Known by every room. Reads; never writes.
"""

import os
import tomllib
from ipaddress import IPv4Address, IPv4Network, ip_network
from pathlib import Path
from typing import Literal

import msgspec

from oscloudd.errors import InvalidArgumentError
from oscloudd.units import parse_size

DEFAULT_PATH = Path("/etc/oscloud/oscloud.toml")

# Each is a process, and a bridge has 1023 ports.
MAX_POOL = 100


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[http]: where the shim listens."""

    listen: str = "127.0.0.1:5000"


class GuestConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[guest]: what every new guest gets unless its creator says otherwise."""

    root_password: str = "123456"  # the original's; "" locks the password
    default_image: str = "debian_12"


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[network]: the network "default", made at first start."""

    subnet: str = "192.168.0.0/16"
    dns: list[str] = []

    def subnet_network(self) -> IPv4Network:
        """Give `subnet` as a network; raises InvalidArgumentError if it has no room for guests."""
        try:
            network = ip_network(self.subnet)
        except ValueError as error:
            raise InvalidArgumentError(
                f"network.subnet {self.subnet!r} is not a network: {error}",
                hint='write it as "192.168.0.0/16"',
            ) from error
        if not isinstance(network, IPv4Network) or network.prefixlen > 29:
            raise InvalidArgumentError(
                f"network.subnet {self.subnet!r} is too small or not IPv4",
                hint="use a /29 or larger",
            )
        return network


class QemuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[qemu]: the program and the user it runs as."""

    binary: str = "qemu-system-x86_64"
    user: str = ""  # "" is oscloud-qemu where it exists, else nobody


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[limits]: how much of the host the vms may have."""

    # That many vms at once are given their disk and started; more wait for their turn.
    max_parallel_starts: int = 4
    # The memory of all vms together may be this many times the host's.
    overcommit: float = 1.0
    # A vm is not made, and one stopped by a full disk does not go on, with less than this free.
    min_free_disk: str = "256M"

    def min_free_disk_bytes(self) -> int:
        """Give `min_free_disk` in bytes; raises InvalidArgumentError."""
        return parse_size(self.min_free_disk, parameter="limits.min_free_disk")


class WarmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[warm]: templates kept booted, so that a new vm is there in under a second."""

    # auto: made in the background after the first cold start of a shape; off: never used; only:
    # no vm is made without one. Each vm_create may say otherwise.
    mode: Literal["auto", "off", "only"] = "auto"
    # The least recently used go when all together take more, or were not used for so many days.
    max_size: str = "8G"
    max_age_days: float = 30.0
    # So many clones of the warm image used last are kept restored and standing still, for the next
    # vms of its shape; 0 for none. Each takes some 40 MB of memory.
    pool: int = 0
    # They are ended when less than this share of the host's memory is available, and none is made
    # before twice as much is.
    pool_min_free_mem: float = 0.1

    def max_size_bytes(self) -> int:
        """Give `max_size` in bytes; raises InvalidArgumentError."""
        return parse_size(self.max_size, parameter="warm.max_size")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """oscloud.toml, whole."""

    state_dir: str = "/var/lib/oscloud"
    runtime_dir: str = "/run/oscloud"
    log_dir: str = "/var/log/oscloud"
    socket: str = ""  # "" is oscloudd.sock in runtime_dir
    template_dirs: list[str] = msgspec.field(
        default_factory=lambda: ["/usr/share/oscloud/templates"]
    )
    database: str = ""  # "" is SQLite in state_dir; or mysql://user:password@host:port/name
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    socket_group: str = "oscloud"
    http: HttpConfig = HttpConfig()
    guest: GuestConfig = GuestConfig()
    network: NetworkConfig = NetworkConfig()
    limits: LimitsConfig = LimitsConfig()
    warm: WarmConfig = WarmConfig()
    qemu: QemuConfig = QemuConfig()

    @property
    def state_path(self) -> Path:
        """What must survive a reboot."""
        return Path(self.state_dir)

    @property
    def runtime_path(self) -> Path:
        """What must not."""
        return Path(self.runtime_dir)

    @property
    def keys_path(self) -> Path:
        """Where private keys are made; emptied at start."""
        return self.runtime_path / "keys"

    @property
    def log_path(self) -> Path:
        """What is kept for people."""
        return Path(self.log_dir)

    @property
    def socket_path(self) -> Path:
        """Where clients connect."""
        return Path(self.socket) if self.socket else self.runtime_path / "oscloudd.sock"


def load_config(path: Path | None) -> Config:
    """Read the configuration at `path`, at OSCLOUD_CONFIG, or the system's, or give the defaults.

    Raises InvalidArgumentError naming file, key and value for anything it does not know.
    """
    named = path or (Path(env) if (env := os.environ.get("OSCLOUD_CONFIG")) else None)
    try:
        document = tomllib.loads((named or DEFAULT_PATH).read_text())
    except FileNotFoundError as error:
        if named is None:
            return Config()
        raise InvalidArgumentError(f"configuration file {named} does not exist") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgumentError(
            f"configuration file {named or DEFAULT_PATH}: {error}"
        ) from error
    return _check(document, named or DEFAULT_PATH)


def _check(document: dict[str, object], path: Path) -> Config:
    try:
        config = msgspec.convert(document, Config)
        _check_network(config.network)
        _check_limits(config.limits)
        _check_warm(config.warm)
    except (msgspec.ValidationError, ValueError, InvalidArgumentError) as error:
        raise InvalidArgumentError(f"configuration file {path}: {error}") from error
    return config


def _check_network(network: NetworkConfig) -> None:
    gateway = network.subnet_network().network_address + 1
    if gateway in map(IPv4Address, network.dns):
        raise InvalidArgumentError(
            f"network.dns {gateway} is the gateway, whose name server would ask itself",
            hint="name the server that is to be asked, or none: then the host's own are asked",
        )


def _check_warm(warm: WarmConfig) -> None:
    warm.max_size_bytes()
    if not 0 <= warm.pool <= MAX_POOL:
        raise InvalidArgumentError(
            f"warm.pool {warm.pool} is not between 0 and {MAX_POOL}",
            hint="it is how many clones are kept ready: 2 is enough for one vm now and then",
        )
    if not 0 <= warm.pool_min_free_mem < 1:
        raise InvalidArgumentError(
            f"warm.pool_min_free_mem {warm.pool_min_free_mem} is not a share between 0 and 1",
            hint="0.1 ends the spare clones when less than a tenth of the memory is available",
        )


def _check_limits(limits: LimitsConfig) -> None:
    limits.min_free_disk_bytes()
    if limits.max_parallel_starts < 1:
        raise InvalidArgumentError(
            f"limits.max_parallel_starts {limits.max_parallel_starts} is not 1 or more"
        )
    if not 0 < limits.overcommit <= 100:
        raise InvalidArgumentError(
            f"limits.overcommit {limits.overcommit} is not a ratio between 0 and 100",
            hint="1.0 lets the vms have the host's memory, 1.5 half as much again",
        )
