"""The recorder of the kernel's vhost devices, compiled with a simulated kernel.

The simulated kernel logs pages into the log that it was given, as the real one does with atomic
operations from a thread of its own. Each test has its own copy of the recorder, whose state is
global.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES
from qmp_tools.devices.vhost_recorder import (
    ENVIRONMENT,
    MOST_RAM_BYTES,
    KernelLog,
    Recorder,
)
from qmp_tools.guest.build import compile_c, sources

# <linux/vhost.h>
SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 0x4008AF00, 0xAF01, 0x4008AF03
SET_LOG_BASE, GET_VRING_BASE = 0x4008AF04, 0xC008AF12
LOG_ALL = 1 << 26
FD = 7
RAM_PAGES = 1024
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class Log:
    """A log of QEMU for `RAM_PAGES` pages, followed by a word that must stay 0."""

    def __init__(self) -> None:
        self._words = (ctypes.c_uint64 * (RAM_PAGES // 64 + 1))()
        self.address = ctypes.addressof(self._words)

    def pages(self) -> set[int]:
        numbered = enumerate(self._words)
        return {row * 64 + bit for row, word in numbered for bit in range(64) if word >> bit & 1}

    def take(self) -> set[int]:
        """Return the pages, and clear the log; the recorder must have nothing to hand on."""
        pages = self.pages()
        ctypes.memset(self.address, 0, ctypes.sizeof(self._words))
        return pages


class SimulatedKernel:
    """A vhost device; during each ioctl it first logs `pages_during`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.log_base = 0
        self.pages_during: set[int] = set()
        self._library = library
        self._callback = _KERNEL(self._ioctl)
        library.set_kernel(self._callback)

    def write(self, *pages: int) -> None:
        for page in pages:
            byte = ctypes.c_uint8.from_address(self.log_base + page // 8)
            byte.value |= 1 << page % 8

    def _ioctl(self, fd: int, request: int, argument: int) -> int:
        self.write(*self.pages_during)
        self.pages_during = set()
        if request == SET_LOG_BASE:
            self.log_base = ctypes.c_uint64.from_address(argument).value
        return 0

    def ioctl(self, request: int, argument: bytes = bytes(8)) -> None:
        """Make an ioctl as QEMU does."""
        assert self._library.ioctl(FD, ctypes.c_ulong(request), ctypes.c_char_p(argument)) == 0

    def start(self, log: Log, ram_pages: int = RAM_PAGES) -> None:
        self.ioctl(SET_OWNER)
        region = struct.pack("<QQQQ", 0, ram_pages * PAGE_BYTES, 0, 0)
        self.ioctl(SET_MEM_TABLE, struct.pack("<II", 1, 0) + region)
        self.ioctl(SET_LOG_BASE, struct.pack("<Q", log.address))
        self.ioctl(SET_FEATURES, struct.pack("<Q", LOG_ALL))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("recorder") / "recorder.so"
    source = Path(__file__).parents[1] / "support/vhost_recorder.c"
    options = ("-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{sources()}")
    compile_c([source], target, *options)
    return target


Start = Callable[..., tuple[Recorder, SimulatedKernel]]


@pytest.fixture
def start(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(share: float = 0.0, seed: int = 1) -> tuple[Recorder, SimulatedKernel]:
        recorder = Recorder(tmp_path, "source", share, seed)
        monkeypatch.setenv(ENVIRONMENT, os.fspath(tmp_path / "source-vhost-recorder"))
        library = ctypes.CDLL(os.fspath(shutil.copy(built, tmp_path / "loaded.so")))
        recorder.require_loaded()
        return recorder, SimulatedKernel(library)

    return start


def test_the_kernel_has_a_log_of_its_own_whose_bits_reach_qemus(start: Start) -> None:
    recorder, kernel = start()
    kernel.start(log := Log())
    assert kernel.log_base != log.address
    kernel.write(3, 64, RAM_PAGES - 1)
    deadline = time.monotonic() + 60
    while len(log.pages()) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert log.pages() == {3, 64, RAM_PAGES - 1}
    assert recorder.logs().logged.tolist() == [3, 64, RAM_PAGES - 1]


def test_what_is_logged_while_a_ring_stops_is_in_qemus_log_before_the_ioctl_returns(
    start: Start,
) -> None:
    _, kernel = start()
    kernel.start(log := Log())
    for page in range(100):
        kernel.pages_during = {page}
        kernel.ioctl(GET_VRING_BASE)
        assert log.take() == {page}


def test_a_log_that_is_replaced_gets_all_bits_until_then(start: Start) -> None:
    _, kernel = start()
    kernel.start(old := Log())
    new = Log()
    for page in range(100):
        kernel.pages_during = {page}
        kernel.ioctl(SET_LOG_BASE, struct.pack("<Q", new.address))
        assert old.take() == {page}
        kernel.pages_during = {page + 100}
        kernel.ioctl(GET_VRING_BASE)
        assert (old.take(), new.take()) == (set(), {page + 100})
        old, new = new, old


def test_a_log_that_qemu_frees_is_not_written(start: Start) -> None:
    _, kernel = start()
    kernel.start(log := Log())
    kernel.pages_during = {1}
    kernel.ioctl(SET_FEATURES)
    assert log.take() == {1}
    kernel.pages_during = {2}
    kernel.ioctl(GET_VRING_BASE)
    time.sleep(0.05)
    assert log.take() == set()


def test_withheld_pages_never_reach_qemu(start: Start) -> None:
    recorder, kernel = start(share=0.25, seed=9)
    kernel.start(log := Log())
    received: set[int] = set()
    for _ in range(3):
        kernel.pages_during = set(range(RAM_PAGES))
        kernel.ioctl(GET_VRING_BASE)
        received |= log.take()
    logs = recorder.logs()
    withheld = set(logs.withheld.tolist())
    assert logs.to_json() == {"logged": RAM_PAGES, "withheld": len(withheld)}
    assert RAM_PAGES / 8 < len(withheld) < RAM_PAGES / 2
    assert received == set(range(RAM_PAGES)) - withheld
    assert logs.of(min(withheld) * PAGE_BYTES) is KernelLog.WITHHELD
    assert logs.of(min(received) * PAGE_BYTES) is KernelLog.HANDED_ON
    assert logs.of(RAM_PAGES * PAGE_BYTES) is KernelLog.NEVER


def test_all_pages_can_be_withheld(start: Start) -> None:
    _, kernel = start(share=1.0)
    kernel.start(log := Log())
    kernel.pages_during = set(range(RAM_PAGES))
    kernel.ioctl(GET_VRING_BASE)
    assert log.take() == set()


def test_a_log_that_is_too_large_is_left_alone_and_reported(start: Start) -> None:
    recorder, kernel = start()
    kernel.start(log := Log(), ram_pages=MOST_RAM_BYTES // PAGE_BYTES + 1)
    assert kernel.log_base == log.address
    with pytest.raises(UntestableError, match="more RAM than the recorder's 1 TiB"):
        recorder.logs()


def test_a_recorder_without_a_log_has_seen_nothing(start: Start) -> None:
    recorder, _ = start()
    with pytest.raises(UntestableError, match="has not given the kernel a dirty log"):
        recorder.logs()


def test_a_qemu_that_loads_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="statically linked or has the setuid bit"):
        Recorder(tmp_path, "source", 0.0, 1).require_loaded()
