"""The records of the architectures of guests."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from dmaproof.errors import UsageError
from qmp_tools.arch import ARCHITECTURES, find_architecture, host_architecture
from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.cli.main import main
from qmp_tools.exit_codes import EXIT_UNTESTED
from qmp_tools.qemu.machine import GIB, MIB, Machine
from qmp_tools.qemu.pci_express import behind_ports

GUESTS = Path(__file__).parents[2] / "guests"


@pytest.fixture(params=[*ARCHITECTURES.values()], ids=[*ARCHITECTURES])
def architecture(request: pytest.FixtureRequest) -> Architecture:
    found: Architecture = request.param
    return found


def test_an_architecture_has_the_sources_of_its_guests(architecture: Architecture) -> None:
    assert (GUESTS / "probe" / f"{architecture.name}.S").is_file()
    assert (GUESTS / "bare" / architecture.name).is_dir() is ("bare" in architecture.guests)


def test_console_and_reports_are_connected_to_the_guest(architecture: Architecture) -> None:
    machine = Machine(architecture, architecture.machine, "tcg", 128 * MIB, 1, Path("kernel"))
    arguments = " ".join(machine.arguments())
    assert arguments.count("chardev:console") + arguments.count("chardev=console") == 1
    assert arguments.count("chardev:report") + arguments.count("chardev=report") == 1


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "loongarch64")
    assert host_architecture() is None
    with pytest.raises(UsageError, match="--arch: there is no guest for loongarch64; choose one"):
        find_architecture(None)
    assert find_architecture("x86_64") is X86_64


def test_some_ram_is_above_4_gib(architecture: Architecture) -> None:
    options, memory_bytes = architecture.with_high_ram(256 * MIB)
    if architecture.low_ram_property is None:
        assert options == ""
        assert architecture.ram_start + memory_bytes == 4 * GIB + 256 * MIB
    else:
        assert options.endswith("=128M")
    assert architecture.with_high_ram(memory_bytes) == (options, memory_bytes)


def test_a_plugged_device_has_a_port_of_its_own() -> None:
    assert AARCH64.hotplug_needs_port
    assert behind_ports(["-chardev", "null,id=a", "-device", "x,id=b", "-device", "y,bus=b.0"]) == [
        *("-chardev", "null,id=a", "-device", "pcie-root-port,id=port-2,chassis=2"),
        *("-device", "x,id=b,bus=port-2", "-device", "y,bus=b.0"),
    ]


def test_a_guest_that_an_architecture_lacks_is_refused_by_every_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("doctor", "prove"):
        assert main([command, "--arch", "riscv64", "--guest", "bare"]) == EXIT_UNTESTED
        assert "this guest does not exist for riscv64; use --guest linux" in capsys.readouterr().err


def test_a_device_that_a_machine_lacks_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prove", "--arch", "s390x"]) == EXIT_UNTESTED
    message = "--device blk: QEMU does not have or does not migrate this device on s390x; use --dev"
    assert message in capsys.readouterr().err
