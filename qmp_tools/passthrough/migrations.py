"""L2: QEMU's own vfio-pci on the fake device, migrated inside L1 while the device writes.

L2 has no guest system, so no vCPU writes RAM, only the device does. Its engine writes a window of
RAM round after round until the device is stopped, each page with content that no other write has.
So if a page of the window has been sent and its dirty bit is then lost, the page is stale on the
destination.

If dirty pages are reported to QEMU in precopy, the migration is held in precopy for some syncs. If
not, it is held in its first pass. After that pass nothing would be left to send, and QEMU 11.1
would sync again and again without a pause and hardly answer QMP (docs/qemu-findings.md).

Each way of tracking is followed by controls: the same migration with an injected fault of the
module. A control must corrupt RAM, and only pages that the fault withheld from the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import WaitTimeoutError
from dmaproof.units import PAGE_BYTES

from ..host.timeout import wait_until
from ..memory.ram import compare, ram_file
from ..migration.migration import Limits, Migration, Progress
from ..migration.scenarios.precopy import Unix
from ..migration.transport import Ends
from ..qemu.machine import DESTINATION, INCOMING, SOURCE
from ..qemu.qemu import SocketQemu, running_qemu
from ..qemu.qmp import QmpRefusal
from .fake_device import (
    JOURNAL_ENTRIES,
    Engine,
    FakeDevice,
    Journal,
    dropped_pages,
    fake_device,
    injected,
)
from .fake_driver import any_driver, open_iommufd
from .injected_faults import FAULTS
from .l1.machine import TESTED_QEMU
from .outcome import (
    NothingTestedError,
    NotSupportedError,
    Proof,
    ProofFailedError,
    require,
    retrying,
)
from .tracking import TRACKINGS, Tracking

_QEMU: Final = Path(os.environ.get(TESTED_QEMU, "/usr/bin/qemu-system-x86_64"))
_RAM_BYTES: Final = 64 << 20
_ENGINE: Final = Engine(iova=8 << 20, length=8 << 20)
_SENT_ONCE: Final = 2
"""The number of bitmap syncs after which every page has been sent."""
_PASSED_BYTES: Final = _ENGINE.iova + _ENGINE.length + (4 << 20)
"""When the first pass has sent this many bytes, it has sent the window: it ascends in RAM."""
_SYNCS: Final = 4
_REWRITES: Final = _ENGINE.length // PAGE_BYTES
"""The migration is held for this many syncs, and then for this many writes: one for each page."""
_SLOW_BYTES_PER_S: Final = 4096
"""So slow that the rest of the first pass outlasts these writes, though its pages are all zero."""
_WARNING: Final = "doesn't support device and IOMMU dirty tracking"
_HOLD_IN_PRECOPY_BYTES_PER_S: Final = 1 << 20
_HOLD_IN_FIRST_PASS_BYTES_PER_S: Final = 4 << 30
_END_BYTES_PER_S: Final = 8 << 30
"""The bandwidths that QEMU assumes for the switchover: while the migration is held in
precopy, while it is held in its first pass, and when it may end.

QEMU stops the guest when the rest fits in the downtime limit, which is 1 ms until the end. With the
first bandwidth a page never fits. With the second the last 4 MiB of the first pass fit, so that
QEMU does not get past that pass if the release is late."""
_DOWNTIME_S: Final = 60.0


@dataclass(frozen=True)
class _Result:
    differing: NDArray[np.int64]
    journal: Journal
    sent: int
    """The number of entries in the journal when the window had been sent."""
    stats: dict[str, int]
    syncs: int
    seconds: float
    continued: bool
    """Whether the device continued to write on the destination."""
    warned: bool
    """Whether QEMU warned at its start that nothing tracks."""

    def rewritten(self) -> int:
        """Return the number of pages that the device wrote after they had been sent."""
        return len(np.unique(self.journal["iova"][self.sent :] // PAGE_BYTES))

    def __str__(self) -> str:
        return (
            f"{len(self.journal)} writes, {self.rewritten()} pages rewritten after they were sent, "
            f"{self.stats['reports']} reports, {self.syncs} syncs, {self.seconds:.1f} s"
        )


NAMES: Final = {
    "iommufd, device log": "iommufd",
    "iommufd, device log once stopped": "iommufd-once-stopped",
    "container, device log": "container",
    "container, device log once stopped": "container-once-stopped",
    "container, type1's log": "container-type1",
}
UNTRACKED: Final = "iommufd, nothing tracks"


@dataclass(frozen=True)
class TestedQemu:
    """The QEMU that L2 runs on: its version, and the properties of its vfio-pci."""

    version: str
    vfio_pci: frozenset[str]


@functools.cache
def tested_qemu(timeout_s: float) -> TestedQemu:
    """Query the QEMU under test.

    Raises:
        QmpError: QEMU does not run, or has no vfio-pci.
    """
    return asyncio.run(_ask_qemu(timeout_s))


async def _ask_qemu(timeout_s: float) -> TestedQemu:
    machine = ["-machine", "none"]
    with tempfile.TemporaryDirectory(prefix="l2-") as folder:
        async with running_qemu(
            "tested", _QEMU, machine, Path(folder), timeout_s=timeout_s
        ) as qemu:
            properties = await qemu.qmp.execute("device-list-properties", typename="vfio-pci")
    number = qemu.version.split()[0]  # without the packager's suffix
    return TestedQemu(number, frozenset(entry["name"] for entry in properties))


@functools.cache
def _require_device_log() -> None:
    """Fail with the kernel's error if it cannot log a device's DMA.

    Without this check QEMU's migration would fail half-way.
    """
    with any_driver() as driver:
        driver.device.start_logging([driver.window], PAGE_BYTES)
        driver.device.report(*driver.window, PAGE_BYTES)


def proofs(
    seed: int, timeout_s: float, controls: int = 1, *, quick: bool = False
) -> dict[str, Proof]:
    """Return a proof for each way of tracking, each followed by its controls.

    Each control is repeated `controls` times; if `quick`, each way has one control. `timeout_s`
    bounds each wait.
    """
    found: dict[str, Proof] = {}
    for name, short in NAMES.items():
        tracking = TRACKINGS[short]
        found[name] = retrying(partial(_equal, tracking, timeout_s))
        if tracking.device:
            # All faults with the first way; the others have only the fault whose pages are known.
            faults = FAULTS if tracking == Tracking() and not quick else ("drop",)
            for fault in faults:
                found[f"{name}, control: {fault}"] = partial(
                    _corrupts, tracking, fault, seed, controls, timeout_s
                )
    found[UNTRACKED] = retrying(partial(_untracked, timeout_s))
    return found


def _equal(tracking: Tracking, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and check that all of RAM is equal."""
    result = _migrated(tracking, timeout_s)
    require(not len(result.differing), f"{len(result.differing)} pages differ, {result}")
    _require_test(result)
    require(result.continued, "the device does not continue to write on the destination")
    if tracking.device:
        require(result.stats["reports"] > 0, "QEMU has never asked the device for dirty pages")
    else:
        require(
            result.stats["reports"] == 0,
            "QEMU asked the device, despite x-device-dirty-page-tracking=off",
        )
    return f"0 of {_RAM_BYTES // PAGE_BYTES} pages differ, {result}", _figures(result)


def _require_test(result: _Result) -> None:
    """Raise NothingTestedError if the device rewrote no page after it had been sent."""
    if not result.rewritten():
        raise NothingTestedError(f"no page was written after it had been sent, {result}")


def _figures(result: _Result) -> dict[str, Any]:
    return {
        "differing": len(result.differing),
        "guaranteed_detectable": result.rewritten(),
        "reports": result.stats["reports"],
        "syncs": result.syncs,
        "seconds": round(result.seconds, 1),
    }


def _untracked(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with iommufd and no tracker; require a warning of QEMU if pages are lost."""
    result = _migrated(Tracking(device=False), timeout_s)
    _require_test(result)
    require(
        result.warned or not len(result.differing),
        f"{len(result.differing)} pages differ, and QEMU did not warn, {result}",
    )
    warned = "QEMU warned" if result.warned else "no warning"
    return f"{warned}; {len(result.differing)} pages differ, {result}", _figures(result)


def _corrupts(
    tracking: Tracking, fault: str, seed: int, rounds: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Migrate with an injected fault, which must corrupt RAM each time, and only its own pages."""
    attempts = [
        retrying(partial(_corrupted, tracking, fault, seed + number, timeout_s))()
        for number in range(rounds)
    ]
    found, figures = attempts[0]
    if rounds > 1:
        found = f"caught {rounds} of {rounds}; the first: {found}"
    tries = sum(figures["tries"] for _, figures in attempts)
    return found, {**figures, "rounds": rounds, "tries": tries}


def _corrupted(
    tracking: Tracking, fault: str, seed: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    parameters = FAULTS[fault]
    with injected(**parameters, seed=seed):
        result = _migrated(tracking, timeout_s)
    written = np.unique(result.journal["iova"] // PAGE_BYTES).astype(np.int64)
    may_differ = written
    if fault == "drop":
        may_differ = written[dropped_pages(written.astype(np.uint64), parameters["drop"], seed)]
    if not len(result.differing):
        _require_test(result)
        raise ProofFailedError(f"the injected fault was not noticed, {result}")
    others = np.setdiff1d(result.differing, may_differ)
    require(not len(others), f"{len(others)} pages differ that the fault did not affect")
    return f"{len(result.differing)} of {len(may_differ)} withheld pages differ", {
        **_figures(result),
        "kept_back": len(may_differ),
    }


def _migrated(tracking: Tracking, timeout_s: float) -> _Result:
    qemu = tested_qemu(timeout_s)
    if tracking.iommufd:
        open_iommufd().close()
    if tracking.device:
        _require_device_log()
    return asyncio.run(_migrate(tracking, qemu, timeout_s))


async def _migrate(tracking: Tracking, qemu: TestedQemu, timeout_s: float) -> _Result:
    loop = asyncio.get_running_loop()
    started = loop.time()
    with (
        fake_device(timeout_s) as source_device,
        fake_device(timeout_s) as destination_device,
        tempfile.TemporaryDirectory(prefix="l2-") as temporary,
    ):
        folder = Path(temporary)
        outgoing = _arguments(tracking, source_device, qemu)
        incoming = [*_arguments(tracking, destination_device, qemu), *INCOMING]
        async with (
            running_qemu(SOURCE, _QEMU, outgoing, folder, timeout_s=timeout_s) as source,
            running_qemu(DESTINATION, _QEMU, incoming, folder, timeout_s=timeout_s) as destination,
        ):
            source_device.start(_ENGINE)
            syncs, sent = await _hold_and_release(
                *(source, destination, source_device, folder, timeout_s),
                in_precopy=tracking.reports_in_precopy,
            )
            with (
                ram_file(source.pid, source.name) as source_ram,
                ram_file(destination.pid, destination.name) as destination_ram,
            ):
                differing = compare(source_ram, destination_ram)
            journal, stats = source_device.journal(), source_device.stats()
            if len(journal) == JOURNAL_ENTRIES:
                raise NothingTestedError("the device stopped writing, because its journal was full")
            last = int(journal["sequence"][-1])
            continued = await _continues(destination, destination_device, last, timeout_s)
        warned = _WARNING in source.process.log.read_text(errors="replace")
    seconds = loop.time() - started
    return _Result(differing, journal, sent, stats, syncs, seconds, continued, warned)


def _arguments(tracking: Tracking, device: FakeDevice, qemu: TestedQemu) -> list[str]:
    return [
        # Some QEMUs are built without qtest; with TCG, the firmware runs in L2.
        *("-machine", "q35,memory-backend=ram", "-accel", "qtest", "-accel", "tcg"),
        *("-m", f"{_RAM_BYTES >> 20}M"),
        *("-object", f"memory-backend-memfd,id=ram,size={_RAM_BYTES},share=on"),
        *tracking.arguments(device.sysfs, qemu.vfio_pci),
    ]


async def _hold_and_release(
    source: SocketQemu,
    destination: SocketQemu,
    device: FakeDevice,
    folder: Path,
    timeout_s: float,
    *,
    in_precopy: bool,
) -> tuple[int, int]:
    """Migrate, and hold the migration until the window has been written again.

    The hold takes at most half of the timeout, so that the migration can end within the rest. A
    migration may also converge before. `in_precopy`: dirty pages are reported to QEMU in precopy.

    Returns:
        The number of QEMU's bitmap syncs, and of the device's writes when the window had been sent.
    """
    loop = asyncio.get_running_loop()
    limits = Limits(downtime_s=_DOWNTIME_S, timeout_s=timeout_s)
    migration = Migration(Ends(source.qmp, destination.qmp, folder), Unix(), limits)
    await _set_switchover_bandwidth(
        source, _HOLD_IN_PRECOPY_BYTES_PER_S if in_precopy else _HOLD_IN_FIRST_PASS_BYTES_PER_S
    )
    try:
        await migration.start()
    except QmpRefusal as error:
        raise NotSupportedError(str(error)) from error
    await migration.limit_bandwidth(migration.held_bytes_per_s)
    deadline = loop.time() + timeout_s / 2
    held = True
    sent: int | None = None
    async for progress in migration.follow():
        writes = device.stats()["writes"]
        if sent is None and _window_is_sent(progress, in_precopy=in_precopy):
            sent = writes
            if not in_precopy:
                await source.qmp.execute("migrate-set-parameters", max_bandwidth=_SLOW_BYTES_PER_S)
        synced = progress.syncs >= _SYNCS or not in_precopy
        rewritten = synced and sent is not None and writes >= sent + _REWRITES
        if held and (rewritten or loop.time() > deadline):
            held = False
            await _set_switchover_bandwidth(source, _END_BYTES_PER_S)
            await migration.release()
    await migration.load()
    return migration.history[-1].syncs, device.stats()["writes"] if sent is None else sent


def _window_is_sent(progress: Progress, *, in_precopy: bool) -> bool:
    if progress.syncs >= _SENT_ONCE:
        return True
    if in_precopy or progress.total is None or progress.remaining is None:
        return False
    return progress.total - progress.remaining >= _PASSED_BYTES


async def _set_switchover_bandwidth(source: SocketQemu, bytes_per_s: int) -> None:
    """Set the bandwidth that QEMU (8.2 or newer) assumes for the switchover.

    By default QEMU assumes the bandwidth that it measured last. Without a hold that may be so high
    that QEMU stops the guest before the device has written again. During a hold it is almost 0, so
    QEMU would never stop the guest. The same would happen before Linux 6.2, where the kernel does
    not report the size of the device's state and QEMU assumes 100 GiB.
    """
    with contextlib.suppress(QmpRefusal):
        await source.qmp.execute("migrate-set-parameters", avail_switchover_bandwidth=bytes_per_s)


async def _continues(
    destination: SocketQemu, device: FakeDevice, last: int, timeout_s: float
) -> bool:
    """Return whether the device writes on the destination, with numbers that follow `last`.

    Raises:
        WaitTimeoutError: the device neither writes nor reports an error.
    """
    await destination.qmp.execute("cont")
    not_written = WaitTimeoutError(
        f"the device made fewer than 100 writes on the destination within {timeout_s:g} s"
    )

    def has_written_or_failed() -> bool:
        registers = device.registers()
        return registers["sequence"] > last + 100 or bool(registers["error"])

    await wait_until(has_written_or_failed, timeout_s, lambda: not_written)
    if device.registers()["error"]:
        return False
    first: Sequence[int] = device.journal()["sequence"][:1].tolist()
    return list(first) == [last + 1]
