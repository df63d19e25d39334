"""The parts of a downtime, from the moments that QEMU reports and the device's harvests."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.evidence import HARVEST
from qmp_tools.migration.downtime import downtime_parts, measure_downtime

MS = 1_000_000
STOPPED, HANDED_OVER, COMPLETED = 600 * MS, 700 * MS, 1000 * MS
EVENTS = {"STOP": STOPPED, "device": HANDED_OVER, "completed": COMPLETED}
DOWNTIME_S = 0.9
"""The downtime therefore began at 100 ms."""

WAITS = "QEMU stops the vCPUs and its devices and waits for them"
ASKS = "QEMU stops the vCPUs and asks the device to stop"
HARVESTS = "the device harvests for the last time"
TAKES = "QEMU receives the answer and stops its other devices"
SYNCS = "QEMU syncs its bitmap and sends the last pages"
SYNCS_AND_SENDS = "QEMU syncs its bitmap and sends the last pages and the devices' state"
SENDS = "QEMU sends the devices' state"


def harvests(*began_and_took_ms: tuple[int, int]) -> NDArray[np.void]:
    rows = [(epoch, at * MS, took * MS, 1, 0) for epoch, (at, took) in enumerate(began_and_took_ms)]
    return np.array(rows, dtype=HARVEST)


def parts(
    *began_and_took_ms: tuple[int, int], moments: dict[str, int] = EVENTS
) -> dict[str, float]:
    """Return the parts in milliseconds."""
    found = downtime_parts(moments, harvests(*began_and_took_ms), DOWNTIME_S)
    return {str(part["what"]): round(float(part["seconds"]) * 1000, 3) for part in found}


def test_the_last_harvest_is_a_part_of_the_downtime() -> None:
    assert parts((50, 5), (300, 80)) == {
        ASKS: 200,
        HARVESTS: 80,
        TAKES: 220,
        SYNCS: 100,
        SENDS: 300,
    }


@pytest.mark.parametrize("harvest", [(100, 80), (100, 500), (520, 80)])
def test_a_harvest_may_touch_the_edges_of_the_part_that_contains_it(
    harvest: tuple[int, int],
) -> None:
    began, took = harvest
    found = parts(harvest)
    assert [found[ASKS], found[HARVESTS], found[TAKES]] == [began - 100, took, 600 - began - took]


@pytest.mark.parametrize("harvest", [(99, 80), (50, 5), (520, 81), (650, 5)])
def test_a_harvest_not_wholly_inside_a_part_is_not_shown(harvest: tuple[int, int]) -> None:
    assert parts(harvest) == {WAITS: 500, SYNCS: 100, SENDS: 300}


def test_only_the_last_harvest_counts() -> None:
    assert parts((300, 80), (700, 5)) == {WAITS: 500, SYNCS: 100, SENDS: 300}


@pytest.mark.parametrize(("handed_over", "is_shown"), [(600, True), (1000, True), (599, False)])
def test_the_sending_of_the_device_state_is_shown_only_if_it_fits(
    handed_over: int, is_shown: bool
) -> None:
    found = parts(moments={**EVENTS, "device": handed_over * MS})
    if is_shown:
        assert found == {WAITS: 500, SYNCS: handed_over - 600, SENDS: 1000 - handed_over}
    else:
        assert found == {WAITS: 500, SYNCS_AND_SENDS: 400}


def test_the_devices_state_cannot_be_sent_after_all_was_completed() -> None:
    assert parts(moments={**EVENTS, "device": 1001 * MS}) == {WAITS: 500, SYNCS_AND_SENDS: 400}


def test_a_downtime_that_began_after_stop_has_no_part_before_it() -> None:
    """QEMU reports its downtime in whole milliseconds."""
    found = downtime_parts(EVENTS, harvests(), 0.3)
    assert [part["seconds"] for part in found] == pytest.approx([0, 0.1, 0.3])


@pytest.mark.parametrize("missing", ["STOP", "completed"])
def test_without_one_of_the_moments_there_are_no_parts(missing: str) -> None:
    moments = {name: at for name, at in EVENTS.items() if name != missing}
    assert parts(moments=moments) == {}
    assert measure_downtime(moments, harvests(), None, None, None).parts == []
    (part,) = measure_downtime(moments, harvests(), DOWNTIME_S, None, None).parts
    assert part.seconds == DOWNTIME_S


def test_without_a_completion_the_loading_counts_from_its_own_start() -> None:
    found = measure_downtime({}, harvests(), DOWNTIME_S, (20 * MS, 50 * MS), None)
    assert [part.seconds for part in found.parts] == pytest.approx([0.9, 0.03])


def test_events_in_the_wrong_order_make_no_negative_time() -> None:
    moments = {"STOP": COMPLETED, "completed": STOPPED}
    assert [
        part.seconds for part in measure_downtime(moments, harvests(), None, None, None).parts
    ] == [0]


def test_a_downtime_that_was_not_measured_is_reported_with_its_limit() -> None:
    found = measure_downtime({}, harvests(), None, None, 0.5)
    assert "could not be measured and compared with the 0.5 s" in found.sentence
