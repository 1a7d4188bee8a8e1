"""Running a command as a service of its own, outside the confinement that the daemon is under.

For what needs more than the daemon may: debootstrapping mounts and gives files away. Where the
daemon is no service it is not confined either, and the command is its child as usual.
"""

from collections.abc import Sequence
from contextlib import suppress

from oscloudd.errors import HostError
from oscloudd.host.activation import is_service
from oscloudd.host.commands import OnLine, run
from oscloudd.host.processes import child_environment

_STOP_SECONDS = 60.0


async def run_apart(
    argv: Sequence[str], unit: str, *, timeout_seconds: float, on_line: OnLine | None = None
) -> str:
    """Run `argv` as `commands.run` does, as the service `unit` where there is systemd."""
    if not is_service():
        return await run(argv, timeout_seconds=timeout_seconds, on_line=on_line)
    # One that an earlier daemon has left behind has the name still.
    await _stop(unit)
    finished = False
    try:
        output = await run(
            build_service_arguments(argv, unit), timeout_seconds=timeout_seconds, on_line=on_line
        )
        finished = True
    finally:
        if not finished:
            # systemd-run's own end is not the service's.
            await _stop(unit)
    return output


async def _stop(unit: str) -> None:
    with suppress(HostError):  # there is none
        await run(["systemctl", "stop", unit], timeout_seconds=_STOP_SECONDS)


def build_service_arguments(argv: Sequence[str], unit: str) -> list[str]:
    """Build the systemd-run(1) command that runs `argv` and hands its output and status on."""
    environment = [f"--setenv={name}={value}" for name, value in child_environment().items()]
    return [
        "systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={unit}",
        "--property=PrivateTmp=yes", "--property=PrivateMounts=yes", "--property=ProtectHome=yes",
        # What is built has no use without the daemon that asked for it.
        "--property=PartOf=oscloudd.service",
        *environment, "--", *argv,
    ]  # fmt: skip
