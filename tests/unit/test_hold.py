"""Holding a migration in precopy: when pages are dirtied, and how much QEMU may send."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from dmaproof.units import PAGE_BYTES
from qmp_tools.migration.hold import PrecopyHold
from qmp_tools.migration.migration import Limits, Migration, Progress, parse_progress
from qmp_tools.migration.procedure import FIRST_PASS_BYTES_PER_S, HELD_BYTES_PER_S
from qmp_tools.migration.scenarios.precopy import Unix
from qmp_tools.migration.transport import Ends
from qmp_tools.qemu.qmp import Qmp, QmpError
from qmp_tools.qemu.qtest import Qtest

MIB = 1 << 20
PAGES = range(0, 8 * MIB, PAGE_BYTES)
PUNCTUAL_BYTES_PER_S = 20 * MIB
"""Four portions of a tenth of a second for the hold pages: polls are in time."""


class FakeQemu:
    """A QEMU that records its bandwidth limits and the words written to its memory."""

    def __init__(self) -> None:
        self.bandwidths: list[int] = []
        self.words: list[int] = []

    async def execute(self, command: str, **arguments: Any) -> None:
        assert command == "migrate-set-parameters"
        self.bandwidths.append(arguments["max_bandwidth"])

    async def write_words(self, gpas: Sequence[int], word: int) -> None:
        self.words.append(word)


class HeldMigration:
    """A held migration whose progress the test sets."""

    def __init__(self, pages: Sequence[int] = PAGES, limits: Limits | None = None) -> None:
        self.qemu = FakeQemu()
        qmp = cast(Qmp, self.qemu)
        migration = Migration(Ends(qmp, qmp, cast(Any, None)), Unix(), limits or Limits())
        self.hold = PrecopyHold(migration, cast(Qtest, self.qemu), pages)
        self.progress = replace(
            parse_progress({"status": "active"}), time_ns=0, total=256 * MIB, remaining=256 * MIB
        )

    def look(self, after_s: float = 0.05, **changes: Any) -> Progress:
        """Look at the migration `after_s` seconds after the last time."""
        time_ns = self.progress.time_ns + round(after_s * 1e9)
        self.progress = replace(self.progress, time_ns=time_ns, **changes)
        asyncio.run(self.hold.keep(self.progress))
        return self.progress


def test_the_hold_pages_are_dirtied_once_after_each_sync() -> None:
    held = HeldMigration()
    for syncs in (0, 0, 1, 1, 2, 2, 2, 7):
        held.look(syncs=syncs)
    assert held.qemu.words == [1, 2, 3, 4]


def test_nothing_is_written_when_the_migration_is_over() -> None:
    held = HeldMigration()
    held.look(syncs=2)
    held.look(syncs=3, status="completed")
    assert held.qemu.words == [1]


def test_the_first_pass_ends_no_faster_than_the_hold_pages_allow() -> None:
    held = HeldMigration()
    held.look(syncs=1)
    assert held.qemu.bandwidths == [FIRST_PASS_BYTES_PER_S]
    held.look(syncs=1, remaining=1 * MIB)
    assert held.qemu.bandwidths[-1] == PUNCTUAL_BYTES_PER_S
    held.look(syncs=2, remaining=20 * MIB)
    assert held.qemu.bandwidths[-1] == PUNCTUAL_BYTES_PER_S


def test_a_late_poll_lowers_the_bandwidth_until_the_next() -> None:
    held = HeldMigration()
    held.look(syncs=2, remaining=16 * MIB)
    held.look(after_s=1.0)
    assert held.qemu.bandwidths == [PUNCTUAL_BYTES_PER_S, 2 * MIB]
    for _ in range(40):
        held.look()
    assert held.qemu.bandwidths[-1] > PUNCTUAL_BYTES_PER_S * 0.9  # less is not worth a command


def test_a_bandwidth_that_was_asked_for_is_never_exceeded() -> None:
    held = HeldMigration(limits=Limits(bandwidth_bytes_per_s=MIB))
    held.look(syncs=1)
    held.look(syncs=2)
    assert set(held.qemu.bandwidths) == {MIB}


def test_without_hold_pages_the_guest_has_to_hold_the_migration() -> None:
    held = HeldMigration(pages=())
    held.look(syncs=2)
    assert held.qemu.bandwidths == [HELD_BYTES_PER_S]


def test_at_rest_the_hold_pages_last_longer_than_any_wait_and_are_not_written() -> None:
    held = HeldMigration(limits=Limits(timeout_s=64))
    held.look(syncs=2)
    asyncio.run(held.hold.rest())
    assert held.qemu.words == [1, 2]
    assert held.qemu.bandwidths[-1] == 8 * MIB // 128
    held.hold.pages = PAGES[:1024]
    held.look(syncs=2)
    assert held.qemu.bandwidths[-1] == PUNCTUAL_BYTES_PER_S // 2


# The test channel ---------------------------------------------------------------------------------


async def write(answers: bytes, gpas: Sequence[int]) -> bytes:
    """Return what QEMU reads when words are written at `gpas`, and it sends `answers`."""
    own, qemu = socket.socketpair()
    with qemu:
        qemu.sendall(answers)
        qemu.shutdown(socket.SHUT_WR)
        qtest = await Qtest.open("source QEMU", own, timeout_s=60)
        try:
            await qtest.write_words(gpas, 0x0102)
            return qemu.recv(1 << 16)
        finally:
            qtest.close()


def test_words_are_written_in_the_guests_byte_order() -> None:
    assert asyncio.run(write(b"OK\nOK\n", [0x1000, 0x2000])) == (
        b"write 0x1000 0x8 0x0201000000000000\nwrite 0x2000 0x8 0x0201000000000000\n"
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (b"OK\n", "source QEMU closed its test channel"),
        (b"OK\nFAIL Unknown command 'write'\n", "source QEMU refused to write guest RAM"),
    ],
)
def test_a_write_that_qemu_refuses_is_an_error(answers: bytes, message: str) -> None:
    with pytest.raises(QmpError, match=message):
        asyncio.run(write(answers, [0x1000, 0x2000]))
