"""A tap sends frames back, and vanishes with its last file descriptor."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host import tap as tap_module
from qmp_tools.host.capabilities import CAP_SYS_ADMIN, is_capable
from qmp_tools.host.tap import Tap, open_tap
from qmp_tools.host.tap_interface import TUN

pytestmark = pytest.mark.skipif(
    not os.access(TUN, os.R_OK | os.W_OK), reason=f"this user may not open {TUN}"
)

NO_OFFLOAD = bytes(10)  # struct virtio_net_hdr
FRAME = NO_OFFLOAD + b"\xff" * 6 + b"\x02" + bytes(5) + b"\x88\xb6" + b"echo" * 300


async def exchange(tap: Tap, frame: bytes) -> bytes:
    """Send a frame as QEMU does, and return the one that comes back."""
    os.set_blocking(tap.fd, False)
    arrived = asyncio.Event()
    asyncio.get_running_loop().add_reader(tap.fd, arrived.set)
    os.write(tap.fd, frame)
    async with asyncio.timeout(60):
        await arrived.wait()
    asyncio.get_running_loop().remove_reader(tap.fd)
    return os.read(tap.fd, 1 << 16)


@pytest.mark.parametrize("is_root", [True, False])
def test_every_frame_comes_back(is_root: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_root and not is_capable(CAP_SYS_ADMIN):
        pytest.skip("this user may not make a network namespace without a user namespace")
    monkeypatch.setattr(tap_module, "is_capable", lambda capability: is_root)

    async def two_exchanges() -> None:
        tap = open_tap(60)
        try:
            for number in range(2):
                frame = FRAME + bytes([number])
                assert await exchange(tap, frame) == frame
        finally:
            tap.close()

    asyncio.run(two_exchanges())


def test_two_taps_do_not_hear_each_other() -> None:
    async def exchanges() -> None:
        taps = [open_tap(60) for _ in range(2)]
        try:
            assert await exchange(taps[0], FRAME) == FRAME
            os.set_blocking(taps[1].fd, False)
            with pytest.raises(BlockingIOError):
                os.read(taps[1].fd, 1 << 16)
        finally:
            for tap in taps:
                tap.close()

    asyncio.run(exchanges())


def test_no_tap_is_visible_on_the_host() -> None:
    async def names() -> set[str]:
        tap = open_tap(60)
        try:
            return {folder.name for folder in Path("/sys/class/net").iterdir()}
        finally:
            tap.close()

    before = {folder.name for folder in Path("/sys/class/net").iterdir()}
    assert asyncio.run(names()) == before


def test_a_machine_without_taps_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_module, "TUN", Path("/dev/null"))
    with pytest.raises(UntestableError, match="the kernel refuses to make a tap"):
        open_tap(60)
    monkeypatch.setattr(tap_module, "TUN", Path("/dev/missing"))
    with pytest.raises(UntestableError, match=r"cannot be opened .*load the module tun"):
        open_tap(60)
