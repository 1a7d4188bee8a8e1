"""Running the blocking dialogues with guests beside the loop."""

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

_Said = TypeVar("_Said")


async def converse(talk: Callable[[], _Said], *lines: socket.socket) -> _Said:
    """Run a dialogue in a thread of its own, and give what it gives; raises what it raises.

    The caller closes `lines` afterwards. When this is cancelled they are shut down, which is what
    ends the thread: it waits in poll(2), which a close does not end, and closed under it a
    descriptor would be another's by the time it reads.
    """
    talking = asyncio.ensure_future(_in_thread(talk))
    try:
        return await asyncio.shield(talking)
    except BaseException:
        for line in lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(talking, return_exceptions=True)
        raise


async def _in_thread(work: Callable[[], _Said]) -> _Said:
    """Run `work` in a thread that ends with it.

    A dialogue waits for its guest for minutes. The loop's own pool has six threads on two
    processors: six guests that hang would hold up everything else.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Said] = loop.create_future()

    def settle(write: Callable[[], None]) -> None:
        if not done.cancelled():
            write()

    def run() -> None:
        try:
            write = partial(done.set_result, work())
        except BaseException as failure:
            write = partial(done.set_exception, failure)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, write)

    threading.Thread(target=run, name="dialogue", daemon=True).start()
    return await done
