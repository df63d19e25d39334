"""Repeated migrations of one guest: losses and growth of processes are reported."""

from __future__ import annotations

import asyncio
import os

import pytest

from qmp_tools.migration.pair import QemuPair
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve
from qmp_tools.proof.soak import TOOL, Soak, soak
from support.command import Tool


def test_nothing_is_lost_and_nothing_grows(tool: Tool) -> None:
    outcome = tool.run("soak", "--migrations", "6", "--json", "-")
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    report = outcome.report
    assert len(report["migrations"]) == 6
    assert all(
        migration["guaranteed_detectable"] >= 8000 and migration["lost"] == 0
        for migration in report["migrations"]
    )
    assert [growth["process"] for growth in report["growth"]] == ["device", TOOL]
    assert not tool.leftovers(), "the run's folder was left behind"


def test_the_first_loss_ends_a_soak(tool: Tool) -> None:
    outcome = tool.run("soak", "--migrations", "3", "--fault", "drop-pages=0.01", "--json", "-")
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    assert report["verdict"].startswith("migration 1 of 3: ")
    assert len(report["last"]["lost_pages"]) > 40


def test_a_leak_at_each_migration_is_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    leaked: list[int] = []
    swap_roles = QemuPair.swap_roles

    async def leaking(pair: QemuPair) -> None:
        leaked.append(os.memfd_create("leaked"))
        await swap_roles(pair)

    monkeypatch.setattr(QemuPair, "swap_roles", leaking)
    try:
        outcome = asyncio.run(_soak(4))
    finally:
        for fd in leaked:
            os.close(fd)
    grown = {
        growth.process: (growth.descriptors, growth.shared_objects) for growth in outcome.growths
    }
    assert grown == {"device": (0, 0), TOOL: (2, 2)}
    assert outcome.exit_code == 1
    assert outcome.sentence.endswith("but the resource use of the tool grew")


async def _soak(migrations: int) -> Soak:
    options = ProofOptions(guest="bare")
    setup = await resolve(options)
    return await soak(setup, migrations)
