"""`dmaproof watch` and `dmaproof dirty-rate` on QEMUs that the test starts itself."""

from __future__ import annotations

import json
import time

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.bare import probe_guest
from qmp_tools.migration.dirty_rate import VhostLogMeter
from qmp_tools.qemu.choice import find_qemu
from support.command import Tool
from support.foreign_pair import PROBE_OUTPUT, Pair, foreign_pair


def busy_guest() -> list[str]:
    """Return the arguments of a guest whose vCPU dirties 64 pages for ever, which any QEMU sees."""
    return ["-machine", "q35", "-m", "65544K", "-kernel", str(probe_guest(X86_64)), *PROBE_OUTPUT]


def slow_down(pair: Pair) -> None:
    pair.monitors[0].execute("migrate-set-parameters", max_bandwidth=1 << 20, downtime_limit=1)


def test_a_migration_is_followed_to_its_end(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p")
    with foreign_pair(find_qemu(None), folder, busy_guest()) as pair:
        pair.wait_for_output("ready")
        slow_down(pair)
        running = tool.start("watch", str(pair.source), "--interval", "0.1")
        running.wait_for_line("no migration yet")
        pair.begin_to_migrate()
        running.wait_for(lambda: "".join(running.output).count(", end ") > 5, "six ends reckoned")
        pair.monitors[0].execute(
            "migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=500
        )
        outcome = running.finish()
    assert outcome.exit_code == 0, outcome.errors
    lines = outcome.output.splitlines()
    assert sum(line.startswith("active") for line in lines) > 5
    assert any("remaining" in line and "bandwidth" in line for line in lines)
    assert any("dirty rate" in line and ", end " in line for line in lines)
    assert lines[-1].startswith("completed")
    assert "downtime" in lines[-1]


def test_a_cancelled_migration_is_not_a_success(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p")
    with foreign_pair(find_qemu(None), folder, busy_guest()) as pair:
        pair.wait_for_output("ready")
        slow_down(pair)
        pair.begin_to_migrate()
        running = tool.start("watch", str(pair.source), "--interval", "0.1")
        running.wait_for(lambda: "active" in "".join(running.output), "an active migration")
        pair.monitors[0].execute("migrate_cancel")
        outcome = running.finish()
    assert outcome.exit_code == 3
    assert "the migration cancelled" in outcome.errors


def test_the_rate_of_a_guest_without_devices(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("p")
    with foreign_pair(find_qemu(None), folder, busy_guest()) as pair:
        pair.wait_for_output("ready")
        outcome = tool.run("dirty-rate", str(pair.source), "--json")
        assert outcome.exit_code == 0, outcome.errors
        rates = json.loads(outcome.output)
        assert rates["mode"] == "page-sampling"
        assert rates["devices_bytes_per_s"] is None
        text = tool.run("dirty-rate", str(pair.source)).output
        assert "not measured: QEMU has a vhost log only" in text
        # In this mode, QEMU 7.2 would end, and its guest too.
        refused = tool.run("dirty-rate", str(pair.source), "--mode", "dirty-bitmap")
        assert refused.exit_code == 2
        assert "this guest runs without KVM" in refused.errors
        assert pair.monitors[0].execute("query-status")["running"] is True


def test_the_devices_log_is_found_in_qemu(tool: Tool) -> None:
    """The log of dmaproof's own device fills while the migration runs, and is only read."""
    running = tool.start("prove", "--bandwidth", "32M")
    running.wait_for_line("migration active")
    meter = VhostLogMeter(running.children()["source"], "source QEMU")
    # Until QEMU has cleared the log once, the same hot pages may stay dirty.
    while not any(line.startswith("comparing") for line in running.errors):
        assert running.process.poll() is None, "".join(running.errors)
        meter.read()
        time.sleep(0.02)
    outcome = running.finish()
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    assert meter.seconds > 0.5
    assert meter.bytes_per_s
