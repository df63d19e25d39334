"""L2: a QEMU with vfio-pci on fake devices, migrated inside L1 while the devices write.

L2 has no guest system, so no vCPU writes RAM, only the devices do. The engine of each device writes
a window of RAM round after round until the device is stopped, each page with content that no other
write has. So if a page of a window has been sent and its dirty bit is then lost, the page is stale
on the destination.

If dirty pages are reported to QEMU in precopy, the migration is held in precopy for some syncs. If
not, it is held in its first pass. After that pass nothing would be left to send, and QEMU 11.1
would sync again and again without a pause and hardly answer QMP (docs/qemu-findings.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from ..qemu.qemu import OwnedQemu, SocketQemu, running_qemu
from ..qemu.qmp import QmpRefusal
from .fake_device import (
    JOURNAL_ENTRIES,
    Engine,
    EnteredStates,
    FakeDevice,
    Journal,
    content,
    dropped_pages,
    fake_device,
    injected,
    was_stopped,
)
from .fake_driver import any_driver, open_iommufd
from .l1.machine import TESTED_QEMU
from .outcome import NothingTestedError, NotSupportedError, ProofFailedError, require
from .tracking import Tracking, joint

QEMU: Final = Path(os.environ.get(TESTED_QEMU, "/usr/bin/qemu-system-x86_64"))
RAM_BYTES: Final = 64 << 20
RAM_PAGES: Final = RAM_BYTES // PAGE_BYTES
_FIRST_WINDOW: Final = 8 << 20  # above what the firmware uses
_WINDOWS_BYTES: Final = 8 << 20
"""The windows of all devices together."""
_SENT_ONCE: Final = 2
"""The number of bitmap syncs after which every page has been sent."""
_PASSED_BYTES: Final = _FIRST_WINDOW + _WINDOWS_BYTES + (4 << 20)
"""When the first pass has sent this many bytes, it has sent the windows: it ascends in RAM."""
_SYNCS: Final = 4
"""The migration is held for this many syncs, and then for one write to each page."""
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
_FIRST_SLOT: Final = 5
_HOTPLUG_BUS_PORT: Final = 0xAE10
_HOTPLUG_EJECT_PORT: Final = 0xAE08
"""The ports by which a guest ejects a PCI device (QEMU's docs/specs/acpi_pci_hotplug.rst)."""


@dataclass(frozen=True)
class Plan:
    """What to migrate: an L2 with a device for each of `trackings`.

    `faults` are parameters of the module, which the source's device number `victim` has. The device
    number `removed` is unplugged before the migration.
    """

    trackings: tuple[Tracking, ...]
    faults: Mapping[str, int] = field(default_factory=dict)
    victim: int = 0
    removed: int | None = None

    @property
    def migrated(self) -> tuple[int, ...]:
        """The numbers of the devices that are migrated."""
        return tuple(n for n in range(len(self.trackings)) if n != self.removed)

    def engine(self, number: int) -> Engine:
        """Return what the device writes."""
        length = _WINDOWS_BYTES // len(self.trackings)
        return Engine(iova=_FIRST_WINDOW + number * length, length=length)


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
    async with run_l2("tested", ["-machine", "none"], timeout_s) as qemu:
        properties = await qemu.qmp.execute("device-list-properties", typename="vfio-pci")
    number = qemu.version.split()[0]  # without the packager's suffix
    return TestedQemu(number, frozenset(entry["name"] for entry in properties))


@contextlib.asynccontextmanager
async def run_l2(name: str, arguments: Sequence[str], timeout_s: float) -> AsyncIterator[OwnedQemu]:
    """Run the QEMU under test with these arguments."""
    with tempfile.TemporaryDirectory(prefix="l2-") as folder:
        async with running_qemu(name, QEMU, arguments, Path(folder), timeout_s=timeout_s) as qemu:
            yield qemu


@functools.cache
def _require_device_log() -> None:
    """Fail with the kernel's error if it cannot log a device's DMA.

    Without this check QEMU's migration would fail half-way.
    """
    with any_driver() as driver:
        driver.device.start_logging([driver.window], PAGE_BYTES)
        driver.device.report(*driver.window, PAGE_BYTES)


def require_kernel_support(trackings: Sequence[Tracking]) -> None:
    """Fail with the kernel's error if it does not have what QEMU needs for these trackings."""
    if any(tracking.iommufd for tracking in trackings):
        open_iommufd().close()
    if any(tracking.device for tracking in trackings):
        _require_device_log()


def migrate(plan: Plan, timeout_s: float) -> Result:
    """Migrate L2 by `plan`. `timeout_s` bounds each wait.

    Raises:
        NotSupportedError: the kernel or QEMU does not have what the plan needs, or refuses it.
        NothingTestedError: the attempt proves nothing.
    """
    qemu = tested_qemu(timeout_s)
    require_kernel_support(plan.trackings)
    return asyncio.run(_migrate(plan, qemu, timeout_s))


async def _migrate(plan: Plan, qemu: TestedQemu, timeout_s: float) -> Result:
    loop = asyncio.get_running_loop()
    started = loop.time()
    numbers = range(len(plan.trackings))
    with contextlib.ExitStack() as stack:
        on_source = {n: stack.enter_context(fake_device(timeout_s)) for n in numbers}
        on_destination = {n: stack.enter_context(fake_device(timeout_s)) for n in plan.migrated}
        if plan.faults:
            stack.enter_context(injected(on_source[plan.victim], **plan.faults))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="l2-")))
        outgoing = machine_arguments(plan, on_source, qemu)
        incoming = [*machine_arguments(plan, on_destination, qemu), *INCOMING]
        async with (
            running_qemu(SOURCE, QEMU, outgoing, folder, timeout_s=timeout_s) as source,
            running_qemu(DESTINATION, QEMU, incoming, folder, timeout_s=timeout_s) as destination,
        ):
            for number, device in on_source.items():
                device.start(plan.engine(number))
            if plan.removed is not None:
                await _unplug(source, plan, on_source[plan.removed], timeout_s)
            running = {n: on_source[n] for n in plan.migrated}
            syncs, sent = await _hold_and_release(
                source, destination, running, folder, plan, timeout_s
            )
            await _wait_for_writes_after_stop(plan, on_source[plan.victim], timeout_s)
            with (
                ram_file(source.pid, source.name) as source_ram,
                ram_file(destination.pid, destination.name) as destination_ram,
            ):
                differing = compare(source_ram, destination_ram)
                removed_pages = 0
                if plan.removed is not None:
                    ram = destination_ram.read(0, RAM_BYTES)
                    removed_pages = complete_pages(on_source[plan.removed].journal(), ram)
            await destination.qmp.execute("cont")
            devices = {
                n: await _result_of(running[n], on_destination[n], sent[n], timeout_s)
                for n in plan.migrated
            }
        warned = _WARNING in source.process.log.read_text(errors="replace")
    seconds = loop.time() - started
    return Result(devices, differing, syncs, seconds, warned, removed_pages)


def machine_arguments(
    plan: Plan, devices: Mapping[int, FakeDevice], qemu: TestedQemu, *front: str, **options: str
) -> list[str]:
    """Return QEMU's arguments for L2 with these devices of the plan.

    `front` comes before the devices. Each device has these `options`.
    """
    # On a q35 only devices behind a bridge can be unplugged.
    machine = "q35" if plan.removed is None else "pc"
    objects = dict.fromkeys(plan.trackings[n].objects for n in devices)
    arguments = [
        # Some QEMUs are built without qtest; with TCG, the firmware runs in L2.
        *("-machine", f"{machine},memory-backend=ram", "-accel", "qtest", "-accel", "tcg"),
        *("-m", f"{RAM_BYTES >> 20}M"),
        *("-object", f"memory-backend-memfd,id=ram,size={RAM_BYTES},share=on"),
        *(word for words in objects for word in words),
        *front,
    ]
    for number, device in devices.items():
        slot = {"id": _id(number), "addr": f"{_FIRST_SLOT + number}"}
        tracking = plan.trackings[number]
        option = tracking.device_option(device.sysfs, qemu.vfio_pci, **slot, **options)
        arguments += ["-device", option]
    return arguments


def _id(number: int) -> str:
    return f"device{number}"


async def _unplug(source: SocketQemu, plan: Plan, device: FakeDevice, timeout_s: float) -> None:
    """Unplug a device that has written its window, as a guest with ACPI would do it."""
    assert plan.removed is not None
    pages = plan.engine(plan.removed).length // PAGE_BYTES
    await _wait_for_writes(device, pages, timeout_s)
    async with source.qmp.events("DEVICE_DELETED") as deleted:
        await source.qmp.execute("device_del", id=_id(plan.removed))
        # The guest is asked to release the device, and then ejects it. L2 has no such guest, so
        # QEMU's monitor writes the ports.
        slot_bit = 1 << _FIRST_SLOT + plan.removed
        for port, value in ((_HOTPLUG_BUS_PORT, 0), (_HOTPLUG_EJECT_PORT, slot_bit)):
            line = f"o /w {port:#x} {value:#x}"
            await source.monitor(line)

        def not_deleted() -> WaitTimeoutError:
            return WaitTimeoutError(f"QEMU has not removed the device within {timeout_s:g} s")

        await wait_until(lambda: not deleted.empty(), timeout_s, not_deleted)


async def _wait_for_writes(device: FakeDevice, count: int, timeout_s: float) -> None:
    def late() -> WaitTimeoutError:
        return WaitTimeoutError(f"the device made fewer than {count} writes in {timeout_s:g} s")

    await wait_until(lambda: device.stats()["writes"] >= count, timeout_s, late)


async def _wait_for_writes_after_stop(plan: Plan, device: FakeDevice, timeout_s: float) -> None:
    """Wait until the fault ``write_after_stop`` has taken effect, which it does asynchronously."""
    expected = plan.faults.get("write_after_stop", 0)

    def have_come() -> bool:
        return int(was_stopped(device.journal()).sum()) >= expected

    def late() -> WaitTimeoutError:
        return WaitTimeoutError(f"the stopped device has not written again within {timeout_s:g} s")

    if expected:
        await wait_until(have_come, timeout_s, late)


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


async def _hold_and_release(
    source: SocketQemu,
    destination: SocketQemu,
    devices: Mapping[int, FakeDevice],
    folder: Path,
    plan: Plan,
    timeout_s: float,
) -> tuple[int, dict[int, int]]:
    """Migrate, and hold the migration until each device has written its window again.

    The hold takes at most half of the timeout, so that the migration can end within the rest. A
    migration may also converge before.

    Returns:
        The number of QEMU's bitmap syncs, and of each device's writes when its window had been
        sent.
    """
    loop = asyncio.get_running_loop()
    tracked = joint([plan.trackings[number] for number in devices])
    in_precopy = not tracked or any(tracking.reports_in_precopy for tracking in tracked)
    limits = Limits(downtime_s=_DOWNTIME_S, timeout_s=timeout_s)
    migration = Migration(Ends(source.qmp, destination.qmp, folder), Unix(), limits)
    await _set_switchover_bandwidth(
        source, _HOLD_IN_PRECOPY_BYTES_PER_S if in_precopy else _HOLD_IN_FIRST_PASS_BYTES_PER_S
    )
    try:
        await migration.start()
    except QmpRefusal as error:
        raise NotSupportedError(str(error)) from error
    if plan.removed is not None and devices:
        await _require_unplug_refused(source, next(iter(devices)))
    await migration.limit_bandwidth(migration.held_bytes_per_s)
    deadline = loop.time() + timeout_s / 2
    held = True
    sent: dict[int, int] | None = None
    async for progress in migration.follow():
        writes = {number: device.stats()["writes"] for number, device in devices.items()}
        if sent is None and _windows_are_sent(progress, in_precopy=in_precopy):
            sent = writes
            if not in_precopy:
                await source.qmp.execute("migrate-set-parameters", max_bandwidth=_SLOW_BYTES_PER_S)
        synced = progress.syncs >= _SYNCS or not in_precopy or not devices
        rewritten = synced and sent is not None and _have_rewritten(plan, writes, sent)
        if held and (rewritten or not devices or loop.time() > deadline):
            held = False
            await _set_switchover_bandwidth(source, _END_BYTES_PER_S)
            await migration.release()
    await migration.load()
    last = {number: device.stats()["writes"] for number, device in devices.items()}
    return migration.history[-1].syncs, last if sent is None else sent


def _have_rewritten(plan: Plan, writes: Mapping[int, int], sent: Mapping[int, int]) -> bool:
    return all(
        count >= sent[number] + plan.engine(number).length // PAGE_BYTES
        for number, count in writes.items()
    )


async def _require_unplug_refused(source: SocketQemu, number: int) -> None:
    """Require that QEMU refuses to unplug a device while it is migrated."""
    try:
        await source.qmp.execute("device_del", id=_id(number))
    except QmpRefusal:
        return
    require(False, "QEMU accepts device_del of a device that it migrates")


def _windows_are_sent(progress: Progress, *, in_precopy: bool) -> bool:
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


async def _result_of(
    source: FakeDevice, destination: FakeDevice, sent: int, timeout_s: float
) -> DeviceResult:
    """Return the result of one device, when it has continued on the destination or failed there.

    Raises:
        NothingTestedError: the device's journal is full.
        WaitTimeoutError: the device neither writes on the destination nor reports an error.
    """
    journal = source.journal()
    if len(journal) == JOURNAL_ENTRIES:
        raise NothingTestedError("the device stopped writing, because its journal was full")
    allowed = journal[~was_stopped(journal)]
    discontinued = await _why_discontinued(destination, int(allowed["sequence"][-1]), timeout_s)
    return DeviceResult(
        *(journal, sent, source.stats(), source.states(), destination.states(), discontinued)
    )


async def _why_discontinued(device: FakeDevice, last: int, timeout_s: float) -> str:
    """Return nothing if the device writes on the destination, with numbers that follow `last`.

    Raises:
        WaitTimeoutError: the device neither writes nor reports an error.
    """
    not_written = WaitTimeoutError(
        f"the device made fewer than 100 writes on the destination within {timeout_s:g} s"
    )

    def has_written_or_failed() -> bool:
        registers = device.registers()
        return registers["sequence"] > last + 100 or bool(registers["error"])

    await wait_until(has_written_or_failed, timeout_s, lambda: not_written)
    if error := device.registers()["error"]:
        return f"its engine has stopped with errno {error}"
    first = int(device.journal()["sequence"][0])
    return "" if first == last + 1 else f"it continues write {last} with write {first}"
