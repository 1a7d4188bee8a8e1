"""The argument vector of one qemu, as a pure function of what the machine is to be.

Owns every choice about the virtual hardware. Opens nothing and starts nothing: the files, the tap
and the listening sockets are descriptors somebody else has opened, so that qemu needs no right to
any path on the host.
"""

import json
from dataclasses import dataclass
from typing import Any

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# The default code cache of TCG can reach 1 GiB for each machine.
TCG_CODE_CACHE_MIB = 64

# Guests with udev have it as /dev/virtio-ports/NAME, all have it in /sys/class/virtio-ports.
CHANNEL_NAME = "org.oscloud.channel.0"

# The memory of a machine that has it as an object of its own.
MEMORY_OBJECT = "memory0"

# Where disks can be plugged in while the machine runs: the root bus takes none. All eight are
# functions of one device on it, and cost an emulated guest less than 0.1 s of its boot.
PORTS = 8
_PORTS_DEVICE = 0x10

# Numbers of qemu's descriptor sets; "/dev/fdset/N" is what a block or character device opens.
_DISK_SET, _BASE_SET, _SEED_SET, _CONSOLE_LOG_SET, _FROZEN_SET = 1, 2, 3, 4, 5
_FIRMWARE_SET, _VARIABLES_SET = 6, 7

# The first layer's; there is one for each. Plugged in are 100 and more; 1,000 and more are what the
# disk is given while the machine runs.
_LAYER_SETS = 200

# The node that the guest's disk is at the start of its machine, and what the guest sees it by.
DISK_NODE, DISK_DEVICE = "disk", "disk0"


@dataclass(frozen=True)
class Descriptors:
    """Open files a qemu inherits, by their numbers in it; whoever opened them closes them.

    `disk` and `variables` are read-write, `base`, `frozen`, `layers`, `seed` and `firmware`
    read-only, `console_log` write-only with O_APPEND: qemu takes from a set only what has the very
    access mode it wants. `frozen` is a qcow2 between `base` and `disk`; `layers` are more of them
    above it, the lowest first. `firmware` is UEFI's, `variables` the machine's own for it; without
    them it is qemu's BIOS. `kernel`, `initrd` and `memory` are opened again through /proc/self/fd,
    so qemu's user must be allowed to read those files, and to write `memory`.
    """

    monitor: int
    serial: int
    channel: int
    console_log: int
    disk: int
    base: int | None = None
    frozen: int | None = None
    layers: tuple[int, ...] = ()
    seed: int | None = None
    kernel: int | None = None
    initrd: int | None = None
    memory: int | None = None
    firmware: int | None = None
    variables: int | None = None
    tap: int | None = None

    def numbers(self) -> tuple[int, ...]:
        """Give the numbers in use, for `pass_fds`."""
        single = {**vars(self), "layers": None}
        return (*(number for number in single.values() if number is not None), *self.layers)


@dataclass(frozen=True)
class MachineSpec:
    """What the machine is to be, without the files it stands on.

    With a memory file, `memory_shared` writes what the guest writes into it, and without it the
    guest keeps that to itself. `memory_object` without one: a machine that can take up the state
    of one that had such a file. An `incoming` machine has no state until one is restored.
    """

    name: str
    uuid: str
    memory_bytes: int
    cpus: int
    accelerator: str
    mac: str
    binary: str = "qemu-system-x86_64"
    machine_type: str = "q35"
    base_format: str = "qcow2"
    cmdline: str = ""
    memory_shared: bool = False
    memory_object: bool = False
    incoming: bool = False


def build_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    """Build the argument vector; the machine it makes waits for `cont` before its first step."""
    return [
        spec.binary,
        *_process_arguments(spec),
        *_processor_arguments(spec, descriptors),
        *_channel_arguments(descriptors),
        *_firmware_arguments(descriptors),
        *_boot_arguments(spec, descriptors),
        *_disk_arguments(spec, descriptors),
        *_network_arguments(spec, descriptors),
        # Without a source of its own a guest waits for entropy at its first boot.
        *("-object", _json({"qom-type": "rng-builtin", "id": "rng0"})),
        *("-device", _json({"driver": "virtio-rng-pci", "id": "random0", "rng": "rng0"})),
        *_channel_device_arguments(),
        *_port_arguments(),
    ]


def port_name(slot: int) -> str:
    """Name the port that a disk in this slot, 1 to `PORTS`, is plugged into."""
    return f"port{slot}"


def cpu_model(accelerator: str) -> str:
    """Name the processor the vms get; the accelerator is probed with the same one."""
    # la57: five-level page tables cost an emulated guest a level at each walk and give it nothing.
    return "host" if accelerator == "kvm" else "max,la57=off"


def accelerator_argument(accelerator: str) -> str:
    """Give the value of `-accel`."""
    if accelerator == "kvm":
        return "kvm"
    return f"tcg,thread=multi,tb-size={TCG_CODE_CACHE_MIB}"


def _json(value: dict[str, Any]) -> str:
    # qemu's key=value form ends a value at a comma, so text could become options; JSON can't.
    return json.dumps(value, separators=(",", ":"))


def _process_arguments(spec: MachineSpec) -> list[str]:
    return [
        *("-name", f"guest={spec.name}"),
        *("-uuid", spec.uuid),
        "-no-user-config",
        "-nodefaults",
        *("-display", "none"),
        *("-sandbox", SANDBOX),
        "-S",
        *(("-incoming", "defer") if spec.incoming else ()),
    ]


def _processor_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    return [
        *_memory_arguments(spec, descriptors),
        *("-accel", accelerator_argument(spec.accelerator)),
        *("-cpu", cpu_model(spec.accelerator)),
        *("-smp", f"cpus={spec.cpus},sockets=1"),
        *("-m", f"size={spec.memory_bytes // (1 << 20)}M"),
        *("-rtc", "base=utc"),
    ]


def _memory_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    machine = f"{spec.machine_type},usb=off,vmport=off"
    if descriptors.firmware is not None:
        machine += ",pflash0=firmware,pflash1=variables"
    if descriptors.memory is None and not spec.memory_object:
        return ["-machine", machine]
    # A saved state names its memory by this id, whatever the memory is made of.
    memory: dict[str, Any] = {"id": MEMORY_OBJECT, "size": spec.memory_bytes}
    if descriptors.memory is None:
        memory = {"qom-type": "memory-backend-ram", **memory}
    else:
        path = f"/proc/self/fd/{descriptors.memory}"
        memory = {"qom-type": "memory-backend-file", **memory}
        memory |= {"mem-path": path, "share": spec.memory_shared}
    # The state's description of itself stands behind its end, where a cut would not be noticed.
    machine += f",memory-backend={MEMORY_OBJECT},suppress-vmdesc=on"
    return ["-object", _json(memory), "-machine", machine]


def _channel_arguments(descriptors: Descriptors) -> list[str]:
    log = f"logfile=/dev/fdset/{_CONSOLE_LOG_SET},logappend=on"
    return [
        *_add_descriptor(descriptors.console_log, _CONSOLE_LOG_SET),
        *("-chardev", f"socket,id=monitor,fd={descriptors.monitor},server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=serial,fd={descriptors.serial},server=on,wait=off,{log}"),
        *("-serial", "chardev:serial"),
        *("-chardev", f"socket,id=channel,fd={descriptors.channel},server=on,wait=off"),
    ]


def _channel_device_arguments() -> list[str]:
    # A serial line takes an emulated guest 70 us a byte, and this one next to nothing.
    port = {
        "driver": "virtserialport",
        "id": "channel0",
        "bus": "ports0.0",
        "nr": 1,
        "chardev": "channel",
        "name": CHANNEL_NAME,
    }
    return [
        *("-device", _json({"driver": "virtio-serial-pci", "id": "ports0", "max_ports": 2})),
        *("-device", _json(port)),
    ]


def _port_arguments() -> list[str]:
    arguments = []
    for slot in range(1, PORTS + 1):
        port: dict[str, Any] = {"driver": "pcie-root-port", "id": port_name(slot), "chassis": slot}
        port["addr"] = f"{_PORTS_DEVICE:#x}.{slot - 1}"
        port["multifunction"] = slot == 1
        arguments += ["-device", _json(port)]
    return arguments


def _firmware_arguments(descriptors: Descriptors) -> list[str]:
    if descriptors.firmware is None or descriptors.variables is None:
        return []
    return [
        *_add_descriptor(descriptors.firmware, _FIRMWARE_SET),
        *_file_node("firmware", _FIRMWARE_SET, "raw", read_only=True),
        *_add_descriptor(descriptors.variables, _VARIABLES_SET),
        *_file_node("variables", _VARIABLES_SET, "raw", read_only=False),
    ]


def _boot_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    arguments = []
    if descriptors.kernel is None:
        # From the root disk or not at all: a data disk may have a boot sector, too.
        arguments += ["-boot", "strict=on"]
    else:
        arguments += ["-kernel", f"/proc/self/fd/{descriptors.kernel}", "-append", spec.cmdline]
    if descriptors.initrd is not None:
        arguments += ["-initrd", f"/proc/self/fd/{descriptors.initrd}"]
    if descriptors.seed is not None:
        # Tells cloud-init to look for a disk labelled CIDATA and for nothing on the network.
        arguments += ["-smbios", "type=1,serial=ds=nocloud"]
    return arguments


def _disk_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    arguments = []
    if descriptors.base is not None:
        arguments += _add_descriptor(descriptors.base, _BASE_SET)
        arguments += _file_node("base", _BASE_SET, spec.base_format, read_only=True)
    below = None if descriptors.base is None else "base"
    if descriptors.frozen is not None:
        arguments += _add_descriptor(descriptors.frozen, _FROZEN_SET)
        arguments += _file_node(
            "frozen", _FROZEN_SET, "qcow2", read_only=True, options={"backing": below}
        )
        below = "frozen"
    for number, descriptor in enumerate(descriptors.layers):
        name, set_id = f"layer{number}", _LAYER_SETS + number
        arguments += _add_descriptor(descriptor, set_id)
        arguments += _file_node(name, set_id, "qcow2", read_only=True, options={"backing": below})
        below = name
    overlay = build_overlay_options(below)
    arguments += _add_descriptor(descriptors.disk, _DISK_SET)
    arguments += _file_node(DISK_NODE, _DISK_SET, "qcow2", read_only=False, options=overlay)
    # A kernel given directly takes the first place for itself.
    arguments += _disk_device(DISK_NODE, boot_index=0 if descriptors.kernel is None else None)
    if descriptors.seed is not None:
        arguments += _add_descriptor(descriptors.seed, _SEED_SET)
        arguments += _file_node("seed", _SEED_SET, "raw", read_only=True)
        arguments += _disk_device("seed", boot_index=None)
    return arguments


def _add_descriptor(number: int, set_id: int) -> list[str]:
    return ["-add-fd", f"fd={number},set={set_id}"]


def build_file_nodes(
    name: str,
    set_id: int,
    image_format: str,
    *,
    read_only: bool,
    options: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the two block nodes, the lower first, of an image whose descriptor is in a set."""
    file_node = {
        "driver": "file",
        "node-name": f"{name}-file",
        "filename": f"/dev/fdset/{set_id}",
        "read-only": read_only,
        "discard": "unmap",
    }
    format_node = {
        "driver": image_format,
        "node-name": name,
        "file": f"{name}-file",
        "read-only": read_only,
        **(options or {}),
    }
    return file_node, format_node


def build_overlay_options(below: str | None) -> dict[str, Any]:
    """Give what a node has that a guest writes to and that reads what it lacks from another."""
    # An explicit node, or null: the path in the image's header is never followed.
    return {"discard": "unmap", "detect-zeroes": "unmap", "backing": below}


def _file_node(
    name: str,
    set_id: int,
    image_format: str,
    *,
    read_only: bool,
    options: dict[str, Any] | None = None,
) -> list[str]:
    nodes = build_file_nodes(name, set_id, image_format, read_only=read_only, options=options)
    return [word for node in nodes for word in ("-blockdev", _json(node))]


def _disk_device(name: str, *, boot_index: int | None) -> list[str]:
    device: dict[str, Any] = {"driver": "virtio-blk-pci", "id": f"{name}0", "drive": name}
    if boot_index is not None:
        device["bootindex"] = boot_index
    return ["-device", _json(device)]


def _network_arguments(spec: MachineSpec, descriptors: Descriptors) -> list[str]:
    if descriptors.tap is None:
        return []
    backend = build_nic_backend(0, str(descriptors.tap))
    return ["-netdev", _json(backend), "-device", _json(build_nic_device(0, spec.mac))]


def nic_name(slot: int) -> str:
    """Name the device of the network card in a slot; the first card's is 0."""
    return f"nic{slot}"


def nic_backend_name(slot: int) -> str:
    """Name what is behind that card on the host."""
    return f"net{slot}"


def build_nic_backend(slot: int, descriptor: str) -> dict[str, Any]:
    """Give the tap behind a card; `descriptor` is its number, or the name it was sent under."""
    return {"type": "tap", "id": nic_backend_name(slot), "fd": descriptor}


def build_nic_device(slot: int, mac: str) -> dict[str, Any]:
    """Give the card that the guest sees, without the port it is plugged into."""
    card: dict[str, Any] = {
        "driver": "virtio-net-pci",
        "id": nic_name(slot),
        "netdev": nic_backend_name(slot),
        "mac": mac,
    }
    # An empty romfile: nobody boots from the network, and the ROM would be part of a saved state.
    # qemu 7.2 restored with announce-rounds=0 frees the timer of these announcements, and dies when
    # the guest's driver resets the card, as every reboot does.
    return {**card, "romfile": "", "guest_announce": False}
