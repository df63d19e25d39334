"""L2 migrated inside L1 while its devices write, and held until each lost page would be noticed.

Each page that a device writes has content that no other write has. So if a page of a window has
been sent and its dirty bit is then lost, the page is stale on the destination.

If dirty pages are reported to QEMU in precopy, the migration is held in precopy for some syncs. If
not, it is held in its first pass. After that pass nothing would be left to send, and QEMU 11.1
would sync again and again without a pause and hardly answer QMP (docs/qemu-findings.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import DmaproofError, WaitTimeoutError
from dmaproof.units import PAGE_BYTES

from ..host.timeout import wait_until
from ..memory.ram import RamFile, compare, ram_files
from ..migration.migration import Limits, Migration, Progress
from ..migration.scenarios.precopy import Multifd4, Unix
from ..migration.transport import Ends
from ..qemu.machine import DESTINATION, INCOMING, SOURCE
from ..qemu.qemu import OwnedQemu, SocketQemu, running_qemu
from ..qemu.qmp import QmpClosedError, QmpRefusal
from . import plugged_memory
from .fake_device import JOURNAL_ENTRIES, FakeDevice, fake_device, injected, was_stopped
from .l2 import (
    FIRST_SLOT,
    FIRST_WINDOW,
    QEMU,
    RAM_BYTES,
    WINDOWS_BYTES,
    Plan,
    TestedQemu,
    device_id,
    machine_arguments,
    require_kernel_support,
    tested_qemu,
)
from .l2_result import DeviceResult, Result, complete_pages
from .outcome import NothingTestedError, NotSupportedError, require
from .tracking import joint

_SENT_ONCE: Final = 2
"""The number of bitmap syncs after which every page has been sent."""
_PASSED_BYTES: Final = FIRST_WINDOW + WINDOWS_BYTES + (4 << 20)
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
_DEATH_PAUSE_S: Final = 2.0
"""So long after the end of a destination, the source that caused it may still be ending."""
_HOTPLUG_BUS_PORT: Final = 0xAE10
_HOTPLUG_EJECT_PORT: Final = 0xAE08
"""The ports by which a guest ejects a PCI device (QEMU's docs/specs/acpi_pci_hotplug.rst)."""


def migrate(plan: Plan, timeout_s: float) -> Result:
    """Migrate L2 by `plan`. `timeout_s` bounds each wait.

    Raises:
        NotSupportedError: the kernel or QEMU does not have what the plan needs, or refuses it.
        NothingTestedError: the attempt proves nothing.
        ProcessDiedError: a QEMU has ended during the migration.
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
            if plan.in_plugged_memory:
                async with ram_files(source) as (ram, _):
                    await plugged_memory.plug(source, ram, timeout_s)
            for number, device in on_source.items():
                device.start(plan.engine(number))
            if plan.removed is not None:
                await _unplug(source, plan, on_source[plan.removed], timeout_s)
            running = {n: on_source[n] for n in plan.migrated}
            try:
                syncs, sent = await _hold_and_release(
                    source, destination, running, folder, plan, timeout_s
                )
            except QmpClosedError as error:
                raise await _why_closed(error, source, destination, timeout_s) from error
            await _wait_for_writes_after_stop(plan, on_source[plan.victim], timeout_s)
            async with ram_files(source) as sent_ram, ram_files(destination) as received_ram:
                differing = _differing(sent_ram, received_ram)
                removed_pages = 0
                if plan.removed is not None:
                    content = received_ram[0].read(0, RAM_BYTES)
                    removed_pages = complete_pages(on_source[plan.removed].journal(), content)
            await destination.qmp.execute("cont")
            devices = {
                n: await _result_of(running[n], on_destination[n], sent[n], timeout_s)
                for n in plan.migrated
            }
        warned = _WARNING in source.process.log.read_text(errors="replace")
    seconds = loop.time() - started
    return Result(devices, differing, syncs, seconds, warned, removed_pages)


async def _why_closed(
    error: QmpClosedError, source: OwnedQemu, destination: OwnedQemu, timeout_s: float
) -> DmaproofError:
    """Return how the QEMU that has closed its connection ended, or `error` if none has ended.

    A destination also ends if its source has died, so the source comes first.
    """
    deaths = [asyncio.ensure_future(qemu.process.missed()) for qemu in (source, destination)]
    try:
        await asyncio.wait(deaths, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(deaths[:1], timeout=_DEATH_PAUSE_S)
        return next((death.result() for death in deaths if death.done()), error)
    finally:
        for death in deaths:
            death.cancel()


def _differing(sent: Sequence[RamFile], received: Sequence[RamFile]) -> NDArray[np.int64]:
    """Return the numbers of the guest's pages that differ.

    The files are in the order of their addresses: RAM, and memory of virtio-mem if there is any.
    """
    firsts = (0, plugged_memory.FIRST // PAGE_BYTES)
    sides = zip(firsts, sent, received, strict=False)
    return np.concatenate([first + compare(source, other) for first, source, other in sides])


async def _unplug(source: SocketQemu, plan: Plan, device: FakeDevice, timeout_s: float) -> None:
    """Unplug a device that has written its window, as a guest with ACPI would do it."""
    assert plan.removed is not None
    pages = plan.engine(plan.removed).length // PAGE_BYTES
    await _wait_for_writes(device, pages, timeout_s)
    async with source.qmp.events("DEVICE_DELETED") as deleted:
        await source.qmp.execute("device_del", id=device_id(plan.removed))
        # The guest is asked to release the device, and then ejects it. L2 has no such guest, so
        # QEMU's monitor writes the ports.
        slot_bit = 1 << FIRST_SLOT + plan.removed
        for port, value in ((_HOTPLUG_BUS_PORT, 0), (_HOTPLUG_EJECT_PORT, slot_bit)):
            line = f"o /w {port:#x} {value:#x}"
            await source.monitor(line)

        def not_deleted() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"QEMU has not removed the device within {timeout_s:g} s; "
                "allow more time (--timeout)"
            )

        await wait_until(lambda: not deleted.empty(), timeout_s, not_deleted)


async def _wait_for_writes(device: FakeDevice, count: int, timeout_s: float) -> None:
    def late() -> WaitTimeoutError:
        return WaitTimeoutError(
            f"the device made fewer than {count} writes within {timeout_s:g} s; "
            "allow more time (--timeout)"
        )

    await wait_until(lambda: device.stats()["writes"] >= count, timeout_s, late)


async def _wait_for_writes_after_stop(plan: Plan, device: FakeDevice, timeout_s: float) -> None:
    """Wait until the fault ``write_after_stop`` has taken effect, which it does asynchronously."""
    expected = plan.faults.get("write_after_stop", 0)

    def have_come() -> bool:
        return int(was_stopped(device.journal()).sum()) >= expected

    def late() -> WaitTimeoutError:
        return WaitTimeoutError(
            f"the stopped device has not written again within {timeout_s:g} s; "
            "allow more time (--timeout)"
        )

    if expected:
        await wait_until(have_come, timeout_s, late)


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
    scenario = Multifd4() if plan.multifd else Unix()
    migration = Migration(Ends(source.qmp, destination.qmp, folder), scenario, limits)
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
        await source.qmp.execute("device_del", id=device_id(number))
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
        NothingTestedError: the device's journal is full, or its engine failed on the source.
        WaitTimeoutError: the device neither writes on the destination nor reports an error.
    """
    journal = source.journal()
    if len(journal) == JOURNAL_ENTRIES:
        raise NothingTestedError("the device stopped writing, because its journal was full")
    if error := source.registers()["error"]:
        raise NothingTestedError(f"the device's engine stopped on the source with errno {error}")
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
