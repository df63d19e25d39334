"""Send every UDP datagram back: the peer of a guest whose network carries only IP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from dmaproof.errors import UntestableError

_HOST: Final = "127.0.0.1"


class _Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self._transport.sendto(data, addr)


def free_udp_port() -> int:
    """Return the number of a UDP port of this host that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def udp_echo(port: int) -> AsyncIterator[None]:
    """Send back every datagram that arrives at `port` of this host's loopback address.

    Raises:
        UntestableError: another program has taken the port.
    """
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            _Echo, local_addr=(_HOST, port)
        )
    except OSError as error:
        raise UntestableError(
            f"cannot listen at UDP port {port}, which was free a moment ago: {error.strerror}; "
            "repeat the proof"
        ) from None
    try:
        yield
    finally:
        transport.close()
