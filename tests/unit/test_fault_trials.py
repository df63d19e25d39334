"""A fault trial without a verdict is repeated; its JSON has the whole reason, its row one line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.proof.model import Setup
from qmp_tools.testbed import fault_trials
from qmp_tools.testbed.fault_trials import CONTROL, Bench, Row, Trial, try_faults
from support.setups import setup

REASON = (
    "the device of the test bed did not carry out a step: it has ended\n"
    "AssertionError: the last line of its log"
)


def test_a_trial_without_a_verdict_keeps_the_whole_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise UntestableError(REASON)

    monkeypatch.setattr(fault_trials, "simulate", fail)
    trial = fault_trials.try_on_testbed(CONTROL, 1, tmp_path, 60)
    row = Row(CONTROL, "", "control", Bench.TESTBED, [trial])
    assert row.to_json()["trials"][0]["untested"] == REASON
    assert f"not tested: {REASON.splitlines()[0]}" in row.cells()


@pytest.mark.parametrize(("without_verdict", "proofs"), [(0, 1), (1, 2), (2, 2)])
def test_a_proof_without_a_verdict_is_repeated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_verdict: int, proofs: int
) -> None:
    carried_out: list[Setup] = []

    async def prove(planned: Setup) -> SimpleNamespace:
        carried_out.append(planned)
        if len(carried_out) <= without_verdict:
            raise UntestableError(REASON)
        return SimpleNamespace(verdict=None)

    async def make_setup(fault: str | None, seed: int) -> Setup:
        return setup(seed=seed)

    monkeypatch.setattr(fault_trials, "prove", prove)
    monkeypatch.setattr(fault_trials, "judge", lambda verdict, seed: Trial(seed))
    (row,) = asyncio.run(try_faults([CONTROL], [Bench.QEMU], [1], make_setup, tmp_path))
    assert len(carried_out) == proofs
    assert row.trials == [Trial(1, untested=REASON if without_verdict == 2 else None)]
