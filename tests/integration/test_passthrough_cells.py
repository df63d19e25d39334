"""Passthrough proofs as cells of a matrix that is interrupted and continued, without L1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.matrix.axes import make_matrix
from qmp_tools.matrix.resources import Resources
from qmp_tools.matrix.result import State
from qmp_tools.matrix.result_cache import ResultCache
from qmp_tools.matrix.run import run_matrix
from qmp_tools.passthrough import cells
from qmp_tools.passthrough.catalog import Request, names
from qmp_tools.passthrough.l1.machine import L1
from qmp_tools.reports.matrix_report import to_json

RULES = [name for name in names() if name.startswith("rules: ")]
STATES = {"holds": State.CLEAN, "fails": State.FAILED, "lacking": State.SKIPPED}


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Request]:
    """Replace L1; the requests that it would have got. Each fifth proof fails."""
    asked: list[Request] = []

    def l1(kernel: str) -> L1:
        return L1(tmp_path / "root", tmp_path / f"kernel-{kernel}", tmp_path / "module/m.ko")

    async def prove(
        machine: L1, qemu: Path, request: Request, on_outcome: Callable[[dict[str, Any]], None]
    ) -> None:
        asked.append(request)
        for number, name in enumerate(request.only):
            group, _, short = name.partition(": ")
            if len(asked) == 1 and number == 3:
                raise UntestableError("L1 was killed by SIGKILL")
            state = list(STATES)[number % 3]
            found = f"{name} {state}"
            on_outcome(
                {"group": group, "name": short, "state": state, "found": found, "seconds": 0.5}
            )

    monkeypatch.setattr(cells, "l1", l1)
    monkeypatch.setattr(cells, "prove_passthrough", prove)
    monkeypatch.setattr(cells, "find_qemu", lambda *_: Path("/bin/true"))
    monkeypatch.setattr(cells, "vfio_guest", lambda: Path("/bin/true"))
    return asked


def test_proofs_of_one_machine_run_together_and_each_is_kept_as_it_ends(
    machines: list[Request], tmp_path: Path
) -> None:
    matrix = make_matrix({"passthrough": ["rules: START*"], "l1-kernel": ["7.3"]})
    count = len(matrix.cells())
    assert count > 4

    def run() -> list[State]:
        with ResultCache.open(tmp_path / "cache") as cache:
            resources = Resources(2, 1 << 40)
            results = asyncio.run(run_matrix(matrix, cache, resources))
        report = to_json(matrix, results)
        assert report["exit_code"] == 1
        assert sum(report["counts"].values()) == count
        return [result.state for result in results]

    first = run()
    assert first[:3] == list(STATES.values())
    assert set(first[3:]) == {State.UNTESTED}
    second = run()
    assert [len(request.only) for request in machines] == [count, count - 3]
    assert State.UNTESTED not in second
    assert second[:3] == first[:3]


def test_kernels_do_not_share_a_machine(machines: list[Request], tmp_path: Path) -> None:
    machines.append(Request(seed=0, only=()))  # the first machine is killed
    matrix = make_matrix({"passthrough": RULES[:2], "l1-kernel": ["7.3", "stock"]})
    with ResultCache.open(tmp_path / "cache") as cache:
        results = asyncio.run(run_matrix(matrix, cache, Resources(2, 1 << 40)))
    assert [len(request.only) for request in machines[1:]] == [2, 2]
    assert [result.command[:2] for result in results] == [["dmaproof", "passthrough"]] * 4
    assert {result.command[2] for result in results} == {"--kernel=7.3", "--kernel=stock"}


def test_options_of_other_cells_do_not_apply(machines: list[Request], tmp_path: Path) -> None:
    matrix = make_matrix({"passthrough": RULES[:1], "scenario": ["tls"]})
    with (
        ResultCache.open(tmp_path / "cache") as cache,
        pytest.raises(UsageError, match="--scenario does not apply to the passthrough proof"),
    ):
        asyncio.run(run_matrix(matrix, cache, Resources(2, 1 << 40)))
