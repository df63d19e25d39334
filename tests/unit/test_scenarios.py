"""The QMP commands of each migration scenario, and the reaction to QEMU's answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from qemu.qmp import EventListener

from dmaproof.errors import UnsupportedError, UsageError
from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.architecture import Architecture
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.host.process import ProcessDiedError
from qmp_tools.migration.migration import (
    Limits,
    Migration,
    MigrationError,
    Progress,
    parse_progress,
)
from qmp_tools.migration.pair import QemuPair
from qmp_tools.migration.procedure import Procedure, UnsupportedScenarioError
from qmp_tools.migration.scenarios import find_scenario, known_scenarios, precopy
from qmp_tools.migration.scenarios.cpr import CprExec, CprTransfer, _successor_command
from qmp_tools.migration.transport import Ends
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import resolve
from qmp_tools.qemu.machine import Hardware, Machine
from qmp_tools.qemu.qmp import Qmp, QmpError, QmpRefusal, QmpTimeoutError

DEFAULT_LIMITS = Limits()
SCENARIOS = {name: find_scenario(name) for name in known_scenarios()}


@pytest.fixture(autouse=True)
def no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace `make_certificates`, which would start openssl."""
    monkeypatch.setattr(precopy, "make_certificates", mock.AsyncMock())


class RecordingQmp:
    """A QEMU that records its commands in `log`, and refuses the command `refused` with `words`."""

    def __init__(self, name: str, log: list[tuple[str, str, dict[str, Any]]]) -> None:
        self.name = name
        self.log = log
        self.refused = ""
        self.words = ""
        self.blocked_reasons: list[str] = []
        self.statuses: list[str] = []
        self.total_times: list[int] = []
        self.run_states: list[str] = []
        self.fds: list[os.stat_result] = []
        self.listener = EventListener()

    async def execute(self, command: str, **arguments: Any) -> Any:
        if command == self.refused:
            raise QmpRefusal(f"{self.name} refused {command}: {self.words}")
        self.log.append((self.name, command, arguments))
        if command == "query-migrate":
            status = self.statuses.pop(0) if self.statuses else "active"
            times = {"total-time": self.total_times.pop(0)} if self.total_times else {}
            address = {"host": "::1", "cid": "1", "port": "4711"}
            blocked = {"blocked-reasons": self.blocked_reasons} if self.blocked_reasons else {}
            return {"status": status, "socket-address": [address], **times, **blocked}
        if command == "query-status" and self.run_states:
            return {"status": self.run_states.pop(0)}
        return {"status": "paused"}

    @contextlib.asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[EventListener]:
        yield self.listener

    async def send_fd(self, fd: int, name: str) -> None:
        self.fds.append(os.fstat(fd))


class RecordedMigration:
    """A migration between two QEMUs that only record their commands."""

    def __init__(
        self,
        folder: Path,
        procedure: Procedure,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.log: list[tuple[str, str, dict[str, Any]]] = []
        self.source = RecordingQmp("source", self.log)
        self.destination = RecordingQmp("destination", self.log)
        self.printed = ""
        ends = Ends(
            cast(Qmp, self.source),
            cast(Qmp, self.destination),
            folder,
            printed=lambda: self.printed,
            joined=self.join,
        )
        self.migration = Migration(ends, procedure, limits)

    async def join(self) -> None:
        self.log.append(("destination", "join", {}))

    def start(self) -> None:
        asyncio.run(self.migration.start())

    def sent(self, name: str, command: str) -> list[dict[str, Any]]:
        return [arguments for *key, arguments in self.log if key == [name, command]]


def test_a_guest_that_does_not_continue_has_no_device_to_kill() -> None:
    options = ProofOptions(scenario="background-snapshot", kill_destination_device=True)
    with pytest.raises(UsageError, match="does not continue the guest on the destination"):
        asyncio.run(resolve(options))


ONLY_IN_PROOFS = {
    *("background-snapshot", "cpr-exec", "cpr-reboot", "cpr-transfer"),
    *("postcopy", "postcopy-multifd", "postcopy-preempt", "postcopy-recover"),
    *("postcopy-running", "postcopy-tls"),
    *("destination-killed", "destination-killed-late", "retry", "ping-pong"),
    *("device-hotplug", "memory-hotplug"),
    *("device-reset", "driver-reload", "guest-reboot", "machine-reset"),
    *("virtio-mem", "nvdimm", "balloon", "free-page-reporting", "free-page-hint"),
    "ignore-shared",
}
PASSABLE = [
    name for name, scenario in SCENARIOS.items() if not isinstance(scenario, CprExec | CprTransfer)
]


@pytest.mark.parametrize("name", PASSABLE)
def test_both_sides_get_the_same_settings_before_the_migration_starts(
    tmp_path: Path, name: str
) -> None:
    scenario = SCENARIOS[name]
    recorded = RecordedMigration(tmp_path, scenario)
    recorded.start()
    for side in ("source", "destination"):
        (capabilities,) = recorded.sent(side, "migrate-set-capabilities")
        assert capabilities["capabilities"] == [
            {"capability": capability, "state": True}
            for capability in ("events", *scenario.capabilities)
        ]
        assert recorded.sent(side, "migrate-set-parameters")[0] == scenario.parameters
    assert recorded.log[-1][:2] == ("source", "migrate")


@pytest.mark.parametrize("name", PASSABLE)
def test_the_destination_reads_what_the_source_writes(tmp_path: Path, name: str) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS[name])
    recorded.start()
    saved_first = SCENARIOS[name].transport.saved_first
    assert bool(recorded.sent("destination", "migrate-incoming")) is not saved_first
    asyncio.run(recorded.migration.load())
    (reading,) = recorded.sent("destination", "migrate-incoming")
    (writing,) = recorded.sent("source", "migrate")
    if reading["uri"] in ("tcp:127.0.0.1:0", "tcp:[::1]:0"):
        assert writing["uri"] == "tcp:[::1]:4711"
    elif reading["uri"] == "vsock:1:4294967295":
        assert writing["uri"] == "vsock:1:4711"
    else:
        assert writing["uri"].split(":")[0] == reading["uri"].split(":")[0]
        assert writing["uri"].split("/")[-1] == reading["uri"].split("/")[-1]


def test_a_destination_that_joins_by_a_channel_gets_its_commands_afterwards(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["cpr-transfer"])
    recorded.start()
    steps = [(name, command) for name, command, _ in recorded.log if command != "query-status"]
    assert steps == [
        ("source", "migrate-set-capabilities"),
        ("source", "migrate-set-parameters"),
        ("source", "migrate-set-parameters"),
        ("source", "migrate"),
        ("destination", "join"),
        ("destination", "migrate-incoming"),
    ]
    (writing,) = recorded.sent("source", "migrate")
    (reading,) = recorded.sent("destination", "migrate-incoming")
    assert [channel["channel-type"] for channel in writing["channels"]] == ["main", "cpr"]
    assert reading["channels"] == writing["channels"][:1]


def test_a_cpr_exec_migration_is_over_when_the_new_program_has_joined(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["cpr-exec"])
    recorded.start()
    steps = [(name, command) for name, command, _ in recorded.log[-3:]]
    assert steps == [
        ("source", "migrate"),
        ("destination", "join"),
        ("destination", "query-migrate"),
    ]
    asyncio.run(recorded.migration.load())
    assert not recorded.sent("destination", "migrate-incoming")
    assert len(recorded.migration.history) == 1


class _PairToExecuteAgain:
    """A pair whose source has the device of a CCW machine."""

    folder = Path("/run")
    source_side, destination_side = "source", "destination"

    def __init__(self) -> None:
        self.attached = {"source": ["-device", "virtio-net-ccw,netdev=a"]}
        self.source = mock.Mock()
        self.source.process.command = [
            *("qemu", "-device", "sclpconsole", "-chardev", "socket,id=qmp,fd=5"),
            *(*self.attached["source"], "-append", ""),
        ]

    async def attach_device(self, side: str) -> list[str]:
        return ["-device", f"virtio-net-ccw,netdev={side}"]


def test_a_qemu_that_is_executed_again_has_the_destinations_device_on_the_same_bus() -> None:
    command = asyncio.run(_successor_command(cast(QemuPair, _PairToExecuteAgain())))
    assert command == [
        *("qemu", "-device", "sclpconsole"),
        *("-chardev", "socket,id=qmp,path=/run/successor-qmp.sock,server=on,wait=off"),
        *("-device", "virtio-net-ccw,netdev=destination", "-append", ""),
    ]


def test_a_socket_pair_is_sent_and_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    recorded = RecordedMigration(tmp_path, SCENARIOS["fd"])
    recorded.start()
    ((source,), (destination,)) = recorded.source.fds, recorded.destination.fds
    assert source.st_ino != destination.st_ino
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_each_side_has_its_certificate(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["tls"])
    recorded.start()
    endpoints = [
        recorded.sent(side, "object-add")[0]["endpoint"] for side in ("source", "destination")
    ]
    assert endpoints == ["client", "server"]


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("command", ["migrate-set-capabilities", "migrate-set-parameters"])
def test_a_refused_setting_means_that_qemu_does_not_support_the_scenario(
    tmp_path: Path, side: str, command: str
) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["multifd-zstd"])
    qmp = getattr(recorded, side)
    qmp.refused, qmp.words = command, "it does not accept value 'zstd'"
    with pytest.raises(UnsupportedScenarioError, match=f"scenario: {side} .* value 'zstd'"):
        recorded.start()
    assert not recorded.sent("source", "migrate")


@pytest.mark.parametrize("command", ["migrate-set-parameters", "migrate-incoming"])
def test_a_refusal_names_the_settings_that_the_user_added(tmp_path: Path, command: str) -> None:
    scenario = find_scenario("unix")
    scenario.extend(["mapped-ram"], {"multifd-channels": "x"})
    recorded = RecordedMigration(tmp_path, scenario)
    recorded.destination.refused = command
    expected = f"scenario with --capability mapped-ram --parameter multifd-channels: .* {command}"
    with pytest.raises(UnsupportedScenarioError, match=expected):
        recorded.start()


def test_a_device_that_blocks_migrations_is_not_supported(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["unix"])
    recorded.source.refused, recorded.source.words = "migrate", "a device blocks it"
    recorded.source.blocked_reasons = ["a device blocks it"]
    with pytest.raises(UnsupportedError, match=r"one of the machine's devices: .* blocks it"):
        recorded.start()


def test_a_migration_that_qemu_refuses_is_a_failure(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["unix"])
    recorded.source.refused, recorded.source.words = "migrate", "a device blocks it"
    with pytest.raises(QmpRefusal, match="a device blocks it"):
        recorded.start()


@pytest.mark.parametrize(
    ("words", "printed", "reason"),
    [
        ("Postcopy is not supported: not capable of postcopy", "", "as it must"),
        ("Postcopy is not supported", "backend not capable of postcopy", "as it must"),
        (
            "Postcopy is not supported",
            "userfaultfd: not permitted",
            "does not support the migration scenario",
        ),
    ],
)
def test_postcopy_is_refused(tmp_path: Path, words: str, printed: str, reason: str) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["postcopy"])
    recorded.destination.refused, recorded.destination.words = "migrate-set-capabilities", words
    recorded.printed = printed
    with pytest.raises(UnsupportedScenarioError, match=reason):
        recorded.start()


def test_memory_that_userfaultfd_does_not_know_is_not_supported_in_postcopy() -> None:
    words = "ram_block_enable_notify userfault register: Invalid argument"
    died = ProcessDiedError(f"destination QEMU ended with exit code 1\n{words}", killed=False)
    explained = SCENARIOS["postcopy"].explain_failure(died)
    assert isinstance(explained, UnsupportedScenarioError)
    assert words in str(explained)
    other = ProcessDiedError("destination QEMU ended with exit code 1", killed=False)
    assert SCENARIOS["postcopy"].explain_failure(other) is other


def test_the_lowest_bandwidth_is_not_no_limit(tmp_path: Path) -> None:
    async def limit(migration: Migration) -> None:
        await migration.start()
        await migration.limit_bandwidth(1)

    recorded = RecordedMigration(tmp_path, SCENARIOS["unix"])
    asyncio.run(limit(recorded.migration))
    limited = recorded.sent("source", "migrate-set-parameters")[-1]
    assert limited == {"max_bandwidth": 10}, "QEMU takes a tenth of its limit, and 0 for no limit"


def test_the_precopy_of_a_postcopy_has_sent_all_when_it_has_sent_as_many_pages(
    tmp_path: Path,
) -> None:
    def progress(*, syncs: int, sent: int) -> Progress:
        ram = {"total": 8 << 12, "page-size": 4096, "dirty-sync-count": syncs, "normal": sent}
        return parse_progress({"status": "active", "ram": ram})

    precopy, postcopy = (
        RecordedMigration(tmp_path, SCENARIOS[name]).migration for name in ("unix", "postcopy")
    )
    assert precopy.has_sent_all(progress(syncs=2, sent=8))
    assert not postcopy.has_sent_all(progress(syncs=20, sent=7))
    assert postcopy.has_sent_all(progress(syncs=2, sent=8))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, scenario in SCENARIOS.items()
        if scenario.exercised_by and type(scenario).is_exercised_in is Procedure.is_exercised_in
    ],
)
def test_a_scenario_is_exercised_only_when_it_was_used(name: str) -> None:
    scenario = SCENARIOS[name]
    *parts, last = (scenario.exercised_by or "").split(".")
    for value in (0, 7):
        answer: dict[str, Any] = {last: value}
        for part in reversed(parts):
            answer = {part: answer}
        assert scenario.is_exercised_in(answer) is (value > 0)
    assert not scenario.is_exercised_in({})


def test_scenarios_that_need_the_processes_of_a_proof_do_not_suit_other_guests() -> None:
    only_in_proofs = {name for name, scenario in SCENARIOS.items() if not scenario.suits_any_guest}
    assert only_in_proofs == ONLY_IN_PROOFS


class RecordingPair:
    """A pair that records its steps; the first step raises `failure`, if there is one."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.steps: list[str] = []
        self.failure = failure

    async def guarded(self, work: Coroutine[Any, Any, None]) -> None:
        await work

    def __getattr__(self, step: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def take() -> None:
            if self.failure is not None:
                raise self.failure
            self.steps.append(step)

        return take


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("unix", ["start_both", "boot"]),
        ("memory-hotplug", ["start_source", "boot", "plug_dimm", "start_destination"]),
        (
            "device-hotplug",
            ["start_source_without_devices", "boot_and_plug_devices", "start_destination"],
        ),
        ("cpr-transfer", ["start_source", "boot"]),
    ],
)
def test_a_destination_starts_when_the_source_has_its_devices(name: str, steps: list[str]) -> None:
    pair = RecordingPair()
    asyncio.run(SCENARIOS[name].start(cast(QemuPair, pair)))
    assert pair.steps == steps


def test_a_dimm_is_plugged_before_each_destination_starts() -> None:
    for name, steps in (("ping-pong", []), ("memory-hotplug", ["plug_dimm"])):
        pair = RecordingPair()
        asyncio.run(SCENARIOS[name].start_return(cast(QemuPair, pair)))
        assert pair.steps == [*steps, "start_destination"]


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (QmpError("Property 'aux-ram-share' not found"), UnsupportedScenarioError),
        (QmpTimeoutError("no answer within 60 s"), QmpTimeoutError),
    ],
)
def test_a_refused_machine_option_means_no_support_but_a_timeout_does_not(
    failure: Exception, raised: type[Exception]
) -> None:
    pair = RecordingPair(failure)
    with pytest.raises(raised):
        asyncio.run(SCENARIOS["cpr-transfer"].start(cast(QemuPair, pair)))
    with pytest.raises(type(failure)):
        asyncio.run(SCENARIOS["unix"].start(cast(QemuPair, pair)))


@pytest.mark.parametrize("statuses", [["cancelling", "cancelled"], ["cancelled"]])
def test_a_cancelled_migration_is_over(tmp_path: Path, statuses: list[str]) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["retry"])
    recorded.source.statuses = statuses
    asyncio.run(recorded.migration.cancel())
    assert recorded.log[0][:2] == ("source", "migrate_cancel")


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_migration_that_ends_in_another_state_is_reported(tmp_path: Path, status: str) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["retry"])
    recorded.source.statuses = ["active", status]
    with pytest.raises(MigrationError, match=f"to be 'cancelled', but it is '{status}'"):
        asyncio.run(recorded.migration.cancel())


def test_a_migration_fails_when_its_destination_has_ended(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["destination-killed"])
    recorded.source.statuses, recorded.source.run_states = (
        ["active", "failed"],
        ["paused", "running"],
    )
    asyncio.run(recorded.migration.fail())
    assert not recorded.sent("source", "migrate-continue")


@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "converged too soon"])
def test_a_migration_that_waits_for_switchover_fails_when_it_continues(
    tmp_path: Path, wanted: bool
) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["destination-killed-late"])
    recorded.source.statuses = ["active", "pre-switchover", "pre-switchover", "failed"]
    recorded.source.run_states = ["running"]
    if wanted:
        asyncio.run(recorded.migration.pause_before_switchover())
    asyncio.run(recorded.migration.fail())
    assert recorded.sent("source", "migrate-continue") == [{"state": "pre-switchover"}]


def test_a_migration_that_waits_for_switchover_continues(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["unix"])
    recorded.source.statuses = ["active", "pre-switchover", "pre-switchover", "completed"]
    assert len(asyncio.run(_progress_of(recorded.migration))) == 4
    assert recorded.sent("source", "migrate-continue") == [{"state": "pre-switchover"}]


async def _progress_of(migration: Migration) -> list[Progress]:
    return [progress async for progress in migration.follow()]


def test_a_migration_that_completes_without_its_destination_is_reported(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["destination-killed"])
    recorded.source.statuses = ["active", "completed"]
    with pytest.raises(MigrationError, match="to be 'failed', but it is 'completed'"):
        asyncio.run(recorded.migration.fail())


def test_a_source_that_stays_paused_is_reported(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["destination-killed"], Limits(timeout_s=0.1))
    recorded.source.statuses = ["failed"]
    with pytest.raises(
        MigrationError, match=r"did not continue its guest within .*: the source is 'paused'"
    ):
        asyncio.run(recorded.migration.fail())


def test_a_migration_that_does_not_pause_before_switchover_is_reported(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["destination-killed-late"])
    recorded.source.statuses = ["completed"]
    with pytest.raises(MigrationError, match="has completed, although the capability pause"):
        asyncio.run(recorded.migration.pause_before_switchover())


def test_a_migration_is_over_only_when_its_times_are_known(tmp_path: Path) -> None:
    recorded = RecordedMigration(tmp_path, SCENARIOS["unix"])
    recorded.source.statuses, recorded.source.total_times = ["completed", "completed"], [0, 7]
    with pytest.raises(MigrationError, match="is 'completed'"):
        asyncio.run(recorded.migration.cancel())
    assert [look.elapsed_s for look in recorded.migration.history] == [0, 0.007]


@pytest.mark.parametrize(
    ("architecture", "address"), [(X86_64, "addr"), (AARCH64, "memaddr")], ids=["x86_64", "aarch64"]
)
def test_plugged_memory_is_the_same_on_both_sides(architecture: Architecture, address: str) -> None:
    machine = Machine(architecture, architecture.machine, "tcg", 128 << 20, 1, Path("kernel"))
    plugged, started = machine.dimm_arguments(0), machine.dimm_arguments(0, 1 << 32)
    assert started == [*plugged[:-1], f"{plugged[-1]},{address}=0x100000000"]


def test_plugged_memory_has_a_port_where_it_needs_one() -> None:
    machine = Machine(AARCH64, "virt", "tcg", 128 << 20, 1, Path("kernel"), added=Hardware(dimms=2))
    ports = [word for word in machine.arguments() if word.startswith("pcie-root-port")]
    for number, port in enumerate(ports):
        assert f",bus={port.split(',id=')[1].split(',')[0]}" in machine.dimm_arguments(number)[-1]
    assert len(ports) == 2


def test_a_machine_has_room_for_its_dimms() -> None:
    machine = Machine(X86_64, "q35", "tcg", 128 << 20, 1, Path("kernel"), added=Hardware(dimms=2))
    assert machine.arguments()[machine.arguments().index("-m") + 1] == (
        "131072K,slots=2,maxmem=393216K"
    )
