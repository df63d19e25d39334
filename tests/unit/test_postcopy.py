"""The postcopy scenarios: when they switch, break and end, and what they have tested."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.devices.inside_qemu import InsideQemu
from qmp_tools.host.process import ProcessDiedError
from qmp_tools.migration.attempt import Attempt
from qmp_tools.migration.hold import PrecopyHold
from qmp_tools.migration.migration import MigrationTimeoutError, Progress, parse_progress
from qmp_tools.migration.scenarios import find_scenario, postcopy
from qmp_tools.migration.scenarios.postcopy import (
    Postcopy,
    PostcopyPreempt,
    PostcopyRecover,
    PostcopyRunning,
)
from qmp_tools.qemu.qmp import QmpRefusal

FAULT = "vhost_user_postcopy_fault_handler vhost-user: @0x7f24b2905000 nregions:1\n"


def at(status: str) -> Progress:
    return parse_progress({"status": status})


class PostcopyAttempt:
    """An attempt whose QEMUs record their commands, and whose device has waited for pages."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self.wait_for_pages(0)
        self.log: list[tuple[object, ...]] = []
        self.status = "postcopy-paused"
        self.refusals: list[QmpRefusal] = []
        self.source = self.qmp("source")
        self.destination = self.qmp("destination")
        self.guest = mock.AsyncMock(latest={"quiet": ""})
        self.guest.number = lambda verb, key: 100
        self.migration = mock.AsyncMock(moments={"postcopy-active": 1})
        ends = SimpleNamespace(
            source=self.source, destination=self.destination, folder=trace.parent
        )
        self.pair = SimpleNamespace(
            source=SimpleNamespace(qmp=self.source),
            destination=SimpleNamespace(qmp=self.destination),
            destination_side="destination",
            source_guest=self.guest,
            timeout_s=1.0,
            ends=lambda: ends,
            trace=lambda side: {"destination": trace}[side],
        )

    def qmp(self, name: str) -> Any:
        async def execute(command: str, **arguments: object) -> dict[str, str]:
            if command == "query-migrate":
                return {"status": self.status}
            self.log.append((name, command, *arguments.values()))
            return {}

        async def execute_out_of_band(command: str, **arguments: object) -> None:
            if self.refusals:
                raise self.refusals.pop()
            self.log.append((f"{name}, out of band", command, *arguments.values()))

        return SimpleNamespace(execute=execute, execute_out_of_band=execute_out_of_band)

    def wait_for_pages(self, count: int) -> None:
        self._trace.write_text(FAULT * count)

    def step(self, scenario: Postcopy, status: str = "postcopy-active") -> None:
        asyncio.run(scenario.follow_postcopy(cast(Attempt, self), at(status)))

    def untested(self, scenario: Postcopy) -> str | None:
        return scenario.untested(cast(Attempt, self))


@pytest.fixture
def attempt(tmp_path: Path) -> PostcopyAttempt:
    return PostcopyAttempt(tmp_path / "trace")


def test_a_migration_that_stayed_in_precopy_tested_no_postcopy(attempt: PostcopyAttempt) -> None:
    assert attempt.untested(Postcopy()) is None
    attempt.migration.moments = {"STOP": 1, "completed": 2}
    for scenario in (Postcopy(), PostcopyRunning(), PostcopyRecover()):
        assert "completed before it switched to postcopy" in (attempt.untested(scenario) or "")


def test_a_device_that_hardly_waited_tested_too_little(attempt: PostcopyAttempt) -> None:
    attempt.wait_for_pages(7)
    assert "waited for only 7 pages" in (attempt.untested(PostcopyRunning()) or "")
    attempt.wait_for_pages(8)
    assert attempt.untested(PostcopyRunning()) is None


def test_a_bandwidth_that_lets_no_device_wait_is_named(attempt: PostcopyAttempt) -> None:
    scenario = PostcopyRunning()
    scenario.extend([], {"max-postcopy-bandwidth": 0})
    attempt.wait_for_pages(7)
    assert (attempt.untested(scenario) or "").endswith(
        "leave out --parameter max-postcopy-bandwidth"
    )


def test_the_other_pages_arrive_once_the_device_has_waited(attempt: PostcopyAttempt) -> None:
    scenario = PostcopyRunning()
    attempt.wait_for_pages(7)
    attempt.step(scenario)
    assert not attempt.log
    attempt.wait_for_pages(9)
    attempt.step(scenario)
    attempt.step(scenario)
    assert attempt.log == [("source", "migrate-set-parameters", 0)]


def test_the_guest_continues_at_the_switchover_and_not_before_pages_are_dirty(
    attempt: PostcopyAttempt,
) -> None:
    async def waited(reached: Any, what: str) -> None:
        assert not reached(), "no request was done since"
        attempt.guest.number = lambda verb, key: 356
        assert reached()
        assert not attempt.log
        hold.rest.assert_awaited_once_with()

    hold = mock.AsyncMock()
    attempt.guest.wait_for = waited
    scenario = PostcopyRunning()
    asyncio.run(scenario.end_precopy(cast(Attempt, attempt), cast(PrecopyHold, hold)))
    assert attempt.log == [("destination", "cont")]
    attempt.migration.start_postcopy.assert_awaited_once_with()


def test_the_connection_breaks_twice_while_the_device_waits(attempt: PostcopyAttempt) -> None:
    scenario = PostcopyRecover()
    attempt.step(scenario)
    assert not attempt.log, "the device has not waited for any page"
    for count, status in ((1, "postcopy-active"), (1, "postcopy-active"), (2, "postcopy-recover")):
        attempt.wait_for_pages(count)
        attempt.step(scenario, status)
    first = f"unix:{attempt.pair.ends().folder / 'recovery-1.sock'}"
    assert attempt.log == [
        ("source", "migrate-pause"),
        ("destination, out of band", "migrate-recover", first),
        ("source", "migrate", first, True),
    ]
    attempt.wait_for_pages(8)
    assert "broken only 1 times, expected 2" in (attempt.untested(scenario) or "")
    attempt.step(scenario)
    assert attempt.untested(scenario) is None
    assert len(attempt.log) == 6
    attempt.step(scenario)
    assert attempt.log[6:] == [("source", "migrate-set-parameters", 0)]


def test_a_side_that_does_not_notice_the_break_is_named(
    attempt: PostcopyAttempt,
) -> None:
    attempt.pair.timeout_s = 0.01
    attempt.status = "postcopy-active"
    attempt.wait_for_pages(1)
    with pytest.raises(
        MigrationTimeoutError, match=r"the source has not noticed .* 'postcopy-active'"
    ):
        attempt.step(PostcopyRecover())


def test_a_destination_is_asked_to_recover_until_it_has_noticed_the_break(
    attempt: PostcopyAttempt,
) -> None:
    attempt.wait_for_pages(1)
    attempt.refusals = [QmpRefusal("postcopy is not paused")]
    attempt.step(PostcopyRecover())
    assert attempt.log[1][:2] == ("destination, out of band", "migrate-recover")
    attempt.pair.timeout_s = 0.01
    attempt.refusals = [QmpRefusal("postcopy is not paused")] * 1000
    with pytest.raises(
        MigrationTimeoutError, match=r"the destination has not noticed .*: postcopy is not paused"
    ):
        attempt.step(PostcopyRecover())


@pytest.mark.parametrize("switched", [False, True])
def test_a_killed_process_after_the_switchover_means_that_the_guest_is_lost(
    attempt: PostcopyAttempt, switched: bool
) -> None:
    scenario = Postcopy()
    if switched:
        asyncio.run(scenario.end_precopy(cast(Attempt, attempt), None))
    killed = ProcessDiedError("source QEMU was killed by SIGKILL", killed=True)
    explained = scenario.explain_failure(killed)
    assert ("The guest is lost" in str(explained)) is switched
    assert str(explained).startswith("source QEMU was killed by SIGKILL")


@pytest.mark.parametrize(
    "error",
    [
        ProcessDiedError("destination QEMU ended with exit code 1", killed=False),
        ProcessDiedError(
            "destination QEMU was killed by SIGABRT\nerror while loading state for instance 0x0 of "
            "device '0000:00:02.0/virtio-blk'",
            killed=True,
        ),
        UntestableError("anything else"),
    ],
)
def test_other_failures_are_not_explained(attempt: PostcopyAttempt, error: UntestableError) -> None:
    scenario = Postcopy()
    asyncio.run(scenario.end_precopy(cast(Attempt, attempt), None))
    assert scenario.explain_failure(error) is error


def test_a_hang_with_preempt_is_explained() -> None:
    late = MigrationTimeoutError("the migration has not completed within 300 s")
    assert "QEMU 10.0 and 11.1 never complete" in str(PostcopyPreempt().explain_failure(late))
    assert PostcopyRunning().explain_failure(late) is late


def test_a_running_destination_needs_a_device_with_a_journal() -> None:
    device = InsideQemu("virtio-blk-pci", 2)
    Postcopy().require_device(device)
    for scenario in (PostcopyRunning(), PostcopyPreempt(), PostcopyRecover()):
        with pytest.raises(
            UsageError, match=f"{scenario.name} with --device .* use --scenario postcopy"
        ):
            scenario.require_device(device)


def test_the_certificates_of_tls_are_made_for_postcopy_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = mock.AsyncMock()
    monkeypatch.setattr(postcopy, "give_certificates", given)
    ends = SimpleNamespace()
    asyncio.run(find_scenario("postcopy-tls").set_up(cast(Any, ends)))
    given.assert_awaited_once_with(ends)
