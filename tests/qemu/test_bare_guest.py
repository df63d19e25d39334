"""The freestanding guest in a real QEMU: it starts on several machines, and runs proofs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from dmaproof.vhost_user.features import F_RING_PACKED
from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.devices.emulated import RINGS, EmulatedDevice
from qmp_tools.devices.process import Device, DeviceOptions
from qmp_tools.guest.bare import bare_guest
from qmp_tools.guest.channel import START_WRITE_ONCE, GuestChannel
from qmp_tools.guest.workload import PATTERNS, Workload
from qmp_tools.host.timeout import DEFAULT_TIMEOUT_S
from qmp_tools.qemu.choice import find_qemu
from qmp_tools.qemu.machine import MIB, Machine
from qmp_tools.qemu.qemu import running_qemu
from support.architectures import require_guests
from support.command import Tool


async def _boot(
    folder: Path,
    workload: Workload,
    architecture: Architecture,
    machine: str | None = None,
    arguments: Sequence[str] = (),
    ring: str = "split",
) -> GuestChannel:
    """Boot the guest, and return its channel when it has used its write-once pages."""
    require_guests(architecture)
    guest = bare_guest(architecture)
    socket = folder / "disk.sock"
    machine_arguments = Machine(
        architecture,
        machine=machine or architecture.machine,
        accelerator="tcg",
        memory_bytes=128 * MIB,
        cpus=1,
        kernel=guest.kernel,
        command_line=guest.command_line(workload),
    ).arguments()
    device = await Device.start(
        DeviceOptions(), {"source": socket}, folder, timeout_s=DEFAULT_TIMEOUT_S
    )
    try:
        disk = EmulatedDevice(DeviceOptions(), ring=ring).qemu_arguments(socket)
        async with running_qemu(
            "source",
            find_qemu(None, architecture),
            [*machine_arguments, *disk, *arguments],
            folder,
            timeout_s=DEFAULT_TIMEOUT_S,
        ) as qemu:
            channel = GuestChannel(qemu, DEFAULT_TIMEOUT_S)
            await channel.send(START_WRITE_ONCE)
            await channel.wait_for(
                lambda: channel.number("progress", "write_once") == workload.write_once,
                "used its write-once pages",
            )
            channel.close()
            accepted = device.accepted_features("source")
            assert accepted is not None
            assert bool(accepted & F_RING_PACKED) is (ring == "packed")
    finally:
        await device.end()
    return channel


# qboot assigns no addresses to the BARs, so the guest assigns them.
@pytest.mark.parametrize("firmware", [(), ("-bios", "qboot.rom")], ids=["seabios", "qboot"])
@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_the_guest_starts_with(tmp_path: Path, machine: str, firmware: tuple[str, ...]) -> None:
    workload = Workload(write_once=256, churn=64)
    channel = asyncio.run(_boot(tmp_path, workload, X86_64, machine, firmware))
    assert channel.error_messages == []
    assert channel.number("ready", "buffer_pages") == 1024 + 256


# The PCI configuration space is elsewhere without highmem; EL2 exists with virtualization.
@pytest.mark.parametrize("machine", ["virt,highmem=off", "virt,virtualization=on"])
def test_the_arm64_guest_starts_on(tmp_path: Path, machine: str) -> None:
    workload = Workload(write_once=256, churn=64)
    channel = asyncio.run(_boot(tmp_path, workload, AARCH64, machine))
    assert channel.error_messages == []
    assert channel.number("ready", "buffer_pages") == 1024 + 256


_SETTINGS = [
    (pattern, threads, ring) for pattern in PATTERNS for threads in (1, 64) for ring in RINGS
]


@pytest.mark.parametrize(
    ("architecture", "pattern", "threads", "ring"),
    [
        *((X86_64, *setting) for setting in _SETTINGS),
        *((AARCH64, "random", 64, ring) for ring in RINGS),
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else None,
)
def test_the_guest_carries_out_its_workload(
    tmp_path: Path, architecture: Architecture, pattern: str, threads: int, ring: str
) -> None:
    workload = Workload(
        pattern=pattern,
        threads=threads,
        write_once=2048,
        huge_every=8,
        unaligned_every=4,
        write_every=4,
    )
    channel = asyncio.run(_boot(tmp_path, workload, architecture, ring=ring))
    assert channel.error_messages == []
    assert channel.number("write-once-done", "pages") == 2048
    assert channel.number("progress", "writes") > 0


def test_the_reason_for_giving_up_is_reported(tool: Tool) -> None:
    outcome = tool.run(
        "prove", "--guest", "bare", "--workload", "write_once=1000000", "--accel", "tcg"
    )
    assert outcome.exit_code == 3
    assert "gave up" in outcome.errors
    assert "the workload needs 1005136 pages, but only" in outcome.errors


@pytest.mark.parametrize(
    ("architecture", "ring"),
    [*((X86_64, ring) for ring in RINGS), (AARCH64, "packed")],
    ids=lambda value: value.name if isinstance(value, Architecture) else None,
)
def test_a_proof_passes_and_detects_a_fault(
    tool: Tool, architecture: Architecture, ring: str
) -> None:
    require_guests(architecture)
    guest = ("--arch", architecture.name, "--guest", "bare")
    outcome = tool.run("prove", *guest, "--ring", ring, "--control", "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert (report["setup"]["guest"], report["setup"]["ring"]) == ("bare", ring)
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["guest"]["rechecked"] > 8192
    assert report["sensitivity"]["guaranteed_detectable"] >= 8000
    control = report["control"]
    assert control["caught"] is True
    assert all(
        page["link"] == "log" and page["blame"] == "device" for page in control["lost_pages"]
    )
    assert len(control["lost_pages"]) >= control["sensitivity"]["unreported_guaranteed"]
    assert control["guest"]["errors"] > 0


@pytest.mark.usefixtures("much_memory")
def test_the_guests_pages_are_below_and_above_4_gib(tool: Tool) -> None:
    # On q35, the RAM after the first 2 GiB begins at 4 GiB; for the 8 KiB see docs/guests.md.
    memory = f"{(2816 << 10) + 8}K"
    arguments = ("--guest", "bare", "--memory", memory, "--fault", "drop-pages=0.01")
    outcome = tool.run("prove", "--json", "-", *arguments)
    assert outcome.exit_code == 1, outcome.errors
    lost = outcome.report["lost_pages"]
    assert all(page["link"] == "log" for page in lost)
    above = sum(page["gpa"] >= 4 << 30 for page in lost)
    assert 10 < above < len(lost) - 10


def test_the_guest_switches_the_slot_of_a_plugged_disk_on(tool: Tool) -> None:
    require_guests(AARCH64)
    arguments = ("--arch", "aarch64", "--guest", "bare", "--workload", "write_once=512")
    outcome = tool.run("prove", *arguments, "--scenario", "device-hotplug")
    assert outcome.exit_code == 0, outcome.output + outcome.errors


def test_plugged_memory_is_used_beside_a_disk_behind_an_iommu(tool: Tool) -> None:
    # The virtio-mem device uses guest-physical addresses, and the disk IOVAs.
    require_guests(AARCH64)
    arguments = ("--arch", "aarch64", "--guest", "bare", "--workload", "write_once=1024")
    hotplug = ("--scenario", "memory-hotplug", "--iommu", "smmuv3")
    outcome = tool.run("prove", *arguments, *hotplug, "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 1024
