"""A fault trial without a verdict is repeated; its JSON has the whole reason, its row one line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from dmaproof.errors import UntestableError, UsageError
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


def test_faults_that_a_set_up_refuses_are_left_out_before_any_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def prove(planned: Setup) -> SimpleNamespace:
        return SimpleNamespace(verdict=None)

    async def make_setup(fault: str | None, seed: int) -> Setup:
        if fault == "drop-bits":
            raise UsageError("drop-bits cannot be combined with this")
        return setup(seed=seed)

    monkeypatch.setattr(fault_trials, "prove", prove)
    monkeypatch.setattr(fault_trials, "judge", lambda verdict, seed: Trial(seed))
    trials = try_faults(
        ["drop-bits", "drop-pages"], [Bench.QEMU], [1], make_setup, tmp_path, skips_refused=True
    )
    assert [row.fault for row in asyncio.run(trials)] == ["drop-pages"]
    assert "drop-bits: not tried in proofs: drop-bits cannot" in caplog.text

    monkeypatch.setattr(fault_trials, "prove", lambda planned: pytest.fail("a proof has begun"))
    trials = try_faults(["drop-pages", "drop-bits"], [Bench.QEMU], [1], make_setup, tmp_path)
    with pytest.raises(UsageError, match="cannot be combined"):
        asyncio.run(trials)


def test_options_that_no_set_up_accepts_are_refused(tmp_path: Path) -> None:
    async def make_setup(fault: str | None, seed: int) -> Setup:
        raise UsageError("no proof accepts this")

    trials = try_faults(["drop-pages"], [Bench.QEMU], [1], make_setup, tmp_path, skips_refused=True)
    with pytest.raises(UsageError, match="no proof accepts this"):
        asyncio.run(trials)
