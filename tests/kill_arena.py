"""Where the model and a cloud play against each other, and `make kills`, which lets them long.

python tests/kill_arena.py [--fake KILLS] [--real KILLS] [--seed NUMBER]
"""

import argparse
import contextlib
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud_model import CloudMachine
from daemon_process import IMAGE
from daemon_zygote import ZygoteBox
from fake_qemu import install_fake_qemu
from guest_cloud import keep_template
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test


@dataclass
class Arena:
    """Where the machine plays: a cloud, made anew when a play in it failed, and the score.

    The cloud has a warm image, which every other vm begins with. `addresses` are those of guests
    that answer as an sshd does; `longest_wait_us` bounds the wait before a kill, `steps` is how
    many a play has at most. `is_fake`: its guests count on their disks how often they ran, and
    let go of disks at once.
    """

    open_box: Callable[[], ZygoteBox]
    names: tuple[str, ...]
    creation: dict[str, Any]
    longest_wait_us: int
    steps: int
    is_fake: bool = False
    box: ZygoteBox = field(init=False)
    kills: Counter[str] = field(default_factory=Counter)
    wanted_kills: int = 1
    failure: BaseException | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _is_open: bool = False

    @property
    def is_over(self) -> bool:
        """Whether enough have been killed: the rest of the steps that were drawn does nothing."""
        return self.failure is not None or self.kills.total() >= self.wanted_kills

    def address(self, name: str) -> str:
        return f"192.168.7.{10 + self.names.index(name)}"

    def ensure_open(self) -> None:
        if not self._is_open:
            self.box = self.open_box()
            self._is_open = True
            self.box.start()
            shape = {name: self.creation[name] for name in ("mem_size", "disk_size")}
            self.box.call("template_warm", template=self.creation.get("image", IMAGE), **shape)
            if "image" not in self.creation:
                for name in self.names:
                    self._stack.enter_context(self.box.sshd_at(self.address(name)))

    def discard(self) -> None:
        if self._is_open:
            self._is_open = False
            self._stack.close()
            self.box.discard()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._stack.close()
            self.box.close()


class RealBox(ZygoteBox):
    """A box with the real qemu and the guest `tiny`."""

    def __init__(self) -> None:
        binary = shutil.which("qemu-system-x86_64")
        assert binary is not None
        super().__init__(Path(binary))
        shutil.copytree(keep_template("tiny"), self.root / "state/templates/tiny")


@contextlib.contextmanager
def fake_arena(binary: Path) -> Iterator[Arena]:
    creation = {"mem_size": "64M", "disk_size": "16M", "wait": "ready"}
    names = ("web", "shop", "blog", "mail")
    with closing(Arena(lambda: ZygoteBox(binary), names, creation, 200_000, 40, True)) as arena:
        yield arena


@contextlib.contextmanager
def real_arena() -> Iterator[Arena]:
    creation = {"image": "tiny", "mem_size": "256M", "disk_size": "1G", "wait": "ready"}
    with closing(Arena(RealBox, ("web", "shop", "blog"), creation, 6_000_000, 10)) as arena:
        yield arena


@contextlib.contextmanager
def closing(arena: Arena) -> Iterator[Arena]:
    try:
        yield arena
    except BaseException:
        arena.discard()
        raise
    arena.close()


def play(arena: Arena, kills: int, seed: int) -> None:
    """Play until so many daemons have been killed; what is drawn depends on the seed only."""
    print(f"seed {seed}: at least {kills} kills", flush=True)
    rules = settings(
        max_examples=10,
        stateful_step_count=arena.steps,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    arena.wanted_kills = kills
    batch = 0
    while not arena.is_over:
        machine = type("Machine", (CloudMachine,), {"arena": arena})
        try:
            run_state_machine_as_test(seeded(seed * 1000 + batch)(machine), settings=rules)
        except BaseException as error:
            # Hypothesis tries again what has failed, and finds it flaky: the instant was another.
            raise (arena.failure or error) from None
        batch += 1
        print(f"{arena.kills.total()} kills so far", flush=True)
    print(f"seed {seed}: {arena.kills.total()} kills: {dict(arena.kills.most_common())}")


def main() -> None:
    """Do what `make kills` promises."""
    parser = argparse.ArgumentParser(description="Kill the daemon at random, very often.")
    parser.add_argument("--fake", type=int, default=1000, help="kills with the fake qemu")
    parser.add_argument("--real", type=int, default=30, help="kills with real guests")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    begun = time.monotonic()
    with install_fake_qemu() as binary, fake_arena(binary) as arena:
        play(arena, options.fake, options.seed)
    print(f"fake qemu: {time.monotonic() - begun:.0f} s", flush=True)
    begun = time.monotonic()
    with real_arena() as arena:
        play(arena, options.real, options.seed)
    print(f"real qemu: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
