"""Write guest RAM over QEMU's test channel (``-qtest``, QEMU's docs/devel/testing/qtest.rst).

The test channel works with any accelerator. QEMU writes with the same functions
(address_space_write) as for the DMA of its own devices: the pages become dirty without any vCPU.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Final

from ..host.timeout import bounded
from .qmp import QmpError, QmpTimeoutError

CHARDEV_ID: Final = "qtest"
"""QEMU 7.2 finds the character device by this id alone (qtest_server_init)."""

_ANSWER: Final = b"OK\n"
_READ_BYTES: Final = 1 << 16


class Qtest:
    """The channel to one QEMU, called `name` in messages; `timeout_s` bounds each wait."""

    def __init__(
        self,
        name: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        timeout_s: float,
    ) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, name: str, connection: socket.socket, timeout_s: float) -> Qtest:
        """Open the channel over a connected socket, whose other end QEMU has."""
        return cls(name, *await asyncio.open_connection(sock=connection), timeout_s)

    @staticmethod
    def arguments(fd: int) -> list[str]:
        """Return the QEMU arguments that open the channel on the inherited socket `fd`."""
        return [
            *("-chardev", f"socket,id={CHARDEV_ID},fd={fd}"),
            *("-qtest", f"chardev:{CHARDEV_ID}", "-qtest-log", "none"),
        ]

    async def write_words(self, gpas: Sequence[int], word: int) -> None:
        """Write the 64-bit little-endian `word` at each guest-physical address.

        Raises:
            QmpTimeoutError: QEMU does not answer in time.
            QmpError: QEMU refused a write, or closed the channel.
        """
        data = word.to_bytes(8, "little").hex()
        self._writer.write("".join(f"write {gpa:#x} 0x8 0x{data}\n" for gpa in gpas).encode())
        expected = len(gpas) * len(_ANSWER)
        answers = b""
        late = QmpTimeoutError(
            f"{self._name} has not answered on its test channel (qtest) within "
            f"{self._timeout_s:g} s; allow more time (--timeout)"
        )
        closed = f"{self._name} closed its test channel (qtest) before it answered; look at its log"
        try:
            async with bounded(self._timeout_s, lambda: late):
                await self._writer.drain()
                while len(answers) < expected:
                    if not (piece := await self._reader.read(_READ_BYTES)):
                        raise QmpError(closed)
                    answers += piece
        except ConnectionError as error:
            raise QmpError(closed) from error
        if answers != _ANSWER * len(gpas):
            raise QmpError(
                f"{self._name} refused to write guest RAM over its test channel (qtest): "
                f"{answers.replace(_ANSWER, b'')[:200]!r}"
            )

    def close(self) -> None:
        """Close dmaproof's end of the channel."""
        self._writer.close()
