"""The display of query-migrate's answers while a migration is watched."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from qmp_tools.migration.migration import parse_progress
from qmp_tools.migration.watch import SourceEndedError, View, watch
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.qemu.qmp import Monitor, QmpClosedError

MIB = 1 << 20


def view(status: str = "active", limit_s: float | None = 0.5, **ram: Any) -> View:
    named = {name.replace("_", "-"): value for name, value in ram.items()}
    return View(parse_progress({"status": status, "ram": named}), limit_s)


# 80 Mbit/s are ten million bytes a second.
RATE: dict[str, Any] = {"mbps": 80.0, "page_size": 4096}


@pytest.mark.parametrize(
    ("ram", "ends_in"),
    [
        ({"remaining": 15_000_000, **RATE}, "in 1.0 s"),
        ({"remaining": 5_000_000, **RATE}, "at once"),
        ({"remaining": 15_000_000, "dirty_pages_rate": 1000, **RATE}, "in 1.7 s"),
        (
            {"remaining": 15_000_000, "dirty_pages_rate": 2500, **RATE},
            "never: the guest dirties RAM faster",
        ),
        ({"remaining": 15_000_000, "mbps": 0.0}, None),
        ({"mbps": 80.0}, None),
    ],
)
def test_the_end_is_forecast_from_the_rates(ram: dict[str, Any], ends_in: str | None) -> None:
    found = view(**ram).ends_in
    assert found == ends_in or (found is not None and found.startswith(ends_in or "?"))


def test_without_a_downtime_limit_all_must_be_sent() -> None:
    assert view(limit_s=None, remaining=15_000_000, **RATE).ends_in == "in 1.5 s"


def test_the_line_has_only_known_figures() -> None:
    line = view(
        remaining=3 * MIB, transferred=64 * MIB, dirty_sync_count=4, dirty_pages_rate=256, **RATE
    ).line
    assert line == (
        "active, pass 4, sent 64 MiB, remaining 3.0 MiB, bandwidth 9.5 MiB/s, "
        "dirty rate 1.0 MiB/s, end at once"
    )
    assert view("setup").line == "setup"


def test_a_migration_that_has_ended_has_no_forecast() -> None:
    over = View(parse_progress({"status": "completed", "downtime": 12, "ram": RATE}), 0.3)
    assert over.is_over
    assert over.line.endswith("downtime 12 ms")
    assert "end" not in over.columns()
    assert not view("device").is_over


class EndingMonitor(Monitor):
    """The monitor of a QEMU that gives these answers to query-migrate, and ends then."""

    version = "10.0.2"

    def __init__(self, *answers: Mapping[str, Any]) -> None:
        super().__init__("QEMU", 600)
        self.answers = list(answers)

    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "query-migrate-parameters":
            return {}
        if not self.answers:
            raise QmpClosedError("closed")
        return self.answers.pop(0)


async def watched(*answers: Mapping[str, Any]) -> list[str]:
    qemu = Qemu(EndingMonitor(*answers), 0, "/run/qmp")
    return [each.progress.status async for each in watch(qemu, 0.001)]


def test_a_qemu_that_ends_after_it_has_reported_the_end_of_the_migration_is_no_error() -> None:
    # QEMU 7.2 has not calculated the times yet (see Progress.is_over).
    completed = {"status": "completed", "total-time": 0}
    assert asyncio.run(watched({"status": "active"}, completed)) == ["active", "completed"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "QEMU ended before a migration began"),
        ([{}], "QEMU ended before a migration began"),
        ([{"status": "active"}], "QEMU ended while the migration was 'active'"),
        ([{"status": "active"}, {"status": "device"}], "while the migration was 'device'"),
    ],
)
def test_a_qemu_that_ends_earlier_is_reported_with_its_last_status(
    answers: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(SourceEndedError, match=message):
        asyncio.run(watched(*answers))
