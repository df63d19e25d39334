"""The size of RAM at which an accelerator loses no pages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dmaproof.errors import UnsupportedError, UsageError
from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.s390x import S390X
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.proof import probes
from qmp_tools.qemu.machine import KIB, MIB, Hardware, Machine, parse_memory
from support.host_pages import HOST_PAGE, host_pages

WANTED_BYTES = 256 * MIB


def _choose(architecture: Architecture, lost: int, monkeypatch: pytest.MonkeyPatch) -> int:
    async def pages_lost(*arguments: object) -> int:
        return lost

    monkeypatch.setattr(probes, "vcpu_pages_lost", pages_lost)
    return asyncio.run(probes.choose_memory(architecture, Path("qemu"), "tcg", WANTED_BYTES, 1.0))


def test_an_accelerator_that_loses_nothing_gets_the_wanted_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for architecture in (X86_64, S390X):
        assert _choose(architecture, 0, monkeypatch) == WANTED_BYTES


def test_a_lossy_accelerator_gets_a_size_that_is_no_whole_number_of_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _choose(X86_64, 64, monkeypatch) == WANTED_BYTES + max(8 * KIB, HOST_PAGE)


def test_the_size_is_whole_pages_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_pages(64 * KIB):
        assert _choose(X86_64, 64, monkeypatch) == WANTED_BYTES + 64 * KIB
        assert parse_memory("64M") == 64 * MIB
        with pytest.raises(UsageError, match=r"a multiple of 64K, got '262152K'"):
            parse_memory("262152K")


def test_a_machine_with_a_coarse_ram_size_gets_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert _choose(S390X, 64, monkeypatch) == WANTED_BYTES
    assert "loses pages that its vCPUs write (a probe lost 64)" in caplog.text
    assert "no size of RAM prevents that on s390x" in caplog.text


def test_every_numa_node_has_a_huge_page(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing_lost(*arguments: object, in_dimms: bool = False) -> int:
        return 0

    monkeypatch.setattr(probes, "vcpu_pages_lost", nothing_lost)
    huge_page = 2 * WANTED_BYTES
    for nodes in (1, 3):
        chosen = probes.choose_memory(
            X86_64, Path("qemu"), "tcg", WANTED_BYTES, 1.0, page_bytes=huge_page, blocks=nodes
        )
        assert asyncio.run(chosen) == nodes * huge_page


def test_the_last_numa_node_of_a_lossy_accelerator_is_no_whole_number_of_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def behind_the_first(*arguments: object, in_dimms: bool = False) -> int:
        return 64 if in_dimms else 0

    monkeypatch.setattr(probes, "vcpu_pages_lost", behind_the_first)
    caplog.set_level(logging.WARNING)
    for nodes, warnings in {1: 0, 2: 0, 3: 1}.items():
        caplog.clear()
        chosen = asyncio.run(
            probes.choose_memory(X86_64, Path("qemu"), "tcg", WANTED_BYTES, 1.0, blocks=nodes)
        )
        assert chosen == WANTED_BYTES + (nodes > 1) * max(8 * KIB, HOST_PAGE)
        assert len(caplog.messages) == warnings


@pytest.mark.parametrize(
    ("lost_first", "lost_behind", "aborts"), [(0, 64, True), (64, 64, False), (0, 0, False)]
)
def test_memory_for_which_qemu_aborts_is_refused(
    monkeypatch: pytest.MonkeyPatch, lost_first: int, lost_behind: int, aborts: bool
) -> None:
    async def lost(*arguments: object, in_dimms: bool = False) -> int:
        return lost_behind if in_dimms else lost_first

    monkeypatch.setattr(probes, "vcpu_pages_lost", lost)
    fits = Machine(
        *(X86_64, "q35", "tcg", 256 * MIB, 1, Path("kernel")),
        numa_nodes=2,
        added=Hardware(nvdimm_bytes=128 * MIB),
    )
    asyncio.run(probes.require_first_block(fits, Path("qemu"), 1.0))
    too_small = replace(fits, memory_bytes=255 * MIB)
    message = "nvdimm has 128M, and ram0 has 130560K; give the guest at least --memory 256M"
    refused = pytest.raises(UnsupportedError, match=message)
    with refused if aborts else contextlib.nullcontext():
        asyncio.run(probes.require_first_block(too_small, Path("qemu"), 1.0))
