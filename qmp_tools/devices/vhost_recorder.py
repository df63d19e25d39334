"""A recorder between the kernel's vhost devices and a QEMU (``guests/vhost_recorder``).

The recorder is a library that QEMU loads. It gives the kernel a dirty log of its own, and hands
each bit on to QEMU's log. So it records which pages the kernel has logged, and can withhold a share
of them from QEMU: the fault that a proof must detect.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import UntestableError
from dmaproof.units import PAGE_BYTES

from ..guest.build import cache, compile_c, sources
from ..host.cached_folder import digest, fresh_folder, prune
from ..qemu.builds import preloading

ENVIRONMENT: Final = "DMAPROOF_VHOST_RECORDER"
"""The variable with the path of the recorder's file."""
MOST_RAM_BYTES: Final = 1 << 40
_HEADER_BYTES: Final = 4096
_HEADER: Final = struct.Struct("<QQQQQ")
"""See `recorder_header`."""
_BITMAP_BYTES: Final = MOST_RAM_BYTES // PAGE_BYTES // 8
_OPTIONS: Final = (
    *("-shared", "-fPIC", "-nostdlib", "-std=gnu11", "-Wall", "-Wextra", "-Werror"),
    *("-fno-stack-protector", "-U_FORTIFY_SOURCE"),
)
_LIBRARY: Final = "recorder.so"


class KernelLog(StrEnum):
    """What the recorder says about a page: whether the kernel has logged it, and QEMU got the bit.

    WITHHELD: the injected fault kept all bits of the page from QEMU.
    """

    NEVER = "never"
    HANDED_ON = "handed-on"
    WITHHELD = "withheld"


@dataclass(frozen=True)
class KernelLogs:
    """The page numbers (GPA / PAGE_BYTES, sorted) that the kernel has `logged`, while QEMU logged.

    `withheld` are those of them that were kept from QEMU.
    """

    logged: NDArray[np.int64]
    withheld: NDArray[np.int64]

    def to_json(self) -> dict[str, int]:
        """Return the numbers of pages."""
        return {"logged": len(self.logged), "withheld": len(self.withheld)}

    def of(self, gpa: int) -> KernelLog:
        """Return what the recorder says about the page at `gpa`."""
        page = gpa // PAGE_BYTES
        if page in self.withheld:
            return KernelLog.WITHHELD
        return KernelLog.HANDED_ON if page in self.logged else KernelLog.NEVER


def recorder_library() -> Path:
    """Return the library, compiled if it is not in the cache.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    folder = sources()
    files = [folder / "vhost_recorder" / name for name in ("recorder.c", "recorder.h")]
    parts = [file.read_bytes() for file in (*files, folder / "workload.h")]
    target = cache() / f"vhost-recorder-{digest([' '.join(_OPTIONS).encode(), *parts])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                compile_c(files[:1], fresh / _LIBRARY, *_OPTIONS)
    return prune(target) / _LIBRARY


class Recorder:
    """The recorder of one QEMU, the one that is started next as `side`."""

    def __init__(self, folder: Path, side: str, share: float, seed: int) -> None:
        """Make the recorder's file in the run's `folder`; it withholds a `share` of all pages."""
        self._file = folder / f"{side}-vhost-recorder"
        self._script = folder / f"{side}-qemu-with-recorder"
        self._side = side
        self._file.unlink(missing_ok=True)  # an earlier QEMU of the side may still have mapped it
        with self._file.open("wb") as file:
            file.write(_HEADER.pack(seed, min(int(share * 2**64), 2**64 - 1), 0, 0, 0))
            file.truncate(_HEADER_BYTES + 2 * _BITMAP_BYTES)

    def program(self, qemu: Path) -> Path:
        """Return a program that runs `qemu` with the recorder."""
        variables = {ENVIRONMENT: str(self._file)}
        return preloading(qemu, recorder_library(), self._script, variables)

    def require_loaded(self) -> None:
        """Check that QEMU, which runs, has loaded the recorder.

        Raises:
            UntestableError: it has not.
        """
        _, _, is_loaded, _, _ = self._header()
        if not is_loaded:
            raise UntestableError(
                f"the {self._side} QEMU has not loaded the recorder {recorder_library()}: a QEMU "
                "that is statically linked or has the setuid bit loads none; use another QEMU "
                "(--qemu)"
            )

    def logs(self) -> KernelLogs:
        """Return what the kernel has logged until now.

        Raises:
            UntestableError: the recorder has seen no log of the kernel.
        """
        _, _, _, logs, too_large = self._header()
        if too_large:
            raise UntestableError(
                f"the {self._side} QEMU has more RAM than the recorder's {MOST_RAM_BYTES >> 40} "
                "TiB; use less memory (--memory)"
            )
        if not logs:
            raise UntestableError(
                f"the {self._side} QEMU has not given the kernel a dirty log, so the recorder has "
                "seen nothing; the device must be in use when the migration begins"
            )
        bitmaps = np.memmap(self._file, np.uint8, "r", _HEADER_BYTES).reshape(2, -1)
        logged, withheld = (_pages_of(bitmap) for bitmap in bitmaps)
        return KernelLogs(logged, withheld)

    def _header(self) -> tuple[int, ...]:
        with self._file.open("rb") as file:
            return _HEADER.unpack(file.read(_HEADER.size))


def _pages_of(bitmap: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the numbers of the bits that are set."""
    byte_numbers = np.flatnonzero(bitmap)
    bits = np.unpackbits(bitmap[byte_numbers, np.newaxis], axis=1, bitorder="little")
    rows, positions = np.nonzero(bits)
    return byte_numbers[rows] * 8 + positions
