"""QEMU loses bits of the vhost log at a border of two RAM blocks inside a word of the log.

A word of the log stands for 256 KiB of guest-physical addresses. dmaproof's own machines have no
border inside a word, so the finding makes one: two NUMA nodes, the second of
which begins 8 KiB after a multiple of 256 KiB. See docs/qemu-findings.md.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.findings import FINDINGS
from qmp_tools.findings.qemu import NODE_BYTES, SharedWord
from qmp_tools.migration.judgement import Blame
from qmp_tools.proof.model import Proof
from qmp_tools.proof.resolve import resolve
from qmp_tools.proof.run import prove
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.machine import KIB

WORD_BYTES: Final = 256 * KIB
BORDER_PAGES: Final = range(NODE_BYTES, NODE_BYTES // WORD_BYTES * WORD_BYTES + WORD_BYTES, 4 * KIB)
"""The pages of the second node whose bits are in the word that both nodes share."""
QEMUS: Final = {
    "system": Path("qemu-system-x86_64"),
    **{build.version: build.path for build in installed(X86_64)},
}


def prove_with_border(qemu: Path) -> Proof:
    finding = FINDINGS["vhost-log-shared-word"]
    assert isinstance(finding, SharedWord)
    options = replace(finding.options, qemu=str(qemu))

    async def carry_out() -> Proof:
        return await prove(finding.adapt(await resolve(options)))

    return asyncio.run(carry_out())


@pytest.mark.parametrize("name", QEMUS)
def test_all_pages_of_the_word_at_the_border_are_lost_and_no_other(name: str) -> None:
    verdict = prove_with_border(QEMUS[name]).verdict
    lost = [page.gpa for page in verdict.lost]
    print(f"QEMU {name} lost {len(lost)} pages:", " ".join(f"{gpa or 0:#x}" for gpa in lost))
    assert sorted(gpa or 0 for gpa in lost) == list(BORDER_PAGES)
    assert {page.blame for page in verdict.lost} == {Blame.QEMU}
