"""dmaproof's devices other than the plain disk, each in a proof with a real QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.command import Tool
from support.recipes import prove


def test_packed_rings(tool: Tool) -> None:
    outcome = tool.run("prove", "--ring", "packed", "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["setup"]["ring"] == "packed"
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["sensitivity"]["guaranteed_detectable"] >= 8000


def test_the_device_must_report_its_writes_to_a_packed_ring(tool: Tool) -> None:
    options = ("--ring", "packed", "--guest", "bare", "--fault", "used-ring-unlogged")
    outcome = tool.run("prove", *options, "--json", "-")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    # The pages of the descriptor ring and of the event suppression structure of each of two queues.
    # They may all be equal: the driver writes to the former, and QEMU dirties the latter.
    assert outcome.report["sensitivity"]["missed_at"] == {"tracker": 4}


def test_a_disk_in_a_file(tool: Tool, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    outcome = tool.run("prove", "--guest", "bare", "--device", f"blk:file={disk}", "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    with disk.open("rb") as content:
        content.seek(-256 * 4096, os.SEEK_END)  # where guests write their blocks
        blocks = content.read()
    written = [blocks[start : start + 8] == b"WRITENTF" for start in range(0, len(blocks), 4096)]
    assert sum(written) > 200


@pytest.mark.parametrize(("ring", "guest"), [("split", "bare"), ("packed", "linux")])
def test_a_device_that_is_killed_loses_nothing(tool: Tool, ring: str, guest: str) -> None:
    options = ("--ring", ring, "--guest", guest)
    outcome = tool.run("prove", "--kill-device", *options, "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["lost_pages"] == []
    assert outcome.report["guest"]["errors"] == 0
    assert outcome.report["setup"]["killed"] is True


@pytest.mark.parametrize("options", [(), ("--ring", "packed", "--kill-device")])
def test_a_device_that_is_killed_on_the_destination_loses_nothing(
    tool: Tool, options: tuple[str, ...]
) -> None:
    outcome = prove(tool, "--guest", "bare", "--kill-destination-device", *options)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert report["setup"]["destination_killed"] is True
    assert report["setup"]["killed"] is ("--kill-device" in options)
    assert report["lost_pages"] == []
    assert report["guest"]["errors"] == 0
    assert report["guest"]["awaiting_restart"] > 0
    assert report["guest"]["requests"] >= 1000
    assert tool.leftovers() == []


def test_pages_that_a_killed_device_forgets_are_lost(tool: Tool) -> None:
    outcome = tool.run("prove", "--fault", "forgotten-at-restart", "--guest", "bare", "--json", "-")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    lost = outcome.report["lost_pages"]
    assert lost
    assert {(page["blame"], page["link"]) for page in lost} == {("device", "tracker")}


def test_a_disk_and_a_network_share_a_log(tool: Tool) -> None:
    outcome = tool.run("prove", "--device", "blk", "--device", "net", "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert outcome.report["setup"]["device"] == "blk, net"
    assert outcome.report["lost_pages"] == []
    assert outcome.report["guest"]["errors"] == 0
    assert outcome.report["sensitivity"]["unreported"] == 0


def test_each_of_two_devices_is_blamed_for_its_own_pages(tool: Tool) -> None:
    fault = ("--fault", "drop-pages=0.1")
    outcome = tool.run("prove", "--device", "blk", "--device", "net", *fault, "--json", "-")
    assert outcome.exit_code == 1, outcome.output + outcome.errors
    # A network driver also writes to its receive buffers, so most lost pages are the disk's.
    lost = outcome.report["lost_pages"]
    assert {page["link"] for page in lost} == {"log"}
    assert "blk" in {page["device"] for page in lost}
    missed = outcome.report["sensitivity"]["missed_by"]
    assert missed.keys() == {"blk", "net"}
    assert missed["blk"] > 500


def test_qemu_does_not_migrate_an_entropy_device(tool: Tool) -> None:
    outcome = tool.run("prove", "--device", "blk", "--device", "rng", "--guest", "bare")
    assert outcome.exit_code == 3
    assert "vhost-user-rng" in outcome.errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "net"), "workload needs a disk"),
        (("--device", "blk", "--device", "net", "--guest", "bare"), "no driver for blk, net"),
        (("--device", "blk", "--device", "net", "--kill-device"), "cannot be killed"),
        (("--device", "blk:colour=red"), "no option 'colour'"),
    ],
)
def test_wrong_usage_is_reported(tool: Tool, arguments: tuple[str, ...], message: str) -> None:
    outcome = tool.run("prove", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.errors
