"""Ending a command with everything it has started: the processes of its session."""

import asyncio
import logging
import signal
from contextlib import suppress
from pathlib import Path

from oscloudd.errors import CloudError, NotFoundError, OperationTimeoutError
from oscloudd.host.processes import (
    ProcessHandle,
    ProcessIdentity,
    find_process,
    find_processes_below,
    open_process,
    session_pids,
)

_log = logging.getLogger(__name__)

_KILL_SECONDS = 10.0


async def end_session(leader: ProcessHandle) -> None:
    """Kill what is left of the leader's session, reap the leader and let go of it."""
    try:
        if leader.is_alive():
            # Not reaped before the others are gone: until then its number, which is the session's,
            # can't be given away.
            leader.send_signal(signal.SIGKILL)
            async with asyncio.timeout(_KILL_SECONDS):
                await _kill_followers(leader.identity.pid)
            await leader.wait_exit(_KILL_SECONDS)
    except (TimeoutError, OperationTimeoutError):
        _log.warning("processes of session %d don't die", leader.identity.pid)
    finally:
        leader.close()


async def end_sessions_below(directory: Path) -> None:
    """End the sessions of what works in one of the directories in `directory`, or deeper.

    One that can't be ended is told of in the log.
    """
    for found in await asyncio.to_thread(find_processes_below, directory):
        with suppress(CloudError):
            await end_session(open_process(found.identity))


async def _kill_followers(session_id: int) -> None:
    # One look is not enough: a follower may have started another between the look and its death.
    while followers := [pid for pid in session_pids(session_id) if pid != session_id]:
        for pid in followers:
            identity = find_process(pid)
            if identity is not None:
                await _kill(identity)


async def _kill(identity: ProcessIdentity) -> None:
    try:
        process = open_process(identity)
    except NotFoundError:
        return
    try:
        process.send_signal(signal.SIGKILL)
        await process.wait_exit(_KILL_SECONDS)
    except NotFoundError:
        return
    finally:
        process.close()
