"""The display of query-migrate's answers while a migration is watched."""

from __future__ import annotations

from typing import Any

import pytest

from qmp_tools.migration.migration import parse_progress
from qmp_tools.migration.watch import View

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
