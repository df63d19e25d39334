"""The fake VFIO device, from user space: created through sysfs, driven through its debugfs files.

What it does, and the form of what goes in and out, is told in ``guests/passthrough/module``
(device.c, control.h). Works where the module is loaded: in L1.
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

from ..host.timeout import DEFAULT_TIMEOUT_S, block_until

_TYPE: Final = Path("/sys/class/dmaproof/dmaproof/mdev_supported_types/dmaproof-dma")
_DEVICES: Final = Path("/sys/bus/mdev/devices")
_CONTROL: Final = Path("/sys/kernel/debug/dmaproof")
_PARAMETERS: Final = Path("/sys/module/dmaproof_vfio/parameters")

_OP: Final = np.dtype(
    [("kind", "<u4"), ("count", "<u4"), ("iova", "<u8"), ("length", "<u8"), ("stride", "<i8")]
)
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
"""Of a `Journal`."""
TOLD: Final = np.dtype([(name, "<u8") for name in ("report", "iova", "length")])
"""Of what is `Told`."""
JOURNAL_ENTRIES: Final = 1 << 20
"""As in engine.c: with so many writes in its journal the device writes no more."""

Addresses = NDArray[np.uint64]
Journal = NDArray[np.void]
"""Structured, fields sequence, iova, length, reports, state, logged, time_ns (CLOCK_MONOTONIC); in
the order of writing."""
Told = NDArray[np.void]
"""Structured, fields report, iova, length; in the order of telling."""


@dataclass(frozen=True)
class Engine:
    """What the device writes by itself: `piece` bytes every `stride` bytes of a window, `burst` of
    them every `period_us` microseconds, round after round, scattered or in order."""

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
    """One device; gone when it is closed."""

    def __init__(self) -> None:
        self.name = str(uuid.uuid4())
        (_TYPE / "create").write_text(self.name)
        self.sysfs = _DEVICES / self.name
        self._folder = _CONTROL / self.name

    def close(self) -> None:
        """Remove the device; whoever has it open must have let go of it."""
        (self.sysfs / "remove").write_text("1")

    def write(self, iovas: Addresses, lengths: Addresses) -> None:
        """Write ranges by DMA, in order; they have been written when this returns.

        Raises:
            OSError: nobody has opened the device, it is stopped, or nothing is mapped there.
        """
        self._execute(_WRITE, iovas, lengths)

    def open_dma(self) -> int:
        """A file descriptor, the caller's to close: what is written to it at the position of an
        IOVA, the device writes there by DMA.

        Such a write ends with an OSError as `write` does, and may take less than it was given.
        """
        return os.open(self._folder / "dma", os.O_WRONLY | os.O_CLOEXEC)

    def mark(self, iovas: Addresses, lengths: Addresses) -> None:
        """Have ranges handed to the kernel's iterator at the next report, as they are.

        Raises:
            OSError: the device does not log.
        """
        self._execute(_MARK, iovas, lengths)

    def mark_comb(self, iova: int, length: int, count: int, stride: int) -> None:
        """`mark` for `count` ranges that begin `stride` bytes apart, downwards if it is negative.

        Raises:
            OSError: the device does not log, or one of them is outside of 64 bits.
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
        """The registers of BAR 0."""
        row = np.frombuffer((self._folder / "bar").read_bytes(), dtype=_REGISTERS)[0]
        return {name: int(row[name]) for name in _REGISTERS.names or ()}

    def start(self, engine: Engine) -> None:
        """Let the engine run."""
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
        """Every write since the device was opened."""
        return np.frombuffer((self._folder / "journal").read_bytes(), dtype=ENTRY)

    def told(self) -> Told:
        """What the kernel's iterator was told by the device since it was opened."""
        return np.frombuffer((self._folder / "told").read_bytes(), dtype=TOLD)

    def stats(self) -> dict[str, int]:
        """What the device counts: reports, reported ranges, dropped pages, and so on."""
        lines = (self._folder / "stats").read_text().split()
        return dict(zip(lines[::2], map(int, lines[1::2]), strict=True))


def content(sequence: int, iova: int, length: int) -> NDArray[np.uint8]:
    """The bytes that write `sequence` put at `iova`, as control.h has it."""
    first, last = iova // 8, (iova + length - 1) // 8
    words = np.arange(first, last + 1, dtype=np.uint64)
    values = mix64(words ^ np.uint64(sequence * GOLDEN & MASK))
    return values.view(np.uint8)[iova % 8 : iova % 8 + length]


@contextlib.contextmanager
def injected(**faults: int) -> Iterator[None]:
    """The module's faults, switched on for a while."""
    for name, value in faults.items():
        (_PARAMETERS / name).write_text(str(value))
    try:
        yield
    finally:
        for name in faults:
            (_PARAMETERS / name).write_text("0")


@contextlib.contextmanager
def fake_device(timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[FakeDevice]:
    """A device for a while; `timeout_s` bounds the wait until nobody has it open any more.

    Raises:
        WaitTimeoutError: somebody still has.
    """
    device = FakeDevice()
    try:
        yield device
    finally:
        _close_when_free(device, timeout_s)


def _close_when_free(device: FakeDevice, timeout_s: float) -> None:
    """Remove the device; a QEMU that has just died may still be letting go of it."""
    refusal: OSError | None = None

    def is_closed() -> bool:
        nonlocal refusal
        try:
            device.close()
        except OSError as error:
            refusal = error
            return False
        return True

    def late() -> WaitTimeoutError:
        return WaitTimeoutError(
            f"the fake VFIO device {device.name} cannot be removed, even after {timeout_s:g} s: "
            f"{refusal}"
        )

    block_until(is_closed, timeout_s, late, _CLOSE_PAUSE_S)


def dropped_pages(pages: Addresses, drop: int, seed: int) -> NDArray[np.bool_]:
    """Which `pages` (numbers) the fault ``drop`` keeps back, as faults.c chooses them."""
    value = (pages ^ np.uint64(seed << 40)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
    return value % np.uint64(1000) < np.uint64(drop)
