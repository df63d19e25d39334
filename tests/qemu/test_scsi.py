"""Third-party vhost-user-scsi targets, and the vhost-user devices that QEMU does not migrate."""

from __future__ import annotations

import sys
from pathlib import Path

from support.command import Tool
from support.recipes import BRIEF, assert_passed, newest_qemu, recipe

ROOT = Path(__file__).parents[2]
DEVICE = f"scsi by {Path(sys.executable).name}"


def scsi_recipe(fault: str = "") -> list[str]:
    """Return the recipe of the target, with its own paths and a `fault`, for a short proof."""
    arguments = recipe(".venv/bin/python")
    at = arguments.index("--device-command") + 1
    _, target, *words = arguments[at].split()
    arguments[at] = " ".join([sys.executable, str(ROOT / target), *words, fault])
    return [*arguments, *BRIEF]


def test_a_scsi_target_passes(tool: Tool) -> None:
    outcome = tool.run(*scsi_recipe())
    assert_passed(outcome, DEVICE)
    assert tool.leftovers() == []


def test_a_scsi_target_logs_its_request_rings(tool: Tool) -> None:
    qemu = ("--qemu", str(newest_qemu().path))
    outcome = tool.run(*scsi_recipe(), *qemu)
    assert_passed(outcome, DEVICE)
    log = outcome.report["log"]
    assert log["judged_queues"]
    assert set(log["judged_queues"]) <= {2, 3}  # 0 and 1 are the control and the event queue
    assert log["unlogged_queues"] == log["late_bits"] == []


def test_a_page_that_a_scsi_target_loses_is_detected(tool: Tool) -> None:
    outcome = tool.run(*scsi_recipe("drop-pages=0.05"))
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    report = outcome.report
    assert "cause unknown" in report["verdict"]
    assert len(report["lost_pages"]) == report["lost"]["unknown"] > 20
    assert report["guest"]["errors"] > 20
