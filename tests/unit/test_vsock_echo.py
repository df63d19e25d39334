"""The host's program for a guest with vhost-vsock."""

from __future__ import annotations

import asyncio
import errno
import re
import socket

import pytest

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES
from qmp_tools.devices import vsock_echo
from qmp_tools.guest.build import sources

pytestmark = pytest.mark.unit


def test_the_guest_connects_to_the_same_port() -> None:
    text = (sources() / "bare/virtio_vsock.c").read_text()
    assert re.findall(r"HOST_PORT = (\d+),", text) == [str(vsock_echo.PORT)]


def test_whole_pages_are_sent_back_until_the_guest_closes() -> None:
    async def talk() -> bytes:
        host, guest = socket.socketpair()
        serving = asyncio.create_task(
            vsock_echo._send_back(*await asyncio.open_connection(sock=host))
        )
        reader, writer = await asyncio.open_connection(sock=guest)
        writer.write(bytes(PAGE_BYTES - 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        writer.write(b"x")
        page = await reader.readexactly(PAGE_BYTES)
        writer.write_eof()
        await serving
        assert await reader.read() == b""
        writer.close()
        return page

    assert asyncio.run(talk()) == bytes(PAGE_BYTES - 1) + b"x"


def test_a_kernel_without_vsock_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    async def listen() -> None:
        monkeypatch.setattr(socket, "socket", fail)
        async with vsock_echo.vsock_echo():
            pass

    with pytest.raises(UntestableError, match=r"vsock port 4000: .*load the module vsock"):
        asyncio.run(listen())
