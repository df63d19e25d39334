"""The conditions under which a check of two QEMUs' RAM is refused, even if all pages are equal."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError
from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.qemu.qemu import Qemu
from qmp_tools.qemu.qmp import Qmp
from qmp_tools.ram_check.check import check
from qmp_tools.ram_check.comparison import compare_guests
from qmp_tools.ram_check.guest import Side, live_guest
from qmp_tools.ram_check.migrated import GuestHasRunError, MigrationFailedError, NotMigratedError
from qmp_tools.ram_check.outcome import Check
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.simulated_qemu import SimulatedQemu

PAGES = 4
REGION = MapRegion(0, PAGES * PAGE, "ram", "ram0")


class Sides:
    """The source and the destination of a migration, whose QEMUs have to save their RAM."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._folder = folder
        self.source, self.destination = (
            SimulatedQemu(
                name=f"{name} QEMU",
                ram_fd=stack.enter_context(ram_fd(PAGES * PAGE)),
                regions=[REGION],
                hvas={0: hva},
                state=state,
                migration=migration,
                address=name,
            )
            for name, hva, state, migration in (
                ("source", 0x10000, "postmigrate", {"status": "completed", "ram": {}}),
                ("destination", 0x90000, "paused", {"status": "completed"}),
            )
        )

    def check(self, *, expect_migration: bool = True) -> Check:
        return asyncio.run(self._compare(expect_migration=expect_migration))

    async def _compare(self, *, expect_migration: bool) -> Check:
        async with (
            live_guest(self.source.attached, self._folder) as source,
            live_guest(self.destination.attached, self._folder) as destination,
        ):
            return await compare_guests(source, destination, expect_migration=expect_migration)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(stack, tmp_path)


def test_the_sides_of_a_migration_are_compared(sides: Sides) -> None:
    found = sides.check()
    assert (found.exit_code, found.pages, found.notes) == (0, PAGES, [])
    saved = (0, 0, PAGES * PAGE)
    assert found.source == Side("source", 0, "10.0.2", "postmigrate", "other", *saved)
    assert found.destination == Side("destination", 0, "10.0.2", "paused", "other", *saved)


def source_is_resumed(sides: Sides) -> None:
    sides.source.state = "running"


def destination_is_resumed(sides: Sides) -> None:
    sides.destination.state = "running"


def destination_has_run(sides: Sides) -> None:
    sides.destination.translation_blocks = 1


RUNS = pytest.mark.parametrize(
    "run", [source_is_resumed, destination_is_resumed, destination_has_run]
)


@RUNS
def test_a_guest_that_runs_during_the_comparison_is_refused(
    sides: Sides, run: Callable[[Sides], None]
) -> None:
    sides.destination.on_save = lambda: run(sides)
    with pytest.raises(GuestHasRunError):
        sides.check()
    assert sides.destination.saves == 1


@RUNS
def test_a_guest_that_ran_before_is_refused_before_its_ram_is_read(
    sides: Sides, run: Callable[[Sides], None]
) -> None:
    run(sides)
    with pytest.raises(GuestHasRunError):
        sides.check()
    assert sides.source.saves == sides.destination.saves == 0


@pytest.mark.parametrize("run", [source_is_resumed, destination_is_resumed])
def test_no_guest_may_run_during_a_comparison_without_a_migration(
    sides: Sides, run: Callable[[Sides], None]
) -> None:
    sides.source.migration = sides.destination.migration = {}
    sides.destination.on_save = lambda: run(sides)
    with pytest.raises(UntestableError, match="is running"):
        sides.check(expect_migration=False)
    assert sides.destination.saves == 1


def test_paused_guests_that_have_run_are_compared_if_no_migration_is_expected(sides: Sides) -> None:
    sides.source.migration = sides.destination.migration = {}
    sides.destination.translation_blocks = 7
    found = sides.check(expect_migration=False)
    assert found.exit_code == 0
    assert found.notes == ["no migration was expected, so dmaproof did not check for one"]


def test_guests_that_never_migrated_are_refused_if_a_migration_is_expected(
    sides: Sides,
) -> None:
    sides.source.migration = sides.destination.migration = {}
    with pytest.raises(NotMigratedError):
        sides.check()


def test_a_difference_proves_nothing_if_the_guest_may_have_run(sides: Sides) -> None:
    os.pwrite(sides.source.ram_fd, b"lost", 2 * PAGE)
    sides.destination.translation_blocks = None
    with pytest.raises(GuestHasRunError, match="1 of 4 pages differ, but it is unknown whether"):
        sides.check()


def test_equal_pages_pass_even_if_the_guest_may_have_run(sides: Sides) -> None:
    sides.destination.translation_blocks = None
    assert sides.check().exit_code == 0


def test_a_difference_counts_if_no_migration_was_expected(sides: Sides) -> None:
    os.pwrite(sides.source.ram_fd, b"lost", 2 * PAGE)
    sides.destination.translation_blocks = None
    found = sides.check(expect_migration=False)
    assert (found.exit_code, found.differing) == (1, 1)


def test_a_lost_page_is_located(sides: Sides) -> None:
    os.pwrite(sides.source.ram_fd, b"lost", 2 * PAGE)
    (difference,) = sides.check().differences
    assert (difference.gpa, difference.region, difference.offset) == (2 * PAGE, "ram0", 2 * PAGE)
    assert difference.bytes_differing == 4


def test_guests_of_different_size_are_refused(sides: Sides) -> None:
    sides.destination.regions = [replace(REGION, length=3 * PAGE)]
    with pytest.raises(UntestableError, match=r"source has 16 KiB .* destination 12 KiB"):
        sides.check()


def test_two_sockets_of_one_qemu_are_refused(sides: Sides) -> None:
    sides.destination.hvas = sides.source.hvas
    with pytest.raises(UsageError, match="both sides are the same QEMU"):
        sides.check()


def test_sockets_that_a_supervisor_opened_may_belong_to_two_qemus(sides: Sides) -> None:
    """Such QEMUs have the supervisor's process id in common, but different host addresses."""
    assert sides.source.pid == sides.destination.pid
    assert sides.check().exit_code == 0


def test_one_socket_for_both_sides_is_refused(tmp_path: Path) -> None:
    socket = tmp_path / "qmp"
    socket.touch()
    (tmp_path / "link").symlink_to(socket)
    with pytest.raises(UsageError, match="is given for both sides"):
        asyncio.run(check(socket, tmp_path / "link"))


def test_the_time_of_a_comparison_lies_within_that_of_the_check(sides: Sides) -> None:
    began_s = time.monotonic()
    found = sides.check()
    assert 0 < found.compare_s < time.monotonic() - began_s


class Handle(Qemu):
    """The handle of a simulated QEMU, like that of a caller who has attached to it."""

    def __init__(self, simulated: SimulatedQemu) -> None:
        super().__init__(cast(Qmp, simulated), simulated.pid, simulated.address)
        self._simulated = simulated

    async def status(self) -> str:
        return await self._simulated.status()

    async def monitor(self, command: str) -> str:
        return await self._simulated.monitor(command)


@pytest.fixture
def attached(
    sides: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, Path, float]]:
    """Let `check` attach to the simulated QEMUs; return name, path and timeout of each call."""
    calls = []

    @asynccontextmanager
    async def attach(name: str, path: Path, *, timeout_s: float) -> AsyncIterator[Qemu]:
        calls.append((name, path, timeout_s))
        yield Handle(getattr(sides, path.name))

    monkeypatch.setattr("qmp_tools.qemu.opening.attach", attach)
    monkeypatch.setattr("qmp_tools.ram_check.check.run_folder", lambda: nullcontext(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    return calls


def test_qemus_are_reached_by_the_paths_of_their_sockets(
    attached: list[tuple[str, Path, float]], tmp_path: Path
) -> None:
    found = asyncio.run(check("source", Path("destination"), timeout_s=7.5))
    assert (found.source.address, found.destination.address) == ("source", "destination")
    assert found.exit_code == 0
    assert attached == [
        ("source QEMU", Path("source"), 7.5),
        ("destination QEMU", Path("destination"), 7.5),
    ]
    assert len(list(tmp_path.iterdir())) == 2, "each has saved its RAM in the run's folder"


def test_a_qemu_that_is_given_by_its_handle_is_not_attached_to(
    sides: Sides, attached: list[tuple[str, Path, float]]
) -> None:
    handles = [Handle(sides.source), Handle(sides.destination)]
    assert asyncio.run(check(handles[0], handles[1])).exit_code == 0
    assert attached == []
    assert asyncio.run(check(handles[0], "destination")).exit_code == 0
    assert asyncio.run(check("source", handles[1])).exit_code == 0
    assert [name for name, _, _ in attached] == ["destination QEMU", "source QEMU"]


async def check_while(sides: Sides, change: Callable[[], None], **more: Any) -> Check:
    """Check, and `change` the simulated QEMUs when the check has begun."""
    checking = asyncio.create_task(check("source", "destination", **more))
    await asyncio.sleep(0.2)
    change()
    return await checking


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("source_state", ["postmigrate", "finish-migrate"])
def test_a_destination_that_still_loads_is_awaited(sides: Sides, source_state: str) -> None:
    sides.source.state = source_state
    sides.destination.state, sides.destination.migration = "inmigrate", {"status": "active"}

    def arrive() -> None:
        sides.destination.state = "paused"
        sides.destination.migration = {"status": "completed"}

    assert asyncio.run(check_while(sides, arrive)).exit_code == 0


@pytest.mark.usefixtures("attached")
def test_a_source_that_has_not_sent_everything_is_awaited_only_on_request(sides: Sides) -> None:
    def migrate(status: str) -> None:
        sides.source.state = "running" if status == "active" else "postmigrate"
        sides.source.migration = {"status": status, "ram": {}}
        sides.destination.state = "inmigrate" if status == "active" else "paused"
        sides.destination.migration = {"status": status}

    migrate("active")
    with pytest.raises(NotMigratedError, match=r"source QEMU \(source\) is 'active'"):
        asyncio.run(check("source", "destination"))
    complete = partial(migrate, "completed")
    assert asyncio.run(check_while(sides, complete, wait=True)).exit_code == 0
    migrate("active")
    with pytest.raises(MigrationFailedError, match="is 'cancelled', so there is nothing"):
        asyncio.run(check_while(sides, partial(migrate, "cancelled"), wait=True))
    migrate("active")
    with pytest.raises(WaitTimeoutError, match=r"is 'active' after 0\.1 s"):
        asyncio.run(check("source", "destination", wait=True, timeout_s=0.1))


@pytest.mark.usefixtures("attached")
def test_a_check_expects_a_migration_by_default(sides: Sides) -> None:
    sides.source.migration = sides.destination.migration = {}
    with pytest.raises(NotMigratedError):
        asyncio.run(check("source", "destination"))
    assert asyncio.run(check("source", "destination", expect_migration=False)).exit_code == 0


@pytest.mark.parametrize(
    ("paths", "side"), [((7, "destination"), "source"), (("source", None), "destination")]
)
def test_an_argument_that_is_not_a_path_is_refused_with_its_side(
    paths: tuple[Any, Any], side: str
) -> None:
    with pytest.raises(UsageError, match=f"^{side}: expected the path of a QMP socket"):
        asyncio.run(check(*paths))


@pytest.mark.usefixtures("attached")
def test_the_outcome_of_a_check_is_not_a_truth_value() -> None:
    found = asyncio.run(check("source", "destination"))
    with pytest.raises(UsageError, match=r"call require_equal\(\), or compare exit_code"):
        assert found
