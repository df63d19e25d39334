"""A soak as JSON for programs and as text for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from ..proof.soak import Growth, Soak
from ..qemu.machine import format_memory
from .report import HEADINGS, SCHEMA_VERSION, to_json

_KIB: Final = 1 << 10
GROWTH_HEADINGS: Final = ("process", "holds", "warm", "at the end", "growth")


def soak_to_json(soak: Soak) -> dict[str, Any]:
    """Everything that is known of a soak; `last` is its last migration as a proof of its own."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "soak",
        "verdict": soak.sentence,
        "exit_code": soak.exit_code,
        "wanted": soak.wanted,
        "seconds": soak.seconds,
        "migrations": [asdict(migration) for migration in soak.migrations],
        "growth": [
            {
                **asdict(it),
                "none": it.is_none,
                "seen": [asdict(holdings) for holdings in soak.holdings[it.process]],
            }
            for it in soak.growths
        ],
        "last": to_json(soak.proof),
    }


def soak_to_text(soak: Soak) -> str:
    """The outcome, and what it rests on, but for the table of the growth."""
    proof, migrations = soak.proof, soak.migrations
    machine = proof.setup.machine
    downtimes = [
        migration.downtime_s * 1000 for migration in migrations if migration.downtime_s is not None
    ]
    lines = [
        f"{HEADINGS[soak.exit_code]}: {soak.sentence}",
        "",
        f"  QEMU         {proof.qemu_version} and {proof.qemu_destination_version}, "
        f"{machine.machine}, {machine.accelerator}, {format_memory(machine.memory_bytes)}",
        f"  guest        {proof.setup.guest}, {proof.setup.workload.pattern}",
        f"  migrations   {len(migrations)} ({proof.setup.scenario}) in {soak.seconds:.0f} s, "
        f"{statistics.median(migration.seconds for migration in migrations):.1f} s each in the median",
        f"  downtime     {statistics.median(downtimes):.0f} ms in the median, {max(downtimes):.0f} "
        "at most",
        f"  sensitivity  {sum(migration.rewritten for migration in migrations)} pages written after everything had "
        f"been sent; {sum(migration.guaranteed_detectable for migration in migrations)} certain",
        f"  in between   the guest did {sum(migration.requests for migration in migrations)} requests and checked "
        f"{sum(migration.rechecked for migration in migrations)} pages again: {migrations[-1].errors} errors",
        f"  seed         {proof.setup.seed}",
    ]
    return "\n".join(lines)


def growth_rows(growths: Sequence[Growth]) -> list[list[str]]:
    """The rows of the growth's table."""
    return [
        [it.process, what, *figures]
        for it in growths
        for what, figures in (
            (
                "private memory",
                (
                    f"{it.warm.private_bytes // _KIB} KiB",
                    f"{it.last.private_bytes // _KIB} KiB",
                    f"{it.private_bytes / _KIB:+.0f} KiB",
                ),
            ),
            (
                "file descriptors",
                (f"{it.warm.descriptors}", f"{it.last.descriptors}", f"{it.descriptors:+}"),
            ),
            (
                "shared memory objects",
                (
                    f"{it.warm.shared_objects}",
                    f"{it.last.shared_objects}",
                    f"{it.shared_objects:+}",
                ),
            ),
        )
    ]
