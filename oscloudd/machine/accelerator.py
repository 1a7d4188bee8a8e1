"""Which accelerator the vms get, and why: found by running something, not by a device's existence.

Owns the verdict and its cache. A KVM can open, make machines, and still emulate ring 0 one
instruction at a time, 600 ns each; no kernel boots in that. So a small firmware
(`accelerator_probe.S`) computes in ring 0 and ring 3 under a qemu with the very processor the vms
get, and is timed.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from oscloudd.errors import InvalidArgumentError
from oscloudd.host.processes import boot_id
from oscloudd.host.users import QemuUser
from oscloudd.machine.arguments import cpu_model
from oscloudd.machine.probe_run import GUEST_SECONDS, ProbeResult, run_probe

_log = logging.getLogger(__name__)

# Natively both rings take the same time; where ring 0 is emulated it is slower by a thousand.
_RING_RATIO_LIMIT = 25.0
_ATTEMPTS = 2
_KVM_DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class Accelerator:
    """`name` is "kvm" or "tcg"; `reason` a sentence for `daemon_info` and `daemon_doctor`."""

    name: str
    reason: str


class _CachedVerdict(msgspec.Struct, frozen=True):
    boot_id: str
    qemu_version: str
    cpu: str
    name: str
    reason: str


async def choose_accelerator(
    configured: str, binary: str, qemu_version: str, user: QemuUser, cache: Path
) -> Accelerator:
    """Give the accelerator for the vms: the configured one, or for "auto" what a probe says.

    The verdict of a probe is kept in the file `cache` for this boot and this qemu. Never raises
    for a KVM that does not work.
    """
    if configured in ("kvm", "tcg"):
        return Accelerator(configured, f'the configuration says accelerator = "{configured}"')
    if configured != "auto":
        raise InvalidArgumentError(
            f"accelerator {configured!r} is not one", hint="use auto, kvm or tcg"
        )
    if not os.access(_KVM_DEVICE, os.F_OK):
        return Accelerator("tcg", f"there is no {_KVM_DEVICE} on this machine")
    cached = _read_cache(cache, qemu_version)
    if cached is not None:
        return cached
    result = await probe("kvm", binary, user)
    verdict = judge(result, user.name)
    if result.first_sign_seconds is not None:  # a permission may be changed; a processor not
        _write_cache(cache, qemu_version, verdict)
    return verdict


async def probe(accelerator: str, binary: str, user: QemuUser | None) -> ProbeResult:
    """Run the probe under `accelerator`; once more if it was too slow, which may be chance."""
    result = await run_probe(accelerator, binary, user)
    for _ in range(_ATTEMPTS - 1):
        if result.is_correct or not result.timed_out:
            break
        result = await run_probe(accelerator, binary, user)
    _log.debug("probe of %s: %s", accelerator, result)
    return result


def judge(result: ProbeResult, user: str) -> Accelerator:
    """Say what the result of a probe of KVM means; a pure function."""
    fault = _find_fault(result, user)
    if fault is not None:
        return Accelerator("tcg", fault)
    return Accelerator("kvm", f"KVM passed the probe in {result.seconds:.2f} s")


def _find_fault(result: ProbeResult, user: str) -> str | None:
    if "Permission denied" in result.output:
        return f"the user {user}, as whom qemu runs, may not open {_KVM_DEVICE}"
    if result.first_sign_seconds is None:
        return f"qemu does not start a guest with KVM: {_first_line(result.output)}"
    if result.timed_out:
        return (
            "KVM here is far too slow in kernel mode: what takes 0.1 s under TCG "
            f"was not done after {GUEST_SECONDS:g} s"
        )
    if not result.is_correct:
        return "KVM failed the probe: the guest stopped or computed wrongly"
    if result.ring_ratio > _RING_RATIO_LIMIT:
        ratio = f"{result.ring_ratio:.0f}"
        return f"KVM here is {ratio} times slower in kernel mode than in user mode"
    return None


def _first_line(output: str) -> str:
    # What follows it is as a rule the assertion that the error tripped.
    lines = output.strip().splitlines()
    return lines[0].strip() if lines else "it gave no reason"


def _read_cache(path: Path, qemu_version: str) -> Accelerator | None:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_CachedVerdict)
    except (OSError, msgspec.DecodeError):
        return None
    if (kept.boot_id, kept.qemu_version, kept.cpu) != (boot_id(), qemu_version, cpu_model("kvm")):
        return None
    return Accelerator(kept.name, kept.reason)


def _write_cache(path: Path, qemu_version: str, verdict: Accelerator) -> None:
    kept = _CachedVerdict(boot_id(), qemu_version, cpu_model("kvm"), verdict.name, verdict.reason)
    temporary = path.with_suffix(".new")
    try:
        temporary.write_bytes(msgspec.json.encode(kept))
        temporary.replace(path)
    except OSError as error:
        _log.warning("the accelerator's verdict can't be kept: %s", error)
