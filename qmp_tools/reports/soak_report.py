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
GROWTH_HEADINGS: Final = ("process", "resource", "after warm-up", "at the end", "growth")


def soak_to_json(soak: Soak) -> dict[str, Any]:
    """Return all findings of a soak; `last` is its last migration as a proof of its own."""
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
                **asdict(growth),
                "none": growth.is_none,
                "seen": [asdict(holdings) for holdings in soak.holdings[growth.process]],
            }
            for growth in soak.growths
        ],
        "last": to_json(soak.proof),
    }


def soak_to_text(soak: Soak) -> str:
    """Return the outcome and the figures behind it, without the table of the growth."""
    proof, migrations = soak.proof, soak.migrations
    machine = proof.setup.machine
    median_s = statistics.median(migration.seconds for migration in migrations)
    rewritten = sum(migration.rewritten for migration in migrations)
    guaranteed = sum(migration.guaranteed_detectable for migration in migrations)
    requests = sum(migration.requests for migration in migrations)
    rechecked = sum(migration.rechecked for migration in migrations)
    downtimes = [
        migration.downtime_s * 1000 for migration in migrations if migration.downtime_s is not None
    ]
    lines = [
        f"{HEADINGS[soak.exit_code]}: {soak.sentence}",
        "",
        f"  QEMU         {proof.qemu_version} and {proof.qemu_destination_version}, "
        f"{machine.machine}, {machine.accelerator}, {format_memory(machine.memory_bytes)}",
        f"  guest        {proof.setup.guest_text}, access pattern {proof.setup.workload.pattern}",
        f"  migrations   {len(migrations)} ({proof.setup.scenario}) in {soak.seconds:.0f} s, "
        f"median {median_s:.1f} s",
        f"  downtime     median {statistics.median(downtimes):.0f} ms, maximum "
        f"{max(downtimes):.0f} ms",
        f"  sensitivity  {rewritten} pages written after every page had been sent; a lost dirty "
        f"bit on any of {guaranteed}",
        "               pages would have been detected",
        f"  destination  the guest did {requests} more requests and rechecked {rechecked} pages: "
        f"{migrations[-1].errors} errors",
        f"  seed         {proof.setup.seed}",
    ]
    return "\n".join(lines)


def growth_rows(growths: Sequence[Growth]) -> list[list[str]]:
    """Return the rows of the table of the growth."""
    return [
        [growth.process, resource, *figures]
        for growth in growths
        for resource, figures in (
            (
                "private memory",
                (
                    f"{growth.warm.private_bytes // _KIB} KiB",
                    f"{growth.last.private_bytes // _KIB} KiB",
                    f"{growth.private_bytes / _KIB:+.0f} KiB",
                ),
            ),
            (
                "file descriptors",
                (
                    f"{growth.warm.descriptors}",
                    f"{growth.last.descriptors}",
                    f"{growth.descriptors:+}",
                ),
            ),
            (
                "shared memory objects",
                (
                    f"{growth.warm.shared_objects}",
                    f"{growth.last.shared_objects}",
                    f"{growth.shared_objects:+}",
                ),
            ),
        )
    ]
