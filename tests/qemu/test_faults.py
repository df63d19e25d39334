"""Injected faults on a real QEMU, one for each means by which faults are caught."""

from __future__ import annotations

from typing import Any

import pytest

from support.command import Tool


def trial(tool: Tool, fault: str) -> dict[str, Any]:
    """Return the only trial of a fault, which must have the expected result."""
    outcome = tool.run("faults", "--on", "qemu", "--only", fault, "--json", "-", "--quiet")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert not tool.leftovers()
    (row,) = outcome.report["faults"]
    assert row["as_wanted"]
    (only,) = row["trials"]
    assert isinstance(only, dict)
    return only


def test_without_a_fault_there_is_no_alarm(tool: Tool) -> None:
    assert trial(tool, "none")["caught_by"] == []


@pytest.mark.parametrize(
    "fault", ["late-final-flush", "forget-high-slot", "off-by-one-end", "log-forgotten-at-reset"]
)
def test_lost_pages_are_found_by_the_comparison_and_by_the_journal(tool: Tool, fault: str) -> None:
    found = trial(tool, fault)
    assert {"comparison", "journal"} <= set(found["caught_by"])
    assert found["lost_pages"] > 100


@pytest.mark.parametrize("fault", ["used-ring-unlogged", "status-unlogged"])
def test_unreported_pages_that_qemu_sends_anyway_are_found_by_the_journal(
    tool: Tool, fault: str
) -> None:
    found = trial(tool, fault)
    assert "journal" in found["caught_by"]
    assert set(found["links"]) == {"tracker"}


def test_a_wrong_index_is_found_at_its_ring(tool: Tool) -> None:
    found = trial(tool, "index-kept-at-reset")
    assert (found["caught_by"], found["links"]) == (["ring"], {})
