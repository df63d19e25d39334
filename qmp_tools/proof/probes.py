"""Probe what this machine and a QEMU can really do, and cache the answers.

- Whether KVM runs dmaproof's guest. On some machines /dev/kvm can be opened and firmware runs, but
  a Linux guest hangs.
- Whether the accelerator's own dirty tracking loses pages that a vCPU wrote. TCG loses them if the
  size of a RAM block is a multiple of 256 KiB: the bitmap sync then takes whole words. QEMU 7.2
  does not reset the TLB's dirty state there, and newer versions reset that of the first block only.

An answer about the machine is valid until its next boot, and one about a QEMU until its file
changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mmap
import os
import platform
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from dmaproof.errors import UnsupportedError, UntestableError, UsageError, WaitTimeoutError
from dmaproof.units import div_ceil

from ..arch import ARCHITECTURES
from ..arch.architecture import Architecture
from ..guest.bare import probe_guest
from ..guest.build import Guest
from ..guest.workload import Workload
from ..host.run_folder import run_folder
from ..host.timeout import bounded
from ..host.user_folders import cache_folder
from ..memory.process_memory import mappings_of
from ..memory.ram import compare, ram_file
from ..migration.migration import Limits, Migration
from ..migration.scenarios.precopy import Unix
from ..migration.transport import Ends
from ..qemu.machine import (
    DESTINATION,
    GIB,
    INCOMING,
    KIB,
    MIB,
    SOURCE,
    Machine,
    format_memory,
    ram_granule_bytes,
)
from ..qemu.qemu import idle_qemu, running_qemu

_logger = logging.getLogger(__name__)

_SOUND_GRANULE_BYTES: Final = 256 * KIB
"""TCG's dirty tracking is sound in RAM whose size is not a multiple of this, 64 pages."""

_PROBE_MEMORY_BYTES: Final = 64 * MIB
_BLOCK_BEFORE: Final = ("-object", f"memory-backend-ram,id=before,size={_PROBE_MEMORY_BYTES}")
"""Becomes QEMU's first RAM block, which otherwise is that of the guest's RAM."""
_ANONYMOUS: Final = "/dev/zero"
"""What /proc/PID/maps calls shared memory without a file (shmem_zero_setup in mm/shmem.c)."""
_PROBE_BANDWIDTH_BYTES_PER_S: Final = 1 * MIB
_PROBE_SYNCS: Final = 4


def _cache_file() -> Path:
    return cache_folder() / "probes.json"


def _cached_answers() -> dict[str, int]:
    try:
        answers = json.loads(_cache_file().read_text())
    except (OSError, ValueError, UntestableError):
        return {}
    if not isinstance(answers, dict):
        return {}
    return {question: answer for question, answer in answers.items() if isinstance(answer, int)}


async def _cached(question: str, probe: Callable[[], Awaitable[int]]) -> int:
    """Return the cached answer to `question`; without one, run `probe` and cache its answer."""
    answers = _cached_answers()
    if question not in answers:
        answer = await probe()
        answers = {**_cached_answers(), question: answer}
        with contextlib.suppress(OSError, UntestableError):  # then the next run probes again
            file = _cache_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(answers, indent=1))
            fresh.replace(file)
    return answers[question]


def identity(qemu: Path) -> str:
    """Return a string that changes when the file of a QEMU changes."""
    status = qemu.resolve().stat()
    return f"{qemu.resolve()} {status.st_size} {status.st_mtime_ns}"


async def require_architecture(
    wanted: Architecture, side: str, qemu: Path, timeout_s: float
) -> None:
    """Refuse a QEMU for `side` that does not emulate the `wanted` architecture of the guest.

    Raises:
        UsageError: the QEMU emulates another architecture.
        UntestableError: the QEMU does not start.
    """

    async def probe() -> int:
        async with idle_qemu(side, qemu, timeout_s=timeout_s) as running:
            emulated = (await running.qmp.execute("query-target"))["arch"]
        if emulated != wanted.name:
            other = f", or --arch {emulated}" if emulated in ARCHITECTURES else ""
            raise UsageError(
                f"{qemu} emulates {emulated}, but the guest is for {wanted.name}; choose a "
                f"{wanted.qemu_program}{other}"
            )
        return True

    await _cached(f"emulates {wanted.name} {identity(qemu)}", probe)


async def require_file_behind_ram(qemu: Path, timeout_s: float) -> None:
    """Refuse a QEMU that keeps a shared memory-backend-ram in no file, as QEMU before 10.0 does.

    Raises:
        UnsupportedError: a device outside this QEMU cannot map such memory.
        UntestableError: the QEMU does not start.
    """

    async def probe() -> int:
        async with idle_qemu("QEMU", qemu, timeout_s=timeout_s) as running:
            backend = {"qom-type": "memory-backend-ram", "id": "ram", "share": True}
            await running.qmp.execute("object-add", size=_PROBE_MEMORY_BYTES, **backend)
            found = [
                mapping.path
                for mapping in mappings_of(running.pid, running.name)
                if mapping.shared and mapping.end - mapping.start == _PROBE_MEMORY_BYTES
            ]
            return not found[0].startswith(_ANONYMOUS)

    if not await _cached(f"file-behind-ram {identity(qemu)}", probe):
        raise UnsupportedError(
            f"--memory-backend ram: {qemu} keeps this memory in no file, so a device outside QEMU "
            "cannot map it; use another kind of memory, or QEMU 10.0 or newer"
        )


async def choose_accelerator(
    wanted: Literal["auto", "kvm", "tcg"],
    qemu: Path,
    guest: Guest,
    timeout_s: float,
) -> Literal["kvm", "tcg"]:
    """Return 'kvm' or 'tcg': what was `wanted`; for 'auto', KVM if KVM runs `guest`.

    Raises:
        UsageError: KVM is `wanted` for a guest of another architecture than the machine's.
    """
    architecture = guest.architecture
    if not architecture.is_host:
        why = f"this machine is {platform.machine()} and the guest is for {architecture.name}"
        if wanted == "kvm":
            raise UsageError(f"--accel kvm: {why}; use --accel tcg")
        if wanted == "auto":
            _logger.info("accelerator: TCG, because %s", why)
        return "tcg"
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        exists = Path("/dev/kvm").exists()
        why = "cannot be opened by this user" if exists else "does not exist"
        _logger.info("accelerator: TCG, because /dev/kvm %s", why)
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    runs = await _cached(
        f"kvm {boot} {identity(qemu)} {guest.version}", lambda: _kvm_runs(qemu, guest, timeout_s)
    )
    if not runs:
        _logger.info(
            "accelerator: TCG, because the guest did not start within %.0f s under KVM",
            guest.kvm_timeout_s,
        )
    return "kvm" if runs else "tcg"


async def _kvm_runs(qemu: Path, guest: Guest, timeout_s: float) -> int:
    machine = Machine(
        guest.architecture,
        guest.architecture.machine,
        accelerator="kvm",
        memory_bytes=256 * MIB,
        cpus=1,
        kernel=guest.kernel,
        initramfs=guest.initramfs,
        command_line=guest.command_line(Workload()),
    )
    disk = ["-blockdev", f"null-co,node-name=disk,size={64 * GIB}"]
    disk += ["-device", "virtio-blk-pci,drive=disk"]
    arguments = [*machine.arguments(), *disk]
    with run_folder() as folder, contextlib.suppress(UntestableError, TimeoutError):
        async with (
            running_qemu("probe", qemu, arguments, folder, timeout_s=timeout_s) as running,
            asyncio.timeout(guest.kvm_timeout_s),
        ):
            line = await running.report.readline()
            return int(bool(line) and not line.startswith(b"fatal"))
    return 0


async def choose_memory(
    architecture: Architecture,
    qemu: Path,
    accelerator: str,
    wanted_bytes: int,
    timeout_s: float,
    page_bytes: int = mmap.PAGESIZE,
    blocks: int = 1,
) -> int:
    """Return a RAM size near `wanted_bytes` at which the accelerator's dirty tracking is sound.

    The RAM is in `blocks` RAM blocks, whose pages have `page_bytes`. The sizes of all but the last
    one are multiples of 256 KiB (`Machine.ram_backends`).
    """
    wanted_bytes = max(div_ceil(wanted_bytes, page_bytes), blocks) * page_bytes
    granule_bytes = max(ram_granule_bytes(architecture.ram_granule_bytes), page_bytes)
    lost = await vcpu_pages_lost(architecture, qemu, accelerator, timeout_s)
    lost_behind = (
        await vcpu_pages_lost(architecture, qemu, accelerator, timeout_s, in_dimms=True)
        if blocks > 1
        else 0
    )
    if lost_behind > 0 and (blocks > 2 or lost):
        _logger.warning(
            "memory: this QEMU may lose pages of a NUMA node that its vCPUs write (a probe lost "
            "%d); the report attributes such losses to the accelerator",
            lost_behind,
        )
    lost = max(lost, lost_behind)
    if not lost:
        return wanted_bytes
    if granule_bytes >= _SOUND_GRANULE_BYTES:
        _logger.warning(
            "memory: this QEMU loses pages that its vCPUs write (a probe lost %d), and no size of "
            "RAM prevents that on %s%s; the report attributes such losses to the accelerator; a "
            "newer QEMU may not lose any",
            *(lost, architecture.name, " with huge pages" if page_bytes > mmap.PAGESIZE else ""),
        )
        return wanted_bytes
    memory = wanted_bytes + granule_bytes
    _logger.info(
        "memory: %s, because with sizes such as %s this QEMU loses pages that its vCPUs write "
        "(a probe lost %d)",
        *(format_memory(memory), format_memory(wanted_bytes), lost),
    )
    return memory


async def warn_of_dimms(
    architecture: Architecture, qemu: Path, accelerator: str, timeout_s: float
) -> None:
    """Warn if the accelerator's own dirty tracking is not sound in hot-plugged memory."""
    if lost := await vcpu_pages_lost(architecture, qemu, accelerator, timeout_s, in_dimms=True):
        _logger.warning(
            "memory: this QEMU may lose pages of a DIMM that its vCPUs write (a probe lost %d); "
            "the report attributes such losses to the accelerator",
            lost,
        )


async def require_first_block(machine: Machine, qemu: Path, timeout_s: float) -> None:
    """Refuse memory that is larger than the first RAM block, if QEMU aborts because of that.

    QEMU 9.0 to 11.1 do under TCG: when they have synced such a block, they reset the TLB's dirty
    state of the first one, up to the size of the other.

    Raises:
        UnsupportedError: this QEMU aborts.
    """
    larger = machine.larger_than_first
    if not larger:
        return
    architecture, accelerator = machine.architecture, machine.accelerator
    if await vcpu_pages_lost(architecture, qemu, accelerator, timeout_s):
        return  # this QEMU resets nothing
    if await vcpu_pages_lost(architecture, qemu, accelerator, timeout_s, in_dimms=True):
        name, size = max(larger.items(), key=lambda block: block[1])
        first, first_bytes = next(iter(machine.ram_backends.items()))
        least = format_memory(size * max(machine.numa_nodes, 1))
        other = ", or leave out --numa" if machine.numa_nodes else ""
        raise UnsupportedError(
            f"{qemu} aborts under TCG if memory is larger than the guest's first memory backend: "
            f"{name} has {format_memory(size)}, and {first} has {format_memory(first_bytes)}; give "
            f"the guest at least --memory {least}{other}"
        )


async def vcpu_pages_lost(
    architecture: Architecture,
    qemu: Path,
    accelerator: str,
    timeout_s: float,
    *,
    in_dimms: bool = False,
) -> int:
    """Return how many pages a migration without any device loses of those that a vCPU writes.

    The vCPU writes to the guest's RAM, which is QEMU's first RAM block, or with `in_dimms` to a
    block after the first, as a DIMM is.
    """
    block = " behind the first block" if in_dimms else ""
    machine = Machine(
        architecture,
        architecture.machine,
        accelerator=accelerator,
        memory_bytes=_PROBE_MEMORY_BYTES,
        cpus=1,
        kernel=probe_guest(architecture),
    )
    return await _cached(
        f"vcpu-pages-lost{block} {accelerator} {identity(qemu)} {machine.kernel.parent.name}",
        lambda: _count_vcpu_pages_lost(qemu, machine, _BLOCK_BEFORE if in_dimms else (), timeout_s),
    )


async def _count_vcpu_pages_lost(
    qemu: Path, machine: Machine, before: Sequence[str], timeout_s: float
) -> int:
    arguments = [*before, *machine.arguments()]
    with run_folder() as folder:
        async with (
            running_qemu(SOURCE, qemu, arguments, folder, timeout_s=timeout_s) as source,
            running_qemu(
                DESTINATION, qemu, [*arguments, *INCOMING], folder, timeout_s=timeout_s
            ) as destination,
        ):
            late = WaitTimeoutError(
                f"the probe's guest on {qemu} has not reported anything within {timeout_s:g} s; "
                "allow more time (--timeout)"
            )
            async with bounded(timeout_s, lambda: late):
                await source.report.readline()
            # At this bandwidth the 64 dirty pages take a quarter of a second. QEMU must send them
            # while the vCPU still runs, also on a busy machine: the loss is hidden if the vCPU has
            # not written to the pages again by the time it is stopped.
            limits = Limits(_PROBE_BANDWIDTH_BYTES_PER_S, timeout_s=timeout_s)
            migration = Migration(Ends(source.qmp, destination.qmp, folder), Unix(), limits)
            await migration.start()
            async for progress in migration.follow():
                if progress.syncs >= _PROBE_SYNCS:
                    await migration.release()
            await migration.load()
            with (
                ram_file(source.pid, "the probe's source") as source_ram,
                ram_file(destination.pid, "the probe's destination") as destination_ram,
            ):
                return len(compare(source_ram, destination_ram))
