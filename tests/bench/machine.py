"""The machine the figures belong to, and the shape of a figure."""

import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    measured: str
    aim: str = ""


def give_seconds(what: str, seconds: list[float], aim: str = "") -> Figure:
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    median = statistics.median(seconds)
    return Figure(f"{what} (median of {len(seconds)}; {spread})", f"{median:.2f} s", aim)


def give_ratio(what: str, ours: list[float], bare: list[float], aim: float) -> Figure:
    ratio = statistics.median(ours) / statistics.median(bare)
    return Figure(what, f"{ratio:.3f}", f"{aim}")


def describe(**daemon_facts: str) -> dict[str, str]:
    """Give what somebody has to know to compare."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.partition(": ")[2] for line in cpuinfo.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        **daemon_facts,
    }
