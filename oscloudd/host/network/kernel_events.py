"""Hearing from the kernel, by netlink, that something of ours was changed; idle until then."""

import asyncio
import errno
import socket

from oscloudd.host.network.netlink import Message, parse_messages

_RECEIVE_BYTES = 1 << 20


class KernelEvents:
    """Reads the messages that a netlink socket is told, and owns that socket.

    What they mean is for `_hear` to say, and what it means that some were lost for `_lose`.
    """

    def __init__(self, protocol: int) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        self._touched = asyncio.Event()

    def _begin(self) -> None:
        """Listen, once the socket is in its group."""
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        """Hear no more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    async def touched(self) -> None:
        """Wait until somebody has changed what is ours, since the last time."""
        await self._touched.wait()
        self._touched.clear()

    def touch(self) -> None:
        """Take it for changed by somebody else."""
        self._touched.set()

    def _hear(self, message: Message) -> None:
        raise NotImplementedError

    def _lose(self) -> None:
        raise NotImplementedError

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lose()
                continue
            for message in parse_messages(data):
                self._hear(message)
