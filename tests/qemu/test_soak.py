"""Migrations there and back: nothing is lost, nothing grows; and what is lost or grows is told."""

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
        it["guaranteed_detectable"] >= 8000 and it["lost"] == 0 for it in report["migrations"]
    )
    assert [it["process"] for it in report["growth"]] == ["device", TOOL]
    assert not tool.leftovers(), "the run's folder was left behind"


def test_the_first_loss_ends_it(tool: Tool) -> None:
    outcome = tool.run("soak", "--migrations", "3", "--fault", "drop-pages=0.01", "--json", "-")
    assert outcome.exit_code == 1, outcome.errors
    report = outcome.report
    assert report["verdict"].startswith("migration 1 of 3: ")
    assert len(report["last"]["lost_pages"]) > 40


def test_what_is_kept_from_each_migration_is_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    swap_roles = QemuPair.swap_roles

    async def forgetful(pair: QemuPair) -> None:
        kept.append(os.memfd_create("kept"))
        await swap_roles(pair)

    monkeypatch.setattr(QemuPair, "swap_roles", forgetful)
    try:
        outcome = asyncio.run(_soak(4))
    finally:
        for fd in kept:
            os.close(fd)
    grown = {it.process: (it.descriptors, it.shared_objects) for it in outcome.growths}
    assert grown == {"device": (0, 0), TOOL: (2, 2)}
    assert outcome.exit_code == 1
    assert outcome.sentence.endswith("but the tool grew")


async def _soak(migrations: int) -> Soak:
    options = ProofOptions(guest="bare")
    setup = await resolve(options)
    return await soak(setup, migrations)
