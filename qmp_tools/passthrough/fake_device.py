"""The fake VFIO device as seen from user space: created through sysfs, controlled through debugfs.

In ``guests/passthrough/module``, device.c describes what the device does, and control.h the format
of its debugfs files. This module works only in L1, where the kernel module is loaded.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dmaproof.errors import WaitTimeoutError
from dmaproof.splitmix import GOLDEN, MASK, mix64
from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.abi import MigrationState

from ..host.timeout import DEFAULT_TIMEOUT_S, block_until

_TYPE: Final = Path("/sys/class/dmaproof/dmaproof/mdev_supported_types/dmaproof-dma")
_DEVICES: Final = Path("/sys/bus/mdev/devices")
_CONTROL: Final = Path("/sys/kernel/debug/dmaproof")
_PARAMETERS: Final = Path("/sys/module/dmaproof_vfio/parameters")

_OP: Final = np.dtype(
    [("kind", "<u4"), ("count", "<u4"), ("iova", "<u8"), ("length", "<u8"), ("stride", "<i8")]
)
_ALL_DEVICES: Final = "all"
_WRITING_STATES: Final = (
    MigrationState.RUNNING,
    MigrationState.RUNNING_P2P,
    MigrationState.PRE_COPY,
    MigrationState.PRE_COPY_P2P,
)
"""As in engine.c."""
_CLOSE_PAUSE_S: Final = 0.05
_WRITE: Final = 1
_MARK: Final = 2
_REGISTERS: Final = np.dtype(
    [
        *((name, "<u8") for name in ("magic", "iova", "length", "done", "sequence")),
        *((name, "<u4") for name in ("piece", "skew", "stride", "burst")),
        *((name, "<u4") for name in ("period_us", "limit", "run", "error")),
    ]
)
ENTRY: Final = np.dtype(
    [
        *((name, "<u8") for name in ("sequence", "iova", "length")),
        *(("reports", "<u4"), ("state", "<u2"), ("logged", "<u2"), ("time_ns", "<u8")),
    ]
)
"""An entry of a `Journal`."""
REPORTED_RANGE: Final = np.dtype([(name, "<u8") for name in ("report", "iova", "length")])
"""An entry of `ReportedRanges`."""
ENTERED_STATE: Final = np.dtype(
    [("order", "<u8"), ("time_ns", "<u8"), ("state", "<u4"), ("writes", "<u4")]
)
"""An entry of `EnteredStates`."""
JOURNAL_ENTRIES: Final = 1 << 20
"""As in engine.c: when its journal has this many entries, the device stops writing."""

Addresses = NDArray[np.uint64]
Journal = NDArray[np.void]
"""The device's writes in their order.

Structured, with the fields sequence, iova, length, reports, state, logged, time_ns
(CLOCK_MONOTONIC); control.h describes them.
"""
EnteredStates = NDArray[np.void]
"""The migration states that the device has entered since it was opened, in their order.

Structured, with the fields order (rises with each entry of any device), time_ns, state, writes (the
number of entries in the journal); control.h describes them.
"""
ReportedRanges = NDArray[np.void]
"""The ranges that the device reported to the kernel's iterator, in their order.

Structured, with the fields report, iova, length.
"""


@dataclass(frozen=True)
class Engine:
    """What the device's engine writes.

    It writes `piece` bytes every `stride` bytes of a window, round after round, in a scattered or
    an ascending order: `burst` pieces every `period_us` microseconds. It stops after `limit`
    pieces, or never if `limit` is 0. The first piece begins `skew` bytes after the window's start.
    """

    iova: int
    length: int
    piece: int = PAGE_BYTES
    skew: int = 0
    stride: int = PAGE_BYTES
    burst: int = 64
    period_us: int = 4000
    limit: int = 0
    scattered: bool = True


class FakeDevice:
    """One fake device, which `close` removes."""

    def __init__(self) -> None:
        self.name = str(uuid.uuid4())
        (_TYPE / "create").write_text(self.name)
        self.sysfs = _DEVICES / self.name
        self._folder = _CONTROL / self.name

    def close(self) -> None:
        """Remove the device.

        Raises:
            OSError: a process still has the device open.
        """
        (self.sysfs / "remove").write_text("1")

    def write(self, iovas: Addresses, lengths: Addresses) -> None:
        """Write ranges by DMA, in order, and return when all of them are written.

        Raises:
            OSError: no process has opened the device, it is stopped, or an IOVA is not mapped.
        """
        self._execute(_WRITE, iovas, lengths)

    def open_dma(self) -> int:
        """Return a file descriptor for DMA writes of given bytes; the caller closes it.

        The device writes by DMA what is written to the file, at the IOVA that is the file's
        position. Such a write fails with an OSError as `write` does, and may be short.
        """
        return os.open(self._folder / "dma", os.O_WRONLY | os.O_CLOEXEC)

    def mark(self, iovas: Addresses, lengths: Addresses) -> None:
        """Have the next report hand these ranges to the kernel's iterator, unchanged.

        Raises:
            OSError: logging is off.
        """
        self._execute(_MARK, iovas, lengths)

    def mark_comb(self, iova: int, length: int, count: int, stride: int) -> None:
        """Do as `mark` for `count` ranges that begin `stride` bytes apart, downwards if negative.

        Raises:
            OSError: logging is off, or a range does not fit in 64 bits.
        """
        self._execute(_MARK, [iova], [length], count, stride)

    def _execute(
        self, kind: int, iovas: ArrayLike, lengths: ArrayLike, count: int = 1, stride: int = 0
    ) -> None:
        operations = np.zeros(np.size(iovas), dtype=_OP)
        operations["kind"] = kind
        operations["count"] = count
        operations["iova"] = iovas
        operations["length"] = lengths
        operations["stride"] = stride
        with (self._folder / "control").open("wb", buffering=0) as control:
            control.write(operations.tobytes())

    def registers(self) -> dict[str, int]:
        """Return the registers of BAR 0."""
        row = np.frombuffer((self._folder / "bar").read_bytes(), dtype=_REGISTERS)[0]
        return {name: int(row[name]) for name in _REGISTERS.names or ()}

    def start(self, engine: Engine) -> None:
        """Start the engine."""
        row = np.zeros(1, dtype=_REGISTERS)
        for name in ("iova", "length", "piece", "skew", "stride", "burst", "period_us", "limit"):
            row[name] = getattr(engine, name)
        row["run"] = 3 if engine.scattered else 1
        self._write_bar(row.tobytes())

    def stop(self) -> None:
        """Stop the engine."""
        row = np.frombuffer((self._folder / "bar").read_bytes(), dtype=_REGISTERS).copy()
        row["run"] = 0
        self._write_bar(row.tobytes())

    def _write_bar(self, data: bytes) -> None:
        with (self._folder / "bar").open("r+b", buffering=0) as bar:
            bar.write(data)

    def journal(self) -> Journal:
        """Return every write since the device was opened."""
        return np.frombuffer((self._folder / "journal").read_bytes(), dtype=ENTRY)

    def reported_ranges(self) -> ReportedRanges:
        """Return what the device reported to the kernel's iterator since it was opened."""
        data = (self._folder / "reported_ranges").read_bytes()
        return np.frombuffer(data, dtype=REPORTED_RANGE)

    def states(self) -> EnteredStates:
        """Return the migration states that the device has entered since it was opened."""
        return np.frombuffer((self._folder / "states").read_bytes(), dtype=ENTERED_STATE)

    def stats(self) -> dict[str, int]:
        """Return the device's counters: reports, reported ranges, dropped pages, and so on."""
        lines = (self._folder / "stats").read_text().split()
        return dict(zip(lines[::2], map(int, lines[1::2]), strict=True))


def was_stopped(journal: Journal) -> NDArray[np.bool_]:
    """Return for each write whether the device was in a state in which it must not write."""
    return ~np.isin(journal["state"], _WRITING_STATES)


def content(sequence: int, iova: int, length: int) -> NDArray[np.uint8]:
    """Return the bytes that write `sequence` puts at `iova`, by the rule of control.h."""
    first, last = iova // 8, (iova + length - 1) // 8
    words = np.arange(first, last + 1, dtype=np.uint64)
    values = mix64(words ^ np.uint64(sequence * GOLDEN & MASK))
    return values.view(np.uint8)[iova % 8 : iova % 8 + length]


@contextlib.contextmanager
def injected(device: FakeDevice | None = None, /, **faults: int) -> Iterator[None]:
    """Set the module's fault parameters, and reset them to 0 at the end.

    Only `device` has the faults; None: all devices.
    """
    victim = _PARAMETERS / "victim"
    victim.write_text(_ALL_DEVICES if device is None else device.name)
    for name, value in faults.items():
        (_PARAMETERS / name).write_text(str(value))
    try:
        yield
    finally:
        for name in faults:
            (_PARAMETERS / name).write_text("0")
        victim.write_text(_ALL_DEVICES)


@contextlib.contextmanager
def fake_device(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[FakeDevice]:
    """Create a device, and remove it at the end.

    `timeout_s` bounds the wait at the end until no process has the device open.

    Raises:
        WaitTimeoutError: a process still has the device open.
    """
    device = FakeDevice()
    try:
        yield device
    finally:
        _close_when_free(device, timeout_s)


def _close_when_free(device: FakeDevice, timeout_s: float) -> None:
    """Remove the device; a QEMU that has just died may still be closing it."""
    refusal: OSError | None = None

    def is_closed() -> bool:
        nonlocal refusal
        try:
            device.close()
        except OSError as error:
            refusal = error
            return False
        return True

    def not_closed() -> WaitTimeoutError:
        return WaitTimeoutError(
            f"the fake VFIO device {device.name} could not be removed within {timeout_s:g} s: "
            f"{refusal}"
        )

    block_until(is_closed, timeout_s, not_closed, _CLOSE_PAUSE_S)


def dropped_pages(pages: Addresses, drop: int, seed: int) -> NDArray[np.bool_]:
    """Return for each page number whether the fault ``drop`` withholds that page (faults.c)."""
    value = (pages ^ np.uint64(seed << 40)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
    return value % np.uint64(1000) < np.uint64(drop)
