"""Every migration scenario on the system's QEMU passes, or is reported as unsupported."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from outside import install_outside_package
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.host.timeout import DEFAULT_TIMEOUT_S
from qmp_tools.migration.scenarios import find_scenario, known_scenarios
from qmp_tools.migration.scenarios.resets import GuestReboot, MachineReset
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu
from qmp_tools.qemu.machine import DIMM_BYTES, GIB
from qmp_tools.qemu.qemu import idle_qemu
from support.command import Outcome, Tool

SCENARIOS = {name: find_scenario(name) for name in known_scenarios()}


def prove(tool: Tool, scenario: str, *arguments: str) -> Outcome:
    needs_linux = scenario in SCENARIOS and SCENARIOS[scenario].linux_needs
    guest = "linux" if needs_linux else "bare"
    outcome = tool.run("prove", "--guest", guest, "--json", "-", "--scenario", scenario, *arguments)
    assert not tool.leftovers(), "the run's folder was left behind"
    return outcome


@pytest.fixture(scope="module")
def known_settings() -> set[str]:
    """Return the migration capabilities and parameters that the system's QEMU reports."""
    return asyncio.run(_ask())


async def _ask() -> set[str]:
    async with idle_qemu("idle", find_qemu(None), timeout_s=DEFAULT_TIMEOUT_S) as qemu:
        answer: list[dict[str, Any]] = await qemu.qmp.execute("query-migrate-capabilities")
        parameters: dict[str, Any] = await qemu.qmp.execute("query-migrate-parameters")
        return {capability["capability"] for capability in answer} | parameters.keys()


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_passes_or_is_reported_as_unsupported(
    tool: Tool, known_settings: set[str], name: str
) -> None:
    outcome = prove(tool, name)
    if name == "multifd-zlib" and "Unable to write to socket: Broken pipe" in outcome.errors:
        outcome = prove(tool, name)  # QEMU 7.2 fails now and then (docs/scenarios.md)
    report = outcome.report
    scenario = SCENARIOS[name]
    missing = {*scenario.capabilities, *scenario.parameters} - known_settings
    if name == "background-snapshot":
        assert "a device outside QEMU" in report["verdict"]
        if outcome.exit_code == 3:  # this QEMU cannot load the snapshot
            assert report["unsupported"]
        else:
            assert report["lost"]["snapshot"] == len(report["lost_pages"]) > 0
            assert "does not hold back the writes" in report["verdict"]
        return
    if "mode" in scenario.parameters and report.get("unsupported"):
        # QEMU 7.2 has neither option. QEMU 10.0 has aux-ram-share, but only mode cpr-transfer.
        is_cpr = bool(scenario.added.machine_options)
        newer = ("aux-ram-share", "cpr-exec-command") if is_cpr else ("'mode'",)
        assert any(option in report["verdict"] for option in newer), report["verdict"]
        return
    if missing:
        assert (outcome.exit_code, report["unsupported"], report["scenario"]) == (3, True, name)
        assert any(word in report["verdict"] for word in missing)
        return
    if name == "vsock" and outcome.exit_code == 3:
        assert "sudo modprobe vsock_loopback" in report["verdict"]
        return
    if name == "postcopy-multifd" and outcome.exit_code == 3:  # docs/qemu-findings.md
        assert "yank_unregister_instance" in outcome.errors or report["unsupported"]
        return
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert report["setup"]["scenario"] == name
    # A guest that reboots uses the other half of its write-once pages afterwards.
    least = 4000 if isinstance(scenario, GuestReboot | MachineReset) else 8000
    assert [migration["guaranteed_detectable"] >= least for migration in report["migrations"]] == [
        True
    ] * scenario.migrations


def test_plugged_memory_is_compared_too(tool: Tool) -> None:
    outcome = prove(tool, "memory-hotplug", "--fault", "forget-high-slot")
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    assert len(report["migrations"]) == 1
    (dimm,) = [area for area in report["ram_map"]["areas"] if area["region"] == "dimm0-ram"]
    assert dimm["pages"] == DIMM_BYTES // 4096
    inside = range(dimm["gpa"], dimm["gpa"] + DIMM_BYTES)
    assert sum(page["gpa"] in inside for page in report["lost_pages"]) >= 7000
    assert all(page["link"] == "log" for page in report["lost_pages"])


def test_a_user_can_add_capabilities_and_parameters(tool: Tool) -> None:
    added = (
        *("--capability", "pause-before-switchover", "--capability", "multifd"),
        *("--parameter", "multifd-channels=3", "--parameter", "multifd-compression=zlib"),
    )
    outcome = prove(tool, "unix", *added)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    setup = outcome.report["setup"]
    assert setup["capabilities"] == ["pause-before-switchover", "multifd"]
    assert setup["parameters"] == {"multifd-channels": 3, "multifd-compression": "zlib"}
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 8000


def test_a_setting_that_qemu_refuses_is_unsupported(tool: Tool) -> None:
    for setting in (("--capability", "time-travel"), ("--parameter", "multifd-channels=many")):
        outcome = prove(tool, "unix", *setting)
        assert (outcome.exit_code, outcome.report["unsupported"]) == (3, True)
        assert setting[1].partition("=")[0] in outcome.report["verdict"]


RESETS = [name for name, scenario in SCENARIOS.items() if scenario.resets]


@pytest.mark.parametrize("name", RESETS)
def test_linux_survives_resets(tool: Tool, name: str) -> None:
    outcome = tool.run("prove", "--scenario", name, "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 4000
    resets = outcome.errors.count(", before the migration") + outcome.errors.count(
        ", during precopy"
    )
    assert (resets, outcome.errors.count(", on the destination")) == (2, 1)


@pytest.mark.parametrize("name", RESETS)
def test_a_ring_index_that_counts_on_over_a_reset_is_found(tool: Tool, name: str) -> None:
    outcome = prove(tool, name, "--fault", "index-kept-at-reset")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    assert "the device answered GET_VRING_BASE with" in outcome.report["verdict"]
    assert "too high" in outcome.report["verdict"]


@pytest.mark.parametrize("name", ["background-snapshot", "device-hotplug", *RESETS])
def test_a_device_inside_qemu_passes(tool: Tool, name: str) -> None:
    outcome = prove(tool, name, "--device", "qemu:virtio-blk-pci")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["rewritten"] > 0


def test_the_write_once_pages_of_a_device_inside_qemu_arrive_in_postcopy(tool: Tool) -> None:
    outcome = prove(tool, "postcopy", "--device", "qemu:virtio-blk-pci")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["rewritten"] > 0


def test_a_running_destination_needs_a_journal(tool: Tool) -> None:
    outcome = prove(tool, "postcopy-running", "--device", "qemu:virtio-blk-pci")
    assert outcome.exit_code == 2
    assert "use --scenario postcopy" in outcome.errors


def test_linux_uses_plugged_memory(tool: Tool) -> None:
    if not installed(X86_64):
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1")
    newest = str(installed(X86_64)[-1].path)
    outcome = tool.run("prove", "--scenario", "memory-hotplug", "--qemu", newest, "--json", "-")
    assert "8192 write-once pages are in plugged memory" in outcome.errors
    report = outcome.report
    assert report["sensitivity"]["guaranteed_detectable"] >= 8192
    assert report["sensitivity"]["unreported"] == 0
    if report["lost_pages"]:  # QEMU is known to lose only what vCPUs write to a DIMM
        assert "(a probe lost " in outcome.errors
        assert report["lost"]["accelerator"] == len(report["lost_pages"])
        assert min(page["gpa"] for page in report["lost_pages"]) >= 4 * GIB
        return
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert len(report["migrations"]) == 2


def test_a_machine_that_takes_no_disk_is_reported(tool: Tool) -> None:
    outcome = prove(tool, "device-hotplug", "--machine", "q35")
    assert outcome.exit_code == 3
    assert "does not support hotplugging" in outcome.errors


@pytest.mark.parametrize("newer", [False, True], ids=["", "hidden by QEMU"])
def test_a_destination_with_fewer_features_is_refused(tool: Tool, newer: bool) -> None:
    if newer and not installed(X86_64):
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1")
    destination = str(installed(X86_64)[-1].path if newer else find_qemu(None))
    outcome = prove(
        tool,
        "unix",
        *("--machine", "pc", "--qemu-destination", destination),
        *("--destination-lacks", "event-idx"),
    )
    assert (outcome.exit_code, outcome.report["unsupported"]) == (3, True)
    assert "the guest uses VIRTIO_F_EVENT_IDX (29)" in outcome.report["verdict"]


@pytest.mark.parametrize("name", ["multifd-4", "exec", "mapped-ram", "destination-killed-late"])
def test_an_injected_fault_is_caught(tool: Tool, known_settings: set[str], name: str) -> None:
    newer = []
    if not set(SCENARIOS[name].capabilities) <= known_settings:
        if not installed(X86_64):
            pytest.skip(f"this QEMU does not support {name}: dmaproof qemu fetch 11.1")
        newer = ["--qemu", str(installed(X86_64)[-1].path)]
    outcome = prove(tool, name, "--fault", "drop-pages=0.01", *newer)
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    assert len(report["lost_pages"]) >= report["sensitivity"]["unreported_guaranteed"] > 40
    assert all(page["blame"] == "device" for page in report["lost_pages"])


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dmaproof find the outside package."""
    install_outside_package(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("outside")
def test_a_scenario_of_another_package_is_proved_like_a_built_in_one(tool: Tool) -> None:
    outcome = prove(tool, "four-channels")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["setup"]["scenario"] == "four-channels"
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 8000


@pytest.mark.usefixtures("outside")
def test_a_device_of_another_package_is_proved_like_a_built_in_one(tool: Tool) -> None:
    outcome = prove(tool, "unix", "--device", "stamped-disk")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["setup"]["device"] == "stamped-disk"


@pytest.mark.usefixtures("outside")
def test_a_kind_of_device_of_another_package_is_proved_like_a_built_in_one(tool: Tool) -> None:
    outcome = prove(tool, "unix", "--device", "plain-disk")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["setup"]["device"] == "plain-disk"
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 8000
