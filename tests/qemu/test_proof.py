"""The proof on the system's QEMU: it passes, and fails when a fault is injected."""

from __future__ import annotations

from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dmaproof.faults.fault import uniform
from support.command import Outcome, Tool


def prove(tool: Tool, *arguments: str) -> Outcome:
    outcome = tool.run("prove", "--json", "-", *arguments)
    assert not tool.leftovers(), "the run's folder was left behind"
    return outcome


def passed(outcome: Outcome) -> dict[str, Any]:
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["verdict"].startswith("all pages are equal")
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["guest"]["requests"] >= 1000
    assert report["guest"]["rechecked"] > 8192
    return report


def mapped(report: dict[str, Any]) -> dict[str, int]:
    """Return the number of pages of each class in the map, counted from its runs."""
    names = [kind["name"] for kind in report["ram_map"]["classes"]]
    counts = dict.fromkeys(names, 0)
    for area in report["ram_map"]["areas"]:
        assert sum(pages for _, pages in area["runs"]) == area["pages"]
        for kind, pages in area["runs"]:
            counts[names[kind]] += pages
    assert sum(counts.values()) == report["pages"]
    return counts


def harvested_and_merged(report: dict[str, Any]) -> tuple[int, int]:
    """Return the pages of all harvests, and those merged; the passes must have the same sums."""
    migration = report["migration"]
    harvested = sum(harvest["pages"] for harvest in migration["harvests"])
    merged = sum(harvest["merged_pages"] for harvest in migration["harvests"])
    assert sum(precopy_pass["harvested_pages"] for precopy_pass in migration["passes"]) == harvested
    assert sum(precopy_pass["merged_pages"] for precopy_pass in migration["passes"]) == merged
    return harvested, merged


def test_every_page_survives(tool: Tool) -> None:
    report = passed(prove(tool, "--control", "--max-downtime", "3000"))
    sensitivity = report["sensitivity"]
    assert sensitivity["guaranteed_detectable"] >= 8000
    assert sensitivity["reported_unwritten"] == 0
    assert sensitivity["unreported"] == 0
    assert mapped(report)["late"] == sensitivity["rewritten"]
    assert mapped(report)["lost"] == 0
    harvested, merged = harvested_and_merged(report)
    assert harvested == merged >= sensitivity["written"]
    migration = report["migration"]
    assert migration["passes"][-1]["sync"] == migration["syncs"]
    parts = sum(part["seconds"] for part in migration["downtime_parts"])
    # QEMU's own figure is in whole milliseconds.
    assert parts == pytest.approx(migration["downtime_s"], abs=0.002)
    whole = report["downtime"]
    assert whole["parts"][:-1] == migration["downtime_parts"]
    assert whole["parts"][-1]["what"].startswith("the destination loads")
    control = report["control"]
    assert control["caught"] is True
    assert control["exit_code"] == 1
    assert all(page["link"] == "log" for page in control["lost_pages"])


ATTEMPTS = 3
"""Without help from the guest, a hold ends if the host stops dmaproof for 0.4 s."""


def test_a_proof_waits_for_a_guest_that_gets_almost_no_cpu_time(tool: Tool, tmp_path: Path) -> None:
    # At a million instructions a second, the guest dirties too little to hold a migration.
    slow = tmp_path / "slow-qemu"
    slow.write_text('#!/bin/sh\nexec qemu-system-x86_64 -icount shift=10,sleep=on "$@"\n')
    slow.chmod(0o755)
    arguments = ("--guest", "bare", "--accel", "tcg", "--memory", "131080K", "--qemu", str(slow))
    for _ in range(ATTEMPTS):
        outcome = prove(tool, *arguments, "--workload", "write_once=256,churn=64,hot=64")
        if "although dmaproof tried to hold it" not in outcome.report["verdict"]:
            break  # else the host gave dmaproof no CPU time for several portions of the stream
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 256
    assert "-qtest" in outcome.report["commands"]["source QEMU"]


@pytest.mark.parametrize("harvest", ["immediate", "final", "0.05"])
def test_every_harvest_is_in_time(tool: Tool, harvest: str) -> None:
    passed(prove(tool, "--guest", "bare", "--harvest", harvest))


@pytest.mark.usefixtures("much_memory")
def test_ram_above_four_gigabytes_over_tcp(tool: Tool) -> None:
    # 5 GiB and 8 KiB: see the facts on RAM sizes in docs/guests.md.
    report = passed(prove(tool, "--memory", "5242888K", "--scenario", "tcp"))
    assert report["pages"] == (5242888 << 10) // 4096


def test_lost_pages_are_exactly_the_dropped_ones(tool: Tool, tmp_path: Path) -> None:
    files = {form: tmp_path / form for form in ("report", "junit", "tap")}
    options = [word for form, file in files.items() for word in (f"--{form}", str(file))]
    outcome = prove(tool, "--fault", "drop-pages=0.01", "--seed", "7", *options)
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    lost = report["lost_pages"]
    assert 40 < len(lost) <= report["sensitivity"]["unreported"]
    # Both directions: lost pages were dropped, and dropped guaranteed detectable ones are lost.
    pages = np.array([page["gpa"] // 4096 for page in lost], dtype=np.uint64)
    assert (uniform(pages, 7) < 0.01).all()
    assert all(page["blame"] == "device" for page in lost)
    assert len(lost) >= report["sensitivity"]["unreported_guaranteed"]
    assert report["sensitivity"]["missed_at"] == {"log": report["sensitivity"]["unreported"]}
    assert report["guest"]["errors"] > 0
    assert mapped(report)["lost"] == len(lost)
    harvested, merged = harvested_and_merged(report)
    assert harvested - merged >= len(lost)
    assert report["verdict"] in unescape(files["report"].read_text())
    suite = ElementTree.parse(files["junit"]).getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("3", "0")
    assert lost[0]["story"] in files["tap"].read_text()
    story = lost[0]
    assert story["link"] == "log"
    assert story["last_seen_in_harvest"]["translation"] >= story["due_in_harvest"]
    assert story["last_seen_in_harvest"]["log"] < story["due_in_harvest"]


def test_a_guest_that_may_not_survive_still_gets_a_verdict(tool: Tool) -> None:
    # All pages are dropped. The guest may not survive that, but there must be a verdict.
    outcome = prove(tool, "--guest", "bare", "--fault", "drop-pages=1")
    assert outcome.exit_code == 1, outcome.errors
    assert len(outcome.report["lost_pages"]) >= 8000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "expected a number with K, M or G, such as 512M, got 'lots'"),
        (["--machine", "q35,memory-backend=x"], "dmaproof itself sets memory-backend; "),
        (["--machine", "q35,hpet=off,smp.cpus=4"], "dmaproof itself sets smp.cpus; use --cpus"),
        (["--qemu", "qemu-system-i386"], "emulates i386, but the guest is for x86_64; choose a "),
        (["--memory", "4K"], "at least 64M"),
        (["--qemu", "/no/such/qemu"], "--qemu /no/such/qemu"),
        (["--machine", "toaster", "--qemu-destination", "/bin/sh"], "sh"),
        (["--fault", "gremlins=1"], "fault 'gremlins'"),
        (["--fault", "drop-pages=7"], "drop-pages=7"),
        (["--fault", "old-memory-table"], "can be detected only with memory hotplug"),
        (["--iommu", "intel-lazy", "--guest", "bare"], "use --guest linux"),
        (["--iommu", "intel", "--machine", "pc"], "only q35 machines have this IOMMU"),
        (["--fault", "ignore-overflow", "--tracker", "iommu"], "only with --tracker address-queue"),
        (["--downtime-limit", "0"], "--downtime-limit"),
    ],
)
def test_wrong_usage_is_reported(tool: Tool, arguments: list[str], message: str) -> None:
    outcome = prove(tool, *arguments)
    assert outcome.exit_code in (2, 3)
    assert message in outcome.errors
    assert "Traceback" not in outcome.errors


def test_a_migration_that_takes_too_long_is_untested(tool: Tool, tmp_path: Path) -> None:
    # The bare guest is ready immediately, also on a busy machine.
    options = ("--guest", "bare", "--bandwidth", "1M", "--timeout", "2")
    outcome = prove(tool, *options, "--tap", str(tmp_path / "tap"))
    assert outcome.exit_code == 3
    assert "has not completed within 2 s" in outcome.errors
    assert outcome.report["kind"] == "prove-untested"
    assert "has not completed within 2 s" in outcome.report["verdict"]
    assert "not ok 1" in (tmp_path / "tap").read_text()
