"""The accelerator probe: its firmware, its clock, its verdicts and their cache."""

import asyncio
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from oscloudd.errors import HostError, InvalidArgumentError
from oscloudd.host.users import QemuUser
from oscloudd.machine import accelerator, probe_run
from oscloudd.machine.accelerator import Accelerator, choose_accelerator, judge, probe
from oscloudd.machine.probe_run import FIRMWARE_BYTES, ProbeResult, build_firmware, run_probe

QEMU = "qemu-system-x86_64"
USER = QemuUser("nobody", 65534, 65534, ())
SOURCE = Path(probe_run.__file__).with_name("accelerator_probe.S")

GOOD = ProbeResult(
    is_correct=True,
    timed_out=False,
    first_sign_seconds=0.05,
    seconds=0.02,
    ring_ratio=1.0,
    output="",
)


def assemble(source: str, directory: Path) -> bytes:
    (directory / "probe.S").write_text(source)
    subprocess.run(["as", "--64", "-o", "probe.o", "probe.S"], cwd=directory, check=True)
    copy = ["objcopy", "-O", "binary", "-j", ".text", "probe.o", "probe.bin"]
    subprocess.run(copy, cwd=directory, check=True)
    return (directory / "probe.bin").read_bytes()


def put_firmware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str) -> None:
    """Make the probe run a firmware in which `old` has been replaced."""
    text = SOURCE.read_text()
    assert old in text
    (tmp_path / "accelerator_probe.bin").write_bytes(assemble(text.replace(old, new), tmp_path))
    monkeypatch.setattr(probe_run, "__file__", str(tmp_path / "probe_run.py"))


def test_the_code_kept_is_the_source_assembled(tmp_path: Path) -> None:
    kept = SOURCE.with_suffix(".bin").read_bytes()
    assert assemble(SOURCE.read_text(), tmp_path) == kept
    assert len(kept) < 4096


def test_the_expected_result_is_the_arithmetic_one() -> None:
    # x -> a x + c composed with itself by squaring, 2 * STEPS times, from 0.
    step, total, count = (6364136223846793005, 1442695040888963407), (1, 0), 20_000_000
    while count:
        if count & 1:
            total = (step[0] * total[0] % 2**64, (step[0] * total[1] + step[1]) % 2**64)
        step = (step[0] * step[0] % 2**64, (step[0] * step[1] + step[1]) % 2**64)
        count >>= 1
    assert f".set    EXPECTED, 0x{total[1]:016X}" in SOURCE.read_text()


def test_the_firmware_has_its_jump_where_a_processor_begins() -> None:
    firmware = build_firmware()
    assert len(firmware) == FIRMWARE_BYTES
    assert firmware[-16:-11] == bytes.fromhex("ea000000f0")


def test_emulation_passes_the_probe_as_the_user_of_the_vms() -> None:
    result = asyncio.run(probe("tcg", QEMU, USER))
    assert result.is_correct, result
    assert judge(result, USER.name).name == "kvm"  # what KVM would get for the same result


def test_a_wrong_result_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_firmware(monkeypatch, tmp_path, "MULTIPLIER, 6364136223846793005", "MULTIPLIER, 5")
    result = asyncio.run(run_probe("tcg", QEMU, USER))
    assert (result.is_correct, result.timed_out) == (False, False)
    assert judge(result, USER.name).name == "tcg"


def test_a_page_fault_that_is_lost_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_firmware(monkeypatch, tmp_path, "IDT + 14 * 16", "IDT + 13 * 16")
    assert not asyncio.run(run_probe("tcg", QEMU, USER)).is_correct


def test_a_slow_ring_0_is_given_up_after_two_tries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_firmware(monkeypatch, tmp_path, "movl    $STEPS, %edx", "movl    $0xFFFFFFFF, %edx")
    monkeypatch.setattr(probe_run, "GUEST_SECONDS", 0.2)
    runs = []

    async def counted(*arguments: object) -> ProbeResult:
        runs.append(await run_probe(*arguments))  # type: ignore[arg-type]
        return runs[-1]

    monkeypatch.setattr(accelerator, "run_probe", counted)
    result = asyncio.run(probe("tcg", QEMU, USER))
    assert len(runs) == 2
    assert result.timed_out
    assert "too slow in kernel mode" in judge(result, USER.name).reason


def test_the_ratio_of_the_rings_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_firmware(monkeypatch, tmp_path, "movl    $STEPS, %edx", "movl    $STEPS * 20, %edx")
    monkeypatch.setattr(probe_run, "GUEST_SECONDS", 30.0)
    assert asyncio.run(run_probe("tcg", QEMU, USER)).ring_ratio > 4


@pytest.mark.parametrize(
    ("result", "name", "reason"),
    [
        (GOOD, "kvm", "passed the probe in 0.02 s"),
        (replace(GOOD, ring_ratio=26.0), "tcg", "26 times slower in kernel mode"),
        (replace(GOOD, is_correct=False), "tcg", "failed the probe"),
        (replace(GOOD, is_correct=False, timed_out=True), "tcg", "far too slow"),
        (
            replace(GOOD, is_correct=False, first_sign_seconds=None, output="no MSR\nAssertion"),
            "tcg",
            "does not start a guest with KVM: no MSR",
        ),
        (
            replace(GOOD, is_correct=False, first_sign_seconds=None, output="Permission denied"),
            "tcg",
            "the user nobody, as whom qemu runs, may not open /dev/kvm",
        ),
    ],
)
def test_every_verdict_has_its_reason(result: ProbeResult, name: str, reason: str) -> None:
    verdict = judge(result, "nobody")
    assert verdict.name == name
    assert reason in verdict.reason


def choose(configured: str, cache: Path, version: str = "QEMU 7.2") -> Accelerator:
    return asyncio.run(choose_accelerator(configured, QEMU, version, USER, cache))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A KVM device that is there and a probe that passes; gives the list of runs."""
    runs = []

    async def passing(name: str, *_: object) -> ProbeResult:
        runs.append(name)
        return GOOD

    (tmp_path / "kvm").touch()
    monkeypatch.setattr(accelerator, "_KVM_DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(accelerator, "run_probe", passing)
    return runs


def test_the_configuration_overrides_the_probe(probes: list[str], tmp_path: Path) -> None:
    assert choose("tcg", tmp_path / "cache").name == "tcg"
    assert choose("kvm", tmp_path / "cache").name == "kvm"
    with pytest.raises(InvalidArgumentError, match="xen"):
        choose("xen", tmp_path / "cache")
    assert probes == []


def test_a_verdict_is_remembered_for_this_boot_and_this_qemu(
    probes: list[str], tmp_path: Path
) -> None:
    cache = tmp_path / "accelerator.json"
    first = choose("auto", cache)
    assert (first.name, choose("auto", cache), probes) == ("kvm", first, ["kvm"])
    choose("auto", cache, "QEMU 8.0")
    assert probes == ["kvm"] * 2
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "boot_id": "another"}))
    choose("auto", cache, "QEMU 8.0")
    cache.write_text("{")
    choose("auto", cache, "QEMU 8.0")
    assert probes == ["kvm"] * 4


def test_without_a_device_nothing_is_run(
    probes: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accelerator, "_KVM_DEVICE", tmp_path / "none")
    assert choose("auto", tmp_path / "cache").reason.startswith("there is no ")
    assert probes == []


def test_a_qemu_that_is_missing_is_an_error() -> None:
    with pytest.raises(HostError, match="no-such-qemu"):
        asyncio.run(run_probe("tcg", "no-such-qemu", USER))
