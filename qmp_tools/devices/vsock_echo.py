"""Send every byte of a connection back: the host's program for a guest with vhost-vsock."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES

PORT: Final = 4000
"""Where the guest connects to; ``guests/bare/virtio_vsock.c`` has the same number."""


@asynccontextmanager
async def vsock_echo() -> AsyncIterator[None]:
    """Send back whatever arrives on connections to `PORT` of this host.

    Data goes back in whole pages, so that the device writes each page of the guest at once.

    Raises:
        UntestableError: this kernel has no vsock, or another program listens there.
    """
    try:
        listening = _bound_socket()
    except OSError as error:
        raise UntestableError(
            f"cannot listen at vsock port {PORT}: {error.strerror}; load the module vsock, and end "
            "the program that uses the port"
        ) from None
    server = await asyncio.start_server(_send_back, sock=listening)
    try:
        yield
    finally:
        server.close()


def _bound_socket() -> socket.socket:
    bound = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        bound.bind((socket.VMADDR_CID_ANY, PORT))
    except OSError:
        bound.close()
        raise
    return bound


async def _send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            writer.write(await reader.readexactly(PAGE_BYTES))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
