"""QEMU loses bits of the vhost log at a border of two RAM blocks inside a word of the log.

A word of the log stands for 256 KiB of guest-physical addresses. dmaproof's own machines have no
border inside a word, so this test makes one: two NUMA nodes, the second of which begins 8 KiB after
a multiple of 256 KiB. See docs/qemu-findings.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.migration.judgement import Blame
from qmp_tools.proof.model import Proof
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve
from qmp_tools.proof.run import prove
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.machine import KIB, Machine

WORD_BYTES: Final = 256 * KIB
NODE_BYTES: Final = 65544 * KIB
BORDER_PAGES: Final = range(NODE_BYTES, NODE_BYTES // WORD_BYTES * WORD_BYTES + WORD_BYTES, 4 * KIB)
"""The pages of the second node whose bits are in the word that both nodes share."""
QEMUS: Final = {
    "system": Path("qemu-system-x86_64"),
    **{build.version: build.path for build in installed(X86_64)},
}


class EqualNodes(Machine):
    """A machine whose NUMA nodes all have the same size, whatever that size is."""

    @property
    def ram_backends(self) -> dict[str, int]:
        names = super().ram_backends
        return dict.fromkeys(names, self.memory_bytes // len(names))


async def prove_with_border(qemu: Path) -> Proof:
    setup = await resolve(
        ProofOptions(
            guest="bare",
            qemu=str(qemu),
            numa=2,
            memory=2 * NODE_BYTES,
            workload="write_once=20480",  # enough for the bare guest to use the pages at the border
        )
    )
    members = {field.name: getattr(setup.machine, field.name) for field in fields(Machine)}
    return await prove(replace(setup, machine=EqualNodes(**members)))


@pytest.mark.parametrize("name", QEMUS)
def test_all_pages_of_the_word_at_the_border_are_lost_and_no_other(name: str) -> None:
    verdict = asyncio.run(prove_with_border(QEMUS[name])).verdict
    lost = [page.gpa for page in verdict.lost]
    print(f"QEMU {name} lost {len(lost)} pages:", " ".join(f"{gpa or 0:#x}" for gpa in lost))
    assert sorted(gpa or 0 for gpa in lost) == list(BORDER_PAGES)
    assert {page.blame for page in verdict.lost} == {Blame.QEMU}
