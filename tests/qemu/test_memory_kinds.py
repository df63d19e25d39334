"""Proofs of guests whose RAM is in every kind of memory, on the newest QEMU that is installed."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AbstractContextManager
from typing import Any, Final

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.migration.attempt import Attempt
from qmp_tools.migration.scenarios.cpr import IgnoreShared
from qmp_tools.proof.model import Proof
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve
from qmp_tools.proof.run import prove as prove_setup
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu
from qmp_tools.qemu.machine import MIB
from support.command import Outcome, Tool
from support.huge_pages import reserved

SIDE_BYTES: Final = 128 * MIB
HUGE_PAGES: Final = {"hugetlb-2M": 2 * SIDE_BYTES // (2 * MIB), "hugetlb-1G": 2}
"""How many huge pages both sides need."""
FAULT: Final = ("--fault", "drop-pages=0.01")
ON_DISK: Final = "file:/var/tmp"
IN_RAM: Final = "file:/dev/shm"


def newest_qemu() -> str:
    builds = installed(X86_64)
    return str(builds[-1].path if builds else find_qemu(None))


def prove(tool: Tool, *options: str) -> Outcome:
    outcome = tool.run(
        "prove", "--guest", "bare", "--qemu", newest_qemu(), "--quiet", "--json", "-", *options
    )
    assert not tool.leftovers(), "the run's folder was left behind"
    return outcome


def require_pass(outcome: Outcome) -> None:
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["sensitivity"]["guaranteed_detectable"] >= 8000


def require_detected(outcome: Outcome) -> None:
    report = outcome.report
    assert outcome.exit_code == 1, report["verdict"]
    assert report["lost"]["device"] == len(report["lost_pages"]) > 0


def late_pages(report: dict[str, Any]) -> dict[str, int]:
    """Return how many pages of each RAM block the device wrote after QEMU had sent them."""
    names = [kind["name"] for kind in report["ram_map"]["classes"]]
    return {
        area["region"]: sum(pages for kind, pages in area["runs"] if names[kind] == "late")
        for area in report["ram_map"]["areas"]
    }


def prerequisites(kind: str) -> AbstractContextManager[None]:
    if kind in HUGE_PAGES:
        return reserved(kind, HUGE_PAGES[kind])
    return contextlib.nullcontext()


@pytest.mark.parametrize("kind", [IN_RAM, ON_DISK, "ram", *HUGE_PAGES])
def test_a_kind_of_memory_passes_and_fails_with_a_fault(
    tool: Tool, kind: str, much_memory: None
) -> None:
    with prerequisites(kind):
        outcome = prove(tool, "--memory-backend", kind)
        if kind == "ram" and outcome.exit_code == 3:
            assert outcome.report["unsupported"]
            assert "keeps this memory in no file" in outcome.report["verdict"]
            return
        require_pass(outcome)
        assert outcome.report["setup"]["memory_backend"] == kind
        require_detected(prove(tool, "--memory-backend", kind, *FAULT))


def test_every_numa_node_has_pages_that_would_be_missed(tool: Tool) -> None:
    outcome = prove(tool, "--numa", "2")
    require_pass(outcome)
    found = late_pages(outcome.report)
    assert found.keys() == {"ram0", "ram1"}
    assert all(pages > 1000 for pages in found.values())
    require_detected(prove(tool, "--numa", "2", *FAULT))


def test_a_device_writes_into_an_nvdimm(tool: Tool) -> None:
    outcome = prove(tool, "--scenario", "nvdimm")
    require_pass(outcome)
    assert late_pages(outcome.report)["nvdimm-ram"] > 4096
    require_detected(prove(tool, "--scenario", "nvdimm", *FAULT))


@pytest.mark.parametrize("scenario", ["postcopy", "postcopy-running"])
def test_huge_pages_arrive_in_postcopy(tool: Tool, scenario: str, much_memory: None) -> None:
    kind = "hugetlb-2M"
    with prerequisites(kind):
        options = ("--memory-backend", kind, "--scenario", scenario)
        require_pass(prove(tool, *options))
        faulty = prove(tool, *options, *FAULT)
    # A huge page arrives whole if any of its bits is set, so that a lost bit may lose no page.
    assert faulty.exit_code == 1, faulty.report["verdict"]
    assert faulty.report["sensitivity"]["unreported"] > 50
    assert faulty.report["lost"]["device"] == len(faulty.report["lost_pages"])


def test_qemu_refuses_postcopy_of_a_file_that_is_not_in_memory(tool: Tool) -> None:
    outcome = prove(tool, "--memory-backend", ON_DISK, "--scenario", "postcopy")
    assert outcome.exit_code == 3
    assert outcome.report["unsupported"]
    assert "Host backend files need to be TMPFS or HUGETLBFS only" in outcome.report["verdict"]


HINTS: Final = "free-page-hint"


@pytest.mark.parametrize("scenario", ["virtio-mem", "balloon", "free-page-reporting", HINTS])
def test_a_guest_that_gives_memory_back_passes_and_fails_with_a_fault(
    tool: Tool, scenario: str
) -> None:
    options = ("--guest", "linux", "--scenario", scenario)
    outcome = prove(tool, *options)
    require_pass(outcome)
    given_back = outcome.report["given_back_pages"]
    assert (given_back > 4096) is scenario.startswith("free-page-")
    reason = "the guest says are free" if scenario == HINTS else "the guest gave them back"
    assert (reason in outcome.report["verdict"]) is bool(given_back)
    require_detected(prove(tool, *options, *FAULT))


def test_ram_in_a_common_file_is_checked_by_the_guest(
    monkeypatch: pytest.MonkeyPatch, tool: Tool
) -> None:
    require_pass(prove(tool, "--scenario", "ignore-shared"))
    migrate = IgnoreShared.migrate

    async def migrate_and_damage(self: IgnoreShared, attempt: Attempt) -> None:
        await migrate(self, attempt)
        with (attempt.pair.folder / "ram").open("r+b") as file:
            file.seek(SIDE_BYTES // 2)
            file.write(bytes(SIDE_BYTES // 8))

    monkeypatch.setattr(IgnoreShared, "migrate", migrate_and_damage)
    options = ProofOptions(guest="bare", scenario="ignore-shared", qemu=newest_qemu())
    verdict = asyncio.run(_proof(options)).verdict
    assert (verdict.exit_code, len(verdict.lost)) == (1, 0)
    assert verdict.guest.errors > 100


async def _proof(options: ProofOptions) -> Proof:
    return await prove_setup(await resolve(options))


def test_huge_pages_that_are_not_reserved_are_reported_before_anything_starts(tool: Tool) -> None:
    outcome = prove(tool, "--memory-backend", "hugetlb-2M", "--memory", "1024G")
    assert outcome.exit_code == 3
    assert "reserve them with: echo " in outcome.report["verdict"]
    assert not outcome.report["unsupported"]
