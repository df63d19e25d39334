"""The parts of a downtime, as far as QEMU reports them."""

from __future__ import annotations

import numpy as np
import pytest

from dmaproof.evidence import HARVEST
from qmp_tools.migration.downtime import measure_downtime

MS = 1_000_000
NONE = np.empty(0, dtype=HARVEST)
STOPPED, HANDED_OVER, COMPLETED, LOADED = 600 * MS, 700 * MS, 1000 * MS, 1250 * MS
EVENTS = {"STOP": STOPPED, "device": HANDED_OVER, "completed": COMPLETED}
WITHOUT_DEVICE = {"STOP": STOPPED, "completed": COMPLETED}


def milliseconds(
    moments: dict[str, int], reported_s: float | None, loading_ns: tuple[int, int] | None
) -> list[float]:
    downtime = measure_downtime(moments, NONE, reported_s, loading_ns, None)
    return [part.seconds * 1000 for part in downtime.parts]


def test_the_loading_on_the_destination_is_part_of_the_downtime() -> None:
    assert milliseconds(EVENTS, 0.9, (0, LOADED)) == pytest.approx([500, 100, 300, 250])
    assert milliseconds(WITHOUT_DEVICE, 0.9, (0, LOADED)) == pytest.approx([500, 400, 250])


def test_a_destination_that_loads_before_the_completion_adds_no_time() -> None:
    assert milliseconds(EVENTS, 0.9, (0, COMPLETED - MS))[-1] == 0


def test_time_before_a_saved_stream_is_read_is_not_downtime() -> None:
    began = COMPLETED + 100 * MS
    assert milliseconds(EVENTS, 0.9, (began, LOADED))[-1] == pytest.approx(150)


@pytest.mark.parametrize("reported_s", [None, 0.0])
def test_without_qemus_downtime_figure_its_events_are_used(reported_s: float | None) -> None:
    assert milliseconds(EVENTS, reported_s, (0, LOADED)) == pytest.approx([400, 250])


def test_without_events_qemus_downtime_figure_is_used() -> None:
    downtime = measure_downtime({}, NONE, 0.9, None, 0.5)
    assert (downtime.seconds, downtime.exceeded) == (0.9, True)
    assert "do not divide its downtime into parts" in downtime.sentence


def test_without_figure_and_events_nothing_is_measured() -> None:
    downtime = measure_downtime({}, NONE, None, (0, LOADED), 0.5)
    assert (downtime.seconds, downtime.exceeded, downtime.unmeasured) == (None, False, True)
    assert not measure_downtime({}, NONE, None, (0, LOADED), None).unmeasured
