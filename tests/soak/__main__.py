"""`make soak`: many vms made and removed side by side for a long time, and what that leaves.

A daemon with the fake qemu in a namespace of its own. It is looked at twice, each time at rest and
without a vm: after a warm-up, and at the end. Exits with 1 if it has more descriptors or threads
then, if its memory has grown by more than a tenth and 8 MiB, or if anything of a vm is left.
"""

import argparse
import contextlib
import os
import random
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from daemon_process import Box, Line, RpcError  # noqa: E402 - found only by the path above
from fake_qemu import install_fake_qemu  # noqa: E402

REST_SECONDS = 60.0
GROWTH, GROWTH_BYTES = 1.1, 8 << 20
MUST_NOT_GROW = ("descriptors", "threads")
# The main thread, the database's, and asyncio's own pool, which fills up as it is used and ends no
# thread: concurrent.futures.ThreadPoolExecutor's default size.
POOLED_THREADS = 2 + min(32, (os.cpu_count() or 1) + 4)
TABLES = ("vm", "disk", "job", "event")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Error: bridges, taps and namespaces are made by root\nHint: sudo make soak")
    seconds = options.minutes * 60
    print(f"seed {options.seed}: {options.clients} clients, {options.minutes:g} min", flush=True)
    with install_fake_qemu() as binary, open_box(binary) as box:
        # Twice as many clients: whatever grows to a limit reaches it now.
        warm_up = soak(box, 2 * options.clients, options.seed, min(seconds / 4, 180))
        first = sample(box)
        done = soak(box, options.clients, options.seed + 1, seconds * 3 / 4)
        last = sample(box)
        faults = compare(first, last) + look_at_log(box)
    print(f"{warm_up} vms made and removed to warm up, {done} more after that")
    for fault in faults:
        print(f"Error: {fault}", file=sys.stderr)
    return 1 if faults else 0


@contextlib.contextmanager
def open_box(binary: Path):
    box = Box(binary)
    try:
        box.start()
        yield box
    finally:
        box.close()


def soak(box: Box, clients: int, seed: int, seconds: float) -> int:
    """Have so many clients at work for so long; give how many vms they have made and removed."""
    end = time.monotonic() + seconds
    done: list[int] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            done.append(live(box, f"vm{number}", random.Random(f"{seed} {number}"), end))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(done)


def live(box: Box, name: str, dice: random.Random, end: float) -> int:
    """Make, stop, start and delete one vm after the other; give how many."""
    rounds = 0
    while time.monotonic() < end:
        with box.connect() as line:
            create(line, name)
            for _ in range(dice.randrange(3)):
                line.call("vm_stop", vm=name, force=dice.random() < 0.5)
                line.call("vm_start", vm=name)
            for verb in dice.sample(("vm_pause", "vm_resume", "vm_restart", "vm_info"), 2):
                line.call(verb, vm=name)
            if dice.random() < 0.5:
                line.call("vm_list")
                with contextlib.suppress(RpcError):  # what goes wrong must leak no more
                    line.call("vm_start", vm=name)
            line.call("vm_delete", vm=name, force=True)
        rounds += 1
    return rounds


def create(line: Line, name: str) -> None:
    line.call("vm_create", name=name, mem_size="64M", disk_size="16M", wait="started")


def sample(box: Box) -> dict[str, int]:
    """Look at a daemon that rests: numbers, and bytes where they are so named."""
    wait_for_rest(box)
    assert box.daemon is not None
    process = Path(f"/proc/{box.daemon.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    found = {
        "descriptors": len(os.listdir(process / "fd")),
        "threads": len(os.listdir(process / "task")),
        "resident bytes": int(status["VmRSS"].split()[0]) * 1024,
    }
    for table in TABLES:
        count = box.rows(f"SELECT COUNT(*) FROM {table}")  # noqa: S608 - one of ours
        found[f"rows: {table}"] = count[0][0]
    files = [path for path in box.root.rglob("*") if path.is_file()]
    found["files"] = len(files)
    database = box.root.glob("state/oscloud.db*")
    found["database bytes"] = sum(path.stat().st_size for path in database)
    return found


def wait_for_rest(box: Box) -> None:
    """Wait until nothing of a vm is left anywhere; what is left then is a fault."""
    end = time.monotonic() + REST_SECONDS
    while left := box.traces():
        assert time.monotonic() < end, left
        time.sleep(0.1)


def compare(first: dict[str, int], last: dict[str, int]) -> list[str]:
    """Print both side by side; give what has grown and must not."""
    print(f"{'':16} {'warmed up':>12} {'at the end':>12} {'more':>10}")
    for name, before in first.items():
        print(f"{name:16} {before:>12} {last[name]:>12} {last[name] - before:>+10}")
    faults = [
        f"{name} grew from {first[name]} to {last[name]}"
        for name in MUST_NOT_GROW
        if last[name] > first[name]
    ]
    if last["threads"] <= POOLED_THREADS:
        faults = [fault for fault in faults if not fault.startswith("threads")]
    before, after = first["resident bytes"], last["resident bytes"]
    if after > before * GROWTH + GROWTH_BYTES:
        faults.append(f"resident memory grew from {before} to {after} bytes")
    return faults


def look_at_log(box: Box) -> list[str]:
    """Give a fault where the daemon has logged an exception."""
    log = box.log()
    begin = log.find("Traceback")
    return [] if begin < 0 else [f"the daemon has logged {log[max(0, begin - 300) : begin + 2000]}"]


if __name__ == "__main__":
    sys.exit(main())
