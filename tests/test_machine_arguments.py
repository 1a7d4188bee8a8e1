"""Argument vectors against the files in tests/golden, one argument a line.

After a change that is meant: OSCLOUD_WRITE_GOLDEN=1 pytest tests/test_machine_arguments.py
"""

import json
import os
from pathlib import Path

import pytest

from oscloudd.machine.arguments import Descriptors, MachineSpec, build_arguments
from oscloudd.machine.probe_run import build_probe_arguments

GOLDEN = Path(__file__).with_name("golden")

SPEC = MachineSpec(
    name="my_vm",
    uuid="6f6d3a7e-0f2a-4f0e-9a51-0d5b8a3a1c11",
    memory_bytes=1 << 30,
    cpus=1,
    accelerator="tcg",
    mac="52:54:00:a8:00:02",
    machine_type="pc-q35-7.2",
)

ALWAYS = {"monitor": 10, "serial": 11, "channel": 19, "console_log": 12, "disk": 13}

VECTORS = {
    "direct_kernel": build_arguments(
        MachineSpec(**{**vars(SPEC), "cmdline": "root=/dev/vda rw console=ttyS0 quiet"}),
        Descriptors(**ALWAYS, base=14, kernel=15, initrd=16, tap=17),
    ),
    "cloud_image": build_arguments(
        MachineSpec(**{**vars(SPEC), "accelerator": "kvm", "cpus": 4}),
        Descriptors(**ALWAYS, base=14, seed=15, tap=16),
    ),
    "uefi": build_arguments(
        SPEC, Descriptors(**ALWAYS, base=14, seed=15, firmware=18, variables=20, tap=16)
    ),
    "disk_of_its_own": build_arguments(SPEC, Descriptors(**ALWAYS)),
    "to_be_saved": build_arguments(
        MachineSpec(**{**vars(SPEC), "cmdline": "root=/dev/vda", "memory_shared": True}),
        Descriptors(**ALWAYS, base=14, kernel=15, memory=16, tap=17),
    ),
    "clone": build_arguments(
        MachineSpec(**{**vars(SPEC), "cmdline": "root=/dev/vda", "incoming": True}),
        Descriptors(**ALWAYS, base=14, frozen=18, kernel=15, memory=16, tap=17),
    ),
    "resumed_clone": build_arguments(
        MachineSpec(**{**vars(SPEC), "incoming": True, "memory_object": True}),
        Descriptors(**ALWAYS, base=14, frozen=18, tap=17),
    ),
    "on_layers": build_arguments(
        MachineSpec(**{**vars(SPEC), "cmdline": "root=/dev/vda"}),
        Descriptors(**ALWAYS, base=14, frozen=18, layers=(20, 21), kernel=15, tap=17),
    ),
    "accelerator_probe": build_probe_arguments("qemu-system-x86_64", "kvm", 10),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_the_one_in_the_golden_file(name: str) -> None:
    path = GOLDEN / f"{name}.args"
    text = "\n".join(VECTORS[name]) + "\n"
    if os.environ.get("OSCLOUD_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_text_of_ours_cannot_become_an_option() -> None:
    spec = MachineSpec(**{**vars(SPEC), "mac": "52:54:00:a8:00:02,fd=3", "cmdline": "a,b -S"})
    descriptors = Descriptors(**ALWAYS, kernel=14, tap=15)
    arguments = build_arguments(spec, descriptors)
    cards = [json.loads(a) for a in arguments if a.startswith('{"driver":"virtio-net-pci"')]
    assert [card["mac"] for card in cards] == ["52:54:00:a8:00:02,fd=3"]
    assert arguments[arguments.index("-append") + 1] == "a,b -S"


def test_every_descriptor_is_passed_on() -> None:
    descriptors = Descriptors(**ALWAYS, tap=17)
    assert descriptors.numbers() == (10, 11, 19, 12, 13, 17)
    layered = Descriptors(**ALWAYS, base=14, layers=(20, 21))
    assert layered.numbers() == (10, 11, 19, 12, 13, 14, 20, 21)
