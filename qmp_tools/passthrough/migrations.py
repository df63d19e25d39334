"""L2: QEMU's own vfio-pci on the fake device, migrated inside L1 while the device writes.

L2 has no guest system, and no vCPU that would write either: nothing but the device does. Its engine
writes a window of RAM round and round, each page with content that was never there, before, during
and after every sync of the bitmap, until the device is stopped. So a page of the window whose dirty
bit is lost once it has been sent is stale on the destination, for certain.

Where QEMU hears of the pages in precopy, it is held there for some syncs. Where it does not, it is
held in its first pass: behind that nothing would be left to send, and QEMU 11.1 syncs again and
again without a pause, and hardly answers (docs/kernel-findings.md).

Every way is followed by controls: the same with a fault of the module injected, which must corrupt,
and only the pages that were kept from the report.
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
from ..qemu.qemu import Qemu, running_qemu
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
from .fake_driver import by_either, open_iommufd
from .injected_faults import FAULTS
from .l1.machine import TESTED_QEMU
from .outcome import LackingError, NothingTestedError, Proof, ProofFailedError, patient, require
from .tracking import TRACKINGS, Tracking

_QEMU: Final = Path(os.environ.get(TESTED_QEMU, "/usr/bin/qemu-system-x86_64"))
_RAM_BYTES: Final = 64 << 20
_ENGINE: Final = Engine(iova=8 << 20, length=8 << 20)
_SENT_ONCE: Final = 2
"""With the second sync of the bitmap, every page has been sent."""
_PASSED_BYTES: Final = _ENGINE.iova + _ENGINE.length + (4 << 20)
"""With so much of RAM behind it, the first pass has sent the window: it goes upwards."""
_SYNCS: Final = 4
_REWRITES: Final = _ENGINE.length // PAGE_BYTES
"""As many syncs, and then writes, as the migration is held for: each page once."""
_SLOW_BYTES_PER_S: Final = 4096
"""The rest of the first pass takes longer than these writes, though its pages are all zero."""
_WARNING: Final = "doesn't support device and IOMMU dirty tracking"
_ENDLESS_BYTES_PER_S: Final = 1 << 20
_NEVER_BEHIND_BYTES_PER_S: Final = 4 << 30
_ENDING_BYTES_PER_S: Final = 8 << 30
"""The bandwidth of the switchover that QEMU is to reckon with: while it is held where it hears of
the pages, and where it does not; and when it is to end. It stops the guest when no more is left
than passes in the downtime limit, which is 1 ms until the end: a page never passes, and of the
first pass the last 4 MiB do, so that QEMU does not come behind it if we are late."""
_DOWNTIME_S: Final = 60.0


@dataclass(frozen=True)
class _Result:
    differing: NDArray[np.int64]
    journal: Journal
    sent: int
    """So many entries of the journal were there when the window had been sent."""
    stats: dict[str, int]
    syncs: int
    seconds: float
    went_on: bool
    warned: bool
    """QEMU said at its start that nothing tracks."""

    def rewritten(self) -> int:
        """How many pages the device wrote after they had been sent: what would be lost."""
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
    """Asks QEMU itself.

    Raises:
        QmpError: it does not run, or has no vfio-pci.
    """
    return asyncio.run(_ask_qemu(timeout_s))


async def _ask_qemu(timeout_s: float) -> TestedQemu:
    machine = ["-machine", "none"]
    with tempfile.TemporaryDirectory(prefix="l2-") as folder:
        async with running_qemu(
            "tested", _QEMU, machine, Path(folder), timeout_s=timeout_s
        ) as qemu:
            properties = await qemu.qmp.execute("device-list-properties", typename="vfio-pci")
    number = qemu.version.split()[0]  # without the packager's
    return TestedQemu(number, frozenset(it["name"] for it in properties))


@functools.cache
def _require_device_log() -> None:
    """Fail with what the kernel says where it does not log a device's DMA; QEMU's migration would
    fail half-way."""
    with by_either() as driver:
        driver.device.start_logging([driver.window], PAGE_BYTES)
        driver.device.report(*driver.window, PAGE_BYTES)


def proofs(
    seed: int, timeout_s: float, controls: int = 1, *, quick: bool = False
) -> dict[str, Proof]:
    """Every way of tracking, each followed by its controls, which are repeated `controls` times.

    If `quick`, by one control. `timeout_s` bounds each wait.
    """
    found: dict[str, Proof] = {}
    for name, short in NAMES.items():
        tracking = TRACKINGS[short]
        found[name] = patient(partial(_equal, tracking, timeout_s))
        if tracking.device:
            # All faults on the first way, the one that is told apart page by page on each.
            faults = FAULTS if tracking == Tracking() and not quick else ("drop",)
            for fault in faults:
                found[f"{name}, control: {fault}"] = partial(
                    _corrupts, tracking, fault, seed, controls, timeout_s
                )
    found[UNTRACKED] = patient(partial(_untracked, timeout_s))
    return found


def _equal(tracking: Tracking, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """A migration after which all of RAM is equal."""
    result = _migrated(tracking, timeout_s)
    require(not len(result.differing), f"{len(result.differing)} pages differ, {result}")
    _require_test(result)
    require(result.went_on, "the device does not go on on the destination")
    if tracking.device:
        require(result.stats["reports"] > 0, "QEMU has never asked the device")
    else:
        require(result.stats["reports"] == 0, "QEMU asked the device, though it was told not to")
    return f"0 of {_RAM_BYTES // PAGE_BYTES} pages differ, {result}", _figures(result)


def _require_test(result: _Result) -> None:
    """Fail the attempt if the device has written nothing again that had been sent."""
    if not result.rewritten():
        raise NothingTestedError(f"nothing was tested, {result}")


def _figures(result: _Result) -> dict[str, Any]:
    return {
        "differing": len(result.differing),
        "guaranteed_detectable": result.rewritten(),
        "reports": result.stats["reports"],
        "syncs": result.syncs,
        "seconds": round(result.seconds, 1),
    }


def _untracked(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """With iommufd and without the device's log nobody tracks: no loss, or at least a warning."""
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
    """The same with a fault, which must be seen each time, and nothing else."""
    every = [
        patient(partial(_corrupted, tracking, fault, seed + number, timeout_s))()
        for number in range(rounds)
    ]
    found, figures = every[0]
    if rounds > 1:
        found = f"caught {rounds} of {rounds}; the first: {found}"
    tries = sum(figures["tries"] for _, figures in every)
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
        raise ProofFailedError(f"the fault is not seen, {result}")
    strangers = np.setdiff1d(result.differing, may_differ)
    require(not len(strangers), f"{len(strangers)} pages differ that the fault did not touch")
    return f"{len(result.differing)} pages differ of {len(may_differ)} that were kept back", {
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
        fake_device(timeout_s) as here,
        fake_device(timeout_s) as there,
        tempfile.TemporaryDirectory(prefix="l2-") as temporary,
    ):
        folder = Path(temporary)
        ours = _arguments(tracking, here, qemu)
        theirs = [*_arguments(tracking, there, qemu), *INCOMING]
        async with (
            running_qemu(SOURCE, _QEMU, ours, folder, timeout_s=timeout_s) as source,
            running_qemu(DESTINATION, _QEMU, theirs, folder, timeout_s=timeout_s) as destination,
        ):
            here.start(_ENGINE)
            syncs, sent = await _hold_and_release(
                source, destination, here, folder, timeout_s, heard=tracking.heard
            )
            with (
                ram_file(source.pid, source.name) as source_ram,
                ram_file(destination.pid, destination.name) as destination_ram,
            ):
                differing = compare(source_ram, destination_ram)
            journal, stats = here.journal(), here.stats()
            if len(journal) == JOURNAL_ENTRIES:
                raise NothingTestedError("the device's journal was full, and it wrote no more")
            went_on = await _goes_on(destination, there, int(journal["sequence"][-1]), timeout_s)
        warned = _WARNING in source.process.log.read_text(errors="replace")
    return _Result(differing, journal, sent, stats, syncs, loop.time() - started, went_on, warned)


def _arguments(tracking: Tracking, device: FakeDevice, qemu: TestedQemu) -> list[str]:
    return [
        # Some QEMUs are built without qtest; then the firmware runs.
        *("-machine", "q35,memory-backend=ram", "-accel", "qtest", "-accel", "tcg"),
        *("-m", f"{_RAM_BYTES >> 20}M"),
        *("-object", f"memory-backend-memfd,id=ram,size={_RAM_BYTES},share=on"),
        *tracking.arguments(device.sysfs, qemu.vfio_pci),
    ]


async def _hold_and_release(
    source: Qemu,
    destination: Qemu,
    device: FakeDevice,
    folder: Path,
    timeout_s: float,
    *,
    heard: bool,
) -> tuple[int, int]:
    """Migrate; held, unless it converges before, until the window has been written again.

    It is held for half of the migration's time at the most: it has to end as well.

    Returns how often QEMU synced, and the writes that there were when the window had been sent.
    """
    loop = asyncio.get_running_loop()
    limits = Limits(downtime_s=_DOWNTIME_S, timeout_s=timeout_s)
    migration = Migration(Ends(source.qmp, destination.qmp, folder), Unix(), limits)
    await _reckon_with(source, _ENDLESS_BYTES_PER_S if heard else _NEVER_BEHIND_BYTES_PER_S)
    try:
        await migration.start()
    except QmpRefusal as error:
        raise LackingError(str(error)) from error
    await migration.limit_bandwidth(migration.held_bytes_per_s)
    deadline = loop.time() + timeout_s / 2
    held = True
    sent: int | None = None
    async for progress in migration.follow():
        writes = device.stats()["writes"]
        if sent is None and _window_is_sent(progress, heard=heard):
            sent = writes
            if not heard:
                await source.qmp.execute("migrate-set-parameters", max_bandwidth=_SLOW_BYTES_PER_S)
        synced = progress.syncs >= _SYNCS or not heard
        rewritten = synced and sent is not None and writes >= sent + _REWRITES
        if held and (rewritten or loop.time() > deadline):
            held = False
            await _reckon_with(source, _ENDING_BYTES_PER_S)
            await migration.release()
    await migration.load()
    return migration.history[-1].syncs, device.stats()["writes"] if sent is None else sent


def _window_is_sent(progress: Progress, *, heard: bool) -> bool:
    if progress.syncs >= _SENT_ONCE:
        return True
    if heard or progress.total is None or progress.remaining is None:
        return False
    return progress.total - progress.remaining >= _PASSED_BYTES


async def _reckon_with(source: Qemu, bytes_per_s: int) -> None:
    """Tell QEMU (8.2 or newer) of a bandwidth for the device's state, once all else is sent.

    By itself it reckons with what it has seen last. That is much where it would stop the guest
    before the device has written anything again; and nothing where it is held, which would keep it
    from ever stopping the guest, as would 100 GiB of state, which it takes for granted where the
    kernel does not tell how much there is (before Linux 6.2).
    """
    with contextlib.suppress(QmpRefusal):
        await source.qmp.execute("migrate-set-parameters", avail_switchover_bandwidth=bytes_per_s)


async def _goes_on(destination: Qemu, device: FakeDevice, last: int, timeout_s: float) -> bool:
    """Whether the device writes on the destination, with numbers that follow the source's.

    Raises:
        WaitTimeoutError: it does not write, and has no error either.
    """
    await destination.qmp.execute("cont")
    late = WaitTimeoutError(
        f"the device has not written 100 times on the destination within {timeout_s:g} s"
    )

    def has_written_or_failed() -> bool:
        registers = device.registers()
        return registers["sequence"] > last + 100 or bool(registers["error"])

    await wait_until(has_written_or_failed, timeout_s, lambda: late)
    if device.registers()["error"]:
        return False
    first: Sequence[int] = device.journal()["sequence"][:1].tolist()
    return list(first) == [last + 1]
