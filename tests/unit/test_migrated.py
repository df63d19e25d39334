"""Two QEMUs that are not the two sides of a completed migration are refused with the reason."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.qemu.qmp import QmpRefusal
from qmp_tools.ram_check.migrated import (
    GuestHasRunError,
    GuestState,
    NotMigratedError,
    guest_state,
    has_run,
    require_migrated,
    require_not_run,
    require_paused,
)

NO_JIT = "Error: JIT information is only available with accel=tcg\r\n"


def jit(blocks: int) -> str:
    return f"gen code size 1/2\r\nTB count            {blocks}\r\ncross page TB count 7 (0%)\r\n"


def vcpu(**counts: int) -> dict[str, Any]:
    return {"stats": [{"name": name, "value": value} for name, value in counts.items()]}


@dataclass
class AnsweringQemu:
    """A QEMU with given answers on its QMP session, which is itself, and on its human monitor."""

    state: str = "paused"
    migration: dict[str, Any] = field(default_factory=lambda: {"status": "completed"})
    kvm: bool = False
    jit: str = jit(0)
    vcpus: list[dict[str, Any]] | None = None
    name: str = "this QEMU"
    address: str = "/run/qmp"

    @property
    def qmp(self) -> AnsweringQemu:
        return self

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == "query-stats":
            exits = {"provider": "kvm", "names": ["exits", "signal_exits"]}
            assert arguments == {"target": "vcpu", "providers": [exits]}
            if self.vcpus is None:
                raise QmpRefusal("no such command")
        return {
            "query-kvm": {"enabled": self.kvm},
            "query-migrate": self.migration,
            "query-stats": self.vcpus,
        }[command]

    async def status(self) -> str:
        return self.state

    async def monitor(self, command: str) -> str:
        assert command == "info jit"
        return self.jit


def answering(**answers: Any) -> Qemu:
    return cast(Qemu, AnsweringQemu(**answers))


def state_of(**answers: Any) -> GuestState:
    return asyncio.run(guest_state(answering(**answers)))


SENT = {"status": "completed", "ram": {}}
SOURCE = {"state": "postmigrate", "migration": SENT, "jit": jit(9)}


@pytest.mark.parametrize("state", ["postmigrate", "finish-migrate"])
def test_a_source_after_its_migration_is_comparable(state: str) -> None:
    require_migrated(state_of(**{**SOURCE, "state": state}), state_of())


def test_a_destination_that_has_migrated_further_is_comparable() -> None:
    require_migrated(state_of(**SOURCE), state_of(state="postmigrate", migration=SENT))


@pytest.mark.parametrize(
    ("source", "destination", "kind", "message"),
    [
        ({"migration": {}}, {}, NotMigratedError, "has not been migrated.*--no-migration"),
        ({"state": "running", "migration": {}}, {}, NotMigratedError, "has not been migrated"),
        ({"migration": {"status": "active"}}, {}, NotMigratedError, "'active', not 'completed'"),
        ({"migration": {"status": "failed"}}, {}, NotMigratedError, "'failed'"),
        ({"state": "running"}, {}, GuestHasRunError, "was resumed or reset"),
        ({"state": "paused"}, {}, GuestHasRunError, "was resumed or reset"),
        ({"state": "prelaunch"}, {}, GuestHasRunError, "was resumed or reset"),
        ({}, {"state": "prelaunch", "migration": {}}, NotMigratedError, "has not been migrated"),
        ({}, {"state": "inmigrate", "migration": {}}, NotMigratedError, "still waits"),
        ({}, {"migration": {"status": "postcopy-active"}}, NotMigratedError, "postcopy-active"),
        ({}, {"state": "running"}, GuestHasRunError, "is running, .*-S .*, or .*QMP 'stop' while"),
        ({}, {"jit": jit(1)}, GuestHasRunError, "is paused, but has run since .*-S "),
        ({}, {"kvm": True, "vcpus": [vcpu(exits=1)]}, GuestHasRunError, "has run since"),
        (
            {"state": "paused", "migration": {"status": "completed"}},
            {"state": "postmigrate", "migration": SENT},
            UsageError,
            "give the source first",
        ),
    ],
)
def test_sides_without_a_completed_migration_are_refused(
    source: dict[str, Any], destination: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        require_migrated(state_of(**{**SOURCE, **source}), state_of(**destination))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (SOURCE, {**SOURCE, "state": "running"}, "is running, so its RAM changes"),
        (SOURCE, {**SOURCE, "state": "paused"}, "was resumed or reset"),
        ({}, {"jit": jit(1)}, "has run while dmaproof read its RAM"),
    ],
)
def test_a_guest_that_was_resumed_meanwhile_is_refused(
    before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    with pytest.raises(UntestableError, match=message):
        require_not_run(state_of(**before), state_of(**after))


@pytest.mark.parametrize("after", [SOURCE, {**SOURCE, "state": "finish-migrate"}])
def test_a_guest_that_stays_paused_is_accepted(after: dict[str, Any]) -> None:
    require_not_run(state_of(**{**SOURCE, "state": "finish-migrate"}), state_of(**after))
    require_not_run(state_of(jit=NO_JIT), state_of(jit=NO_JIT))
    require_not_run(state_of(jit=jit(3)), state_of(jit=jit(3)))


@pytest.mark.parametrize(
    ("qemu", "expected"),
    [
        ({"jit": jit(0)}, False),
        ({"jit": jit(12)}, True),
        ({"jit": NO_JIT}, None),
        ({"kvm": True, "vcpus": [vcpu(exits=0, signal_exits=0)] * 2}, False),
        ({"kvm": True, "vcpus": [vcpu(exits=0), vcpu(exits=3)]}, True),
        ({"kvm": True, "vcpus": [vcpu(exits=0, signal_exits=1)]}, True),
        ({"kvm": True, "vcpus": [vcpu()]}, None),
        ({"kvm": True, "vcpus": []}, None),
        ({"kvm": True}, None),
    ],
)
def test_translated_blocks_or_vcpu_exits_show_that_a_guest_has_run(
    qemu: dict[str, Any], expected: bool | None
) -> None:
    assert asyncio.run(has_run(answering(**qemu))) is expected


def test_without_a_migration_a_paused_guest_is_enough() -> None:
    require_paused(state_of(state="prelaunch", migration={}, jit=jit(5)))
    with pytest.raises(UntestableError, match=r"is running.*QMP 'stop'"):
        require_paused(state_of(state="running"))


@pytest.mark.parametrize(
    ("migration", "message"),
    [
        (
            {},
            "this QEMU (/run/qmp) has not been migrated, so nothing was tested. To compare two "
            "QEMUs without a migration, use --no-migration (in the library, "
            "expect_migration=False)",
        ),
        (
            {"status": "active"},
            "the migration of this QEMU (/run/qmp) is 'active', not 'completed': check again when "
            "it has completed",
        ),
    ],
)
def test_a_migration_that_is_not_complete_is_reported_with_what_to_do(
    migration: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotMigratedError) as caught:
        require_migrated(state_of(migration=migration), state_of())
    assert str(caught.value) == message
