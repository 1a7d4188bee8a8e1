"""`make bench`: our vms and answers, measured beside a bare qemu in the same run.

Prints a table with the aims beside the figures and judges nothing: a figure means something on the
machine it was measured on only. Has a network namespace and daemons of its own; what they keep is
in `.run/bench`. The parts are in boot.py, warm.py, libvirt.py, answers.py and daemon.py.
"""

import argparse
import os
import signal
import subprocess
import sys

import answers
import boot
import libvirt
import machine
from daemon import READY_MADE, ROOT, end_leftovers, say

NAMESPACE = "oscloud-bench"
NETNS = ROOT / "packaging/checkout/netns"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--image", choices=["tiny", "debian_12"], default=choose_image())
    parser.add_argument("--runs", type=int, default=3, help="boots of each kind")
    parser.add_argument("--rows", type=int, default=1000, help="vms in the database")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Error: bridges, taps and namespaces are made by root\nHint: sudo make bench")
    if chosen.inside:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every `finally`
        measure(chosen.image, max(1, chosen.runs), max(1, chosen.rows))
        return 0
    return run_inside()


def choose_image() -> str:
    return "debian_12" if (READY_MADE / "debian_12/digest").exists() else "tiny"


def run_inside() -> int:
    """Run this program again in a namespace where its daemons are in nobody's way."""
    subprocess.run([NETNS, "up", NAMESPACE], check=True, stdout=sys.stderr)
    again = [sys.executable, __file__, *sys.argv[1:], "--inside"]
    inside = subprocess.Popen(["ip", "netns", "exec", NAMESPACE, *again])
    signal.signal(signal.SIGTERM, lambda *_: inside.terminate())
    try:
        return inside.wait()
    except KeyboardInterrupt:
        return inside.wait(timeout=60)  # it was interrupted, too, and cleans up
    finally:
        end_leftovers()
        subprocess.run([NETNS, "down", NAMESPACE], check=True, stdout=sys.stderr)


def measure(image: str, runs: int, rows: int) -> None:
    say(f"Booting {image}, {runs} times bare and {runs} times ours")
    facts, boots = boot.measure(image, runs)
    say("Starting a machine under libvirt")
    others = libvirt.measure(max(runs, libvirt.LEAST_RUNS), facts["accelerator"])
    say(f"Asking a daemon that has {rows} vms")
    replies = answers.measure(rows)
    for name, value in machine.describe(**facts).items():
        print(f"{name:<12} {value}")
    print()
    table = [machine.Figure("what", "measured", "aim"), *boots, *others, *replies]
    width = max(len(row.what) for row in table)
    for row in table:
        print(f"{row.what:<{width}} {row.measured:>12} {row.aim:>8}".rstrip())


sys.exit(main())
