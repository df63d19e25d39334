"""The passthrough proofs in L1, which is built if it is not in the cache."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from qmp_tools.passthrough import virtio_mem
from qmp_tools.passthrough.catalog import GROUPS, SELFTESTS
from qmp_tools.passthrough.migrations import NAMES, UNTRACKED
from qmp_tools.passthrough.tracking import TRACKINGS
from qmp_tools.passthrough.vhost_device import TRACKERS
from support.command import TIMEOUT_S, Tool, is_alive

pytestmark = pytest.mark.timeout(3600)


def test_all_proofs_hold_and_all_controls_are_caught(tool: Tool) -> None:
    outcome = tool.run("passthrough", "--json", "-", "--seed", "1")
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    rows = {(row["group"], row["name"]): row for row in outcome.report["outcomes"]}
    # QEMU 11.1 aborts with these two: docs/qemu-findings.md
    beside = {("migration", name) for _, name in rows if "one in a container" in name}
    beside |= {("migration", name) for _, name in rows if "on iommufd, and type1's log" in name}
    # QEMU 11.1 loses the pages of this control without its fault, too
    beside |= {("migration", virtio_mem.CONTROL)}
    assert len(beside) == 3
    assert {row["state"] for key, row in rows.items() if key not in beside} == {"holds"}
    assert all(rows[key]["state"] == "lacking" for key in beside), "update the finding"
    groups = {group for group, _ in rows}
    assert groups == set(GROUPS) - {SELFTESTS}
    assert rows["differential", "the kernel's iterator and IovaBitmap"]["figures"]["cases"] >= 3000
    figures = {
        name: row["figures"]
        for (kind, name), row in rows.items()
        if kind == "migration" and row["state"] == "holds"
    }
    controls = {name: found for name, found in figures.items() if "control" in name}
    controlled = {name.partition(", control")[0] for name in controls}
    assert controlled >= {name for name, short in NAMES.items() if TRACKINGS[short].device}
    assert controlled >= {
        "two devices: iommufd, device logs",
        "two devices: container, device logs",
        "two devices: one writes after it was stopped",
        "unplugged: one of two devices, container",
        "intel-iommu and type1's log",
        "multifd: iommufd, device log",
        "the device's estimates are too large",
    }
    assert all(found["differing"] > 0 for found in controls.values())
    refused = {name for name, found in figures.items() if "refused" in found}
    assert len(refused) == 5  # four vIOMMUs, and one device without P2P
    mixed = "two devices: a device log on iommufd, and nothing tracks the other"
    only = "unplugged: the only device, container"
    assert figures[only]["removed_pages"] == 2048
    defects = set(virtio_mem.DEFECTS.values())
    # What QEMU does is undefined: docs/qemu-findings.md
    assert all(
        figures[name].get("crashed") or figures[name]["differing"] == 2048 for name in defects
    )
    clean = figures.keys() - controls.keys() - refused - defects - {UNTRACKED, mixed, only}
    assert clean >= NAMES.keys()
    assert all(
        figures[name]["differing"] == 0 and figures[name]["guaranteed_detectable"] > 0
        for name in clean
    )
    whole = {
        f"{kind}: {name}": row["figures"]
        for (kind, name), row in rows.items()
        if kind in ("vhost", "functions") and row["figures"]
    }
    assert [row["group"] for row in outcome.report["outcomes"]] == [
        group for group in GROUPS for kind, _ in rows if kind == group
    ]
    vhost = {name for name in whole if name.startswith("vhost: ")}
    controlled = {name.partition(", control")[0] for name in vhost if "control" in name}
    assert controlled == {f"vhost: {tracker}" for tracker in TRACKERS}
    assert controlled <= vhost
    assert {"functions: iommufd", "functions: container", "functions: iommufd, control: drop"} == (
        whole.keys() - vhost
    )
    for name, found in whole.items():
        assert (found["differing"] > 0) is ("control" in name), name
        assert found["guaranteed_detectable"] > 0 or "control" in name, name
    assert tool.leftovers() == []


def test_the_kernels_selftests_hold(tool: Tool) -> None:
    outcome = tool.run("passthrough", "--only", SELFTESTS, "--json", "-")
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    rows = {row["name"]: row for row in outcome.report["outcomes"]}
    assert {row["state"] for row in rows.values()} == {"holds"}
    figures = {name: row["figures"] for name, row in rows.items()}
    assert figures["iommufd"]["passed"] >= 230
    assert figures["vfio_dma_mapping_test"]["passed"] >= 20
    assert figures["vfio_pci_sriov_uapi_test"]["passed"] >= 40
    assert all(found["skipped"] <= 5 for found in figures.values())
    assert tool.leftovers() == []


def test_qemus_vfio_pci_passes_and_the_controls_lost_pages_are_attributed(tool: Tool) -> None:
    outcome = tool.run("prove", "--device", "vfio-fake", "--control", "--json", "-", "--seed", "1")
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    report = outcome.report
    assert report["sensitivity"]["guaranteed_detectable"] >= 1024
    assert report["sensitivity"]["unreported"] == 0
    assert report["guest"]["rechecked"] > 1024
    control = report["control"]
    assert control["caught"]
    assert control["exit_code"] == 1
    assert 0 < control["lost"]["device"] == len(control["lost_pages"])
    assert control["sensitivity"]["missed_at"] == {"tracker": control["sensitivity"]["unreported"]}
    assert tool.leftovers() == []


def test_the_proofs_are_cells_of_a_matrix_that_continues(tool: Tool, tmp_path: Path) -> None:
    cells = ("--passthrough", "rules: START*", "--passthrough", "states", "--folder", str(tmp_path))
    first = tool.run("matrix", *cells, "--json", "-")
    assert first.exit_code == 0, first.errors[-4000:]
    assert {cell["state"] for cell in first.report["cells"]} == {"clean"}
    assert {cell["options"]["passthrough"].partition(":")[0] for cell in first.report["cells"]} == {
        "rules",
        "states",
    }
    second = tool.run("matrix", *cells, "--json", "-")
    assert all(cell["cached"] for cell in second.report["cells"])
    assert tool.leftovers() == []


def test_a_proof_in_the_nested_machine_is_a_cell_of_a_matrix(tool: Tool, tmp_path: Path) -> None:
    cells = ("--device", "vfio-fake", "--fault", "drop=50", "--folder", str(tmp_path))
    outcome = tool.run("matrix", *cells, "--json", "-")
    assert outcome.exit_code == 1, outcome.errors[-4000:]
    (cell,) = outcome.report["cells"]
    assert (cell["state"], cell["blame"]) == ("lost", ["device"])
    assert tool.leftovers() == []


def test_the_stock_kernel_fails_no_proof_that_it_supports(tool: Tool) -> None:
    groups = ("rules", "states", "differential", "faults", "migration", "functions")
    options = ("--quick", "--json", "-", "--seed", "1", "--only", *groups)
    outcome = tool.run("passthrough", "--kernel", "stock", *options)
    assert outcome.exit_code == 0, outcome.errors[-4000:]
    report = outcome.report
    assert report["kernel"].startswith("6.1.")
    rows = {(row["group"], row["name"]): row for row in report["outcomes"]}
    held = [key for key, row in rows.items() if row["state"] == "holds"]
    assert ("migration", "container, device log") in held
    assert ("migration", "container, device log, control: drop") in held
    assert ("migration", "two devices: container, device logs") in held
    assert ("migration", "two devices: one without P2P") in held
    assert ("migration", "unplugged: one of two devices, container") in held
    assert ("rules", "TYPE1: overwrites the bitmap") in held
    unsupported = {key: row["found"] for key, row in rows.items() if row["state"] == "lacking"}
    assert "/dev/iommu" in unsupported["rules", "HWPT: only sets bits"]
    assert "PRE_COPY" in unsupported["states", "transfer"]
    assert "MIG_DATA_SIZE" in unsupported["functions", "container"]
    assert len(unsupported) + len(held) == len(rows)


def test_the_counted_instructions_are_the_same_on_each_run(tool: Tool) -> None:
    costs = []
    for _ in range(2):
        # From 1 GiB on there are more marks than the device's record of reported ranges can hold.
        outcome = tool.run("bench", "kernel", "--most", "1G", "--json", "-")
        assert outcome.exit_code == 0, outcome.errors[-4000:]
        costs.append({fit["interface"]: fit["costs"] for fit in json.loads(outcome.output)["fits"]})
    first, second = costs
    assert set(first) == {"report", "hwpt", "hwpt, huge entries", "type1"}
    for interface, what in (("report", "range set"), ("hwpt", "entry visited")):
        assert 20 < first[interface][what] < 500
        assert second[interface][what] == pytest.approx(first[interface][what], rel=0.02)


def test_nothing_is_left_when_the_tool_is_killed(tool: Tool) -> None:
    running = tool.start("passthrough", "--quick")
    running.wait_for_line("ok")  # L1 runs, and more proofs follow
    machines = running.machines()
    assert machines
    os.kill(running.process.pid, signal.SIGKILL)
    running.finish()
    wait_until_gone(tool, machines)


def test_if_one_machine_fails_the_other_is_ended(tool: Tool) -> None:
    running = tool.start("passthrough", "--quick")
    running.wait_for_line("ok")
    machines = running.machines()
    assert len(machines) == min(2, len(os.sched_getaffinity(0)))
    os.kill(machines[-1], signal.SIGKILL)
    outcome = running.finish()
    assert outcome.exit_code == 3
    assert "nested machine L1 was killed by SIGKILL before its command ended" in outcome.errors
    wait_until_gone(tool, machines)


def wait_until_gone(tool: Tool, pids: list[int]) -> None:
    """Wait until no process of `pids` is alive and the temporary folder is empty."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(map(is_alive, pids)) or tool.leftovers():
        assert time.monotonic() < deadline, f"{list(map(is_alive, pids))}, {tool.leftovers()}"
        time.sleep(0.05)
