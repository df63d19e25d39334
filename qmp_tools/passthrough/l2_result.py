"""The result of a migration of L2: what each device wrote and reported, and which pages differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES

from .fake_device import EnteredStates, Journal, content, dropped_pages, was_stopped
from .outcome import NothingTestedError, ProofFailedError, require
from .tracking import Tracking


@dataclass(frozen=True)
class DeviceResult:
    """What one device of the source has written and reported."""

    journal: Journal
    sent: int
    """The number of entries in the journal when the window had been sent."""
    stats: Mapping[str, int]
    states: EnteredStates
    destination_states: EnteredStates
    discontinued: str = ""
    """Why the device did not continue to write on the destination, or nothing if it did."""

    def rewritten(self) -> int:
        """Return the number of pages that the device wrote after they had been sent."""
        return len(np.unique(self.journal["iova"][self.sent :] // PAGE_BYTES))

    def written(self) -> NDArray[np.int64]:
        """Return the numbers of the pages that the device wrote."""
        return np.unique(self.journal["iova"] // PAGE_BYTES).astype(np.int64)

    def dropped(self, drop: int, seed: int) -> NDArray[np.int64]:
        """Return the written pages that the fault ``drop`` withholds from the report."""
        written = self.written()
        return written[dropped_pages(written.astype(np.uint64), drop, seed)]

    def written_after_stop(self) -> NDArray[np.int64]:
        """Return the numbers of the pages that the device wrote when it was not allowed to."""
        late = self.journal[was_stopped(self.journal)]
        return np.unique(late["iova"] // PAGE_BYTES).astype(np.int64)


@dataclass(frozen=True)
class Result:
    """The result of one migration."""

    devices: Mapping[int, DeviceResult]
    """By number: the devices that were migrated."""
    differing: NDArray[np.int64]
    """The numbers of the pages that differ."""
    syncs: int
    seconds: float
    warned: bool
    """Whether QEMU warned at its start that nothing tracks."""
    removed_pages: int = 0
    """The number of pages of the removed device that are complete on the destination."""

    def rewritten(self) -> int:
        """Return the number of pages that the devices wrote after they had been sent."""
        return sum(device.rewritten() for device in self.devices.values())

    def require_test(self) -> None:
        """Raise NothingTestedError if a device rewrote no page after it had been sent."""
        if not all(device.rewritten() for device in self.devices.values()):
            raise NothingTestedError(f"no page was written after it had been sent, {self}")

    def require_equal(self, trackings: Sequence[Tracking]) -> None:
        """Require that all of RAM is equal, and that QEMU asked the devices as expected.

        `trackings` says how QEMU tracks each device; see `joint`.
        """
        require(not len(self.differing), f"{len(self.differing)} pages differ, {self}")
        self.require_test()
        for number, device in self.devices.items():
            require(
                not device.discontinued,
                f"device {number} does not continue to write on the destination: "
                f"{device.discontinued}",
            )
            if trackings[number].device:
                require(
                    device.stats["reports"] > 0,
                    f"QEMU has never asked device {number} for dirty pages",
                )
            else:
                require(
                    device.stats["reports"] == 0,
                    f"QEMU asked device {number}, despite x-device-dirty-page-tracking=off",
                )

    def require_noticed(self, withheld: NDArray[np.int64]) -> tuple[str, dict[str, Any]]:
        """Require that an injected fault corrupted RAM, and only its own pages, `withheld`.

        Returns:
            What was found, and the figures.
        """
        if not len(self.differing):
            self.require_test()
            raise ProofFailedError(f"the injected fault was not noticed, {self}")
        others = np.setdiff1d(self.differing, withheld)
        require(not len(others), f"{len(others)} pages differ that the fault did not affect")
        return f"{len(self.differing)} of {len(withheld)} withheld pages differ", {
            **self.figures(),
            "kept_back": len(withheld),
        }

    def figures(self) -> dict[str, Any]:
        """Return the figures of the proof's outcome."""
        return {
            "differing": len(self.differing),
            "guaranteed_detectable": self.rewritten(),
            "reports": sum(device.stats["reports"] for device in self.devices.values()),
            "syncs": self.syncs,
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        figures = self.figures()
        writes = sum(len(device.journal) for device in self.devices.values())
        return (
            f"{writes} writes, {figures['guaranteed_detectable']} pages rewritten after they were "
            f"sent, {figures['reports']} reports, {self.syncs} syncs, {self.seconds:.1f} s"
        )


def complete_pages(journal: Journal, ram: bytes) -> int:
    """Return the number of pages that have every byte of their last write in `ram`.

    Raises:
        ProofFailedError: a page has other bytes.
    """
    last = {int(entry["iova"]): int(entry["sequence"]) for entry in journal}
    wrong = [
        iova
        for iova, sequence in last.items()
        if ram[iova : iova + PAGE_BYTES] != content(sequence, iova, PAGE_BYTES).tobytes()
    ]
    if wrong:
        raise ProofFailedError(
            f"{len(wrong)} of {len(last)} pages that the removed device wrote have other content "
            f"on the destination, the first at {wrong[0]:#x}"
        )
    return len(last)
