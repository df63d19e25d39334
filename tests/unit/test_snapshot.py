"""Snapshots of simulated guests: what they keep, and when they are taken."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.host.exit_hold import ExitHold
from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.memory.ram_blocks import RamBlock
from qmp_tools.qemu.qmp import QmpClosedError
from qmp_tools.ram_check.check import check
from qmp_tools.ram_check.comparison import compare_guests
from qmp_tools.ram_check.discarded import Discarder
from qmp_tools.ram_check.guest import live_guest
from qmp_tools.ram_check.migrated import (
    ENDED,
    GuestHasRunError,
    MigrationFailedError,
    NotMigratedError,
    guest_state,
)
from qmp_tools.ram_check.snapshot import (
    Snapshot,
    WaitForSnapshotError,
    complete_snapshot,
    write_failure,
    write_snapshot,
)
from qmp_tools.ram_check.snapshot_file import create
from qmp_tools.ram_check.switchover import HeldSource
from qmp_tools.testbed.ring_driver import PAGE, ram_fd
from support.simulated_qemu import SimulatedQemu

FIRMWARE = 0xE0000
PAGES = FIRMWARE // PAGE + 32
"""The RAM ends 16 pages after the firmware's low memory."""
CLOCK = FIRMWARE + 3 * PAGE
BLOCKS = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000000100000 0x0000000000100000
"""
SENT = {"status": "completed", "ram": {}}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def qemu_of(stack: ExitStack, name: str, **more: Any) -> SimulatedQemu:
    """Return a QEMU that has to save its RAM."""
    return SimulatedQemu(
        name=f"{name} QEMU",
        address=f"/run/{name}",
        ram_fd=stack.enter_context(ram_fd(PAGES * PAGE)),
        regions=[MapRegion(0, PAGES * PAGE, "ram", "ram0")],
        hvas={0: 0x10000 * len(name)},
        **more,
    )


def save(qemu: SimulatedQemu, path: Path, *, with_content: bool = False) -> Snapshot:
    async def write() -> None:
        async with live_guest(qemu.attached, path.parent) as guest:
            with create(path) as file:
                await write_snapshot(guest, await guest.state(), file, with_content=with_content)

    asyncio.run(write())
    return Snapshot.read(path)


def test_a_snapshot_keeps_what_qemu_reported(stack: ExitStack, tmp_path: Path) -> None:
    qemu = qemu_of(
        stack,
        "source",
        migration=SENT,
        ram_blocks=BLOCKS,
        capabilities=["postcopy-ram"],
        backends=[{"id": "ram0", "size": PAGES * PAGE}],
        memory_devices=[
            {"type": "dimm", "data": {"id": "dimm0", "addr": PAGE, "size": PAGE}},
            {
                "type": "virtio-mem",
                "data": {"memaddr": 1 << 32, "size": 0, "max-size": 1 << 30, "block-size": 1 << 21},
            },
        ],
    )
    snapshot = save(qemu, tmp_path / "a.snap")
    assert snapshot.facts.address == "/run/source"
    assert snapshot.facts.host == os.uname().nodename
    assert snapshot.facts.taken is not None
    assert snapshot.facts.taken.endswith("+00:00")
    assert snapshot.ram.dimms["dimm0"] == (PAGE, PAGE)
    assert snapshot.ram.backends == {"ram0": PAGES * PAGE}
    assert snapshot.blocks == [RamBlock("ram0", 0, 1 << 20)]
    assert snapshot.capabilities == ["postcopy-ram"]
    assert snapshot.discarders == [Discarder("virtio-mem without an id", 1 << 32, 5 << 30, 1 << 21)]
    state = asyncio.run(snapshot.state())
    assert (state.run_state, state.migration, state.has_sent) == ("postmigrate", "completed", True)
    assert state.name == f"source QEMU (/run/source) in {tmp_path / 'a.snap'}"


def compared(before: Snapshot, qemu: SimulatedQemu, folder: Path) -> Any:
    async def compare() -> Any:
        async with live_guest(qemu.attached, folder) as guest:
            return await compare_guests(before, guest)

    return asyncio.run(compare())


def test_the_bytes_that_differ_are_counted_if_they_are_known(
    stack: ExitStack, tmp_path: Path
) -> None:
    source = qemu_of(stack, "source", migration=SENT)
    destination = qemu_of(stack, "destination", state="paused")
    for page in (2, 3):
        os.pwrite(source.ram_fd, b"abcd", page * PAGE)
    os.pwrite(destination.ram_fd, b"abxx", 2 * PAGE)
    os.pwrite(destination.ram_fd, b"abcd", 3 * PAGE)
    os.pwrite(destination.ram_fd, b"new", 5 * PAGE)
    for with_content, expected in ((False, [None, 3]), (True, [2, 3])):
        before = save(source, tmp_path / "a.snap", with_content=with_content)
        found = compared(before, destination, tmp_path)
        assert [each.bytes_differing for each in found.differences] == expected
        assert [each.gpa for each in found.differences] == [2 * PAGE, 5 * PAGE]


def test_the_content_of_pages_with_known_differences_is_always_saved(
    stack: ExitStack, tmp_path: Path
) -> None:
    source = qemu_of(stack, "source", migration=SENT, kvm=True)
    destination = qemu_of(stack, "destination", state="paused", kvm=True)
    os.pwrite(source.ram_fd, b"time", CLOCK)
    os.pwrite(destination.ram_fd, b"mite", CLOCK)
    found = compared(save(source, tmp_path / "a.snap"), destination, tmp_path)
    assert [each.known for each in found.differences] == ["pvclock"]
    assert found.exit_code == 0


def test_a_source_that_had_not_migrated_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    source = qemu_of(stack, "source", state="paused", migration={})
    destination = qemu_of(stack, "destination", state="paused")
    with pytest.raises(NotMigratedError, match=r"source QEMU \(/run/source\) in .*a\.snap has not"):
        compared(save(source, tmp_path / "a.snap"), destination, tmp_path)


def test_a_snapshot_of_a_destination_that_had_run_is_refused(
    stack: ExitStack, tmp_path: Path
) -> None:
    source = save(qemu_of(stack, "source", migration=SENT), tmp_path / "a.snap")
    ran = save(
        qemu_of(stack, "destination", state="paused", translation_blocks=1), tmp_path / "b.snap"
    )
    with pytest.raises(GuestHasRunError, match=r"b\.snap is paused, but has run since"):
        asyncio.run(compare_guests(source, ran))


def test_the_index_is_plain_json(stack: ExitStack, tmp_path: Path) -> None:
    """Other programs read it by its length at the end of the file."""
    save(qemu_of(stack, "source", migration=SENT), tmp_path / "a.snap")
    content = (tmp_path / "a.snap").read_bytes()
    assert content.endswith(b"end of snapshot\n")
    length = int.from_bytes(content[-24:-16], "little")
    index = json.loads(content[-24 - length : -24])
    assert sum(piece["pages"] for piece in index["pieces"]) == PAGES
    assert [piece["gpa"] for piece in index["pieces"]] == [0, FIRMWARE, FIRMWARE + 16 * PAGE]


def with_index(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the content of a snapshot with a changed index."""
    length = int.from_bytes(content[-24:-16], "little")
    index = json.loads(content[-24 - length : -24])
    change(index)
    text = json.dumps(index).encode()
    return content[: -24 - length] + text + len(text).to_bytes(8, "little") + content[-16:]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("discarders"),
        lambda index: index["state"].pop("run_state"),
        lambda index: index["state"].update(has_run=0),
        lambda index: index["regions"].append("ram"),
        lambda index: index["regions"][0].update(kind=None),
        lambda index: index["regions"][0].update(length=-1),
        lambda index: index["regions"][0].update(hva="0x10"),
        lambda index: index["capabilities"].append(1),
        lambda index: index.update(backends=[]),
        lambda index: index.update(dimms={"dimm0": [1]}),
        lambda index: index["pieces"][0].update(position=True),
        lambda index: index["pieces"][0].update(pages=1 << 40),
        lambda index: index["pieces"][0].update(zero_runs=1e9),
    ],
)
def test_a_damaged_index_is_refused(
    stack: ExitStack, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "a.snap"
    save(qemu_of(stack, "source", migration=SENT), path)
    path.write_bytes(with_index(path.read_bytes(), change))
    with pytest.raises(UntestableError, match=r"a\.snap is not a complete snapshot \("):
        Snapshot.read(path)


def test_members_of_a_later_version_are_ignored(stack: ExitStack, tmp_path: Path) -> None:
    def add(index: dict[str, Any]) -> None:
        for members in (index, index["state"], index["side"], index["regions"][0]):
            members["new"] = [{}]

    path = tmp_path / "a.snap"
    save(qemu_of(stack, "source", migration=SENT), path)
    path.write_bytes(with_index(path.read_bytes(), add))
    assert Snapshot.read(path).facts.address == "/run/source"


def test_a_reader_gets_the_reason_if_there_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "a.snap"
    with create(path) as file:
        file.write(b"some data")
        write_failure(file, "the migration failed")
    with pytest.raises(UntestableError, match=r"a\.snap has no snapshot: the migration failed"):
        Snapshot.read(path)
    with pytest.raises(UntestableError, match=r"cannot read .*: No such file"):
        Snapshot.read(tmp_path / "missing")


def test_a_check_waits_for_the_program_that_writes_the_snapshot(
    stack: ExitStack, tmp_path: Path
) -> None:
    complete = save(qemu_of(stack, "source", migration=SENT), tmp_path / "done.snap")
    path = tmp_path / "a.snap"

    async def wait(timeout_s: float) -> Snapshot:
        async with complete_snapshot(path, timeout_s) as snapshot:
            with pytest.raises(UsageError, match="another program writes or reads the snapshot"):
                create(path)
            return snapshot

    async def read() -> Snapshot:
        with create(path) as file:
            with pytest.raises(WaitForSnapshotError, match=r"has not finished within 0\.01 s"):
                await wait(0.01)
            reading = asyncio.create_task(wait(60))
            await asyncio.sleep(0.1)
            assert not reading.done()
            file.seek(0)
            file.write((tmp_path / "done.snap").read_bytes())
        return await reading

    assert asyncio.run(read()).facts.taken == complete.facts.taken
    create(path).close()


def test_check_takes_snapshots_and_their_files(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.check.run_folder", lambda: nullcontext(tmp_path))
    paths = [tmp_path / "a.snap", tmp_path / "b.snap"]
    snapshot = save(qemu_of(stack, "source", migration=SENT), paths[0])
    save(qemu_of(stack, "destination", state="paused"), paths[1])
    for source in (snapshot, paths[0], str(paths[0])):
        found = asyncio.run(check(source, paths[1]))
        assert (found.exit_code, found.pages) == (0, PAGES)
        assert (found.source.snapshot, found.destination.snapshot) == (
            str(paths[0]),
            str(paths[1]),
        )


def test_a_file_that_is_not_a_snapshot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.check.run_folder", lambda: nullcontext(tmp_path))
    image, other = tmp_path / "image", tmp_path / "other"
    image.write_bytes(bytes(PAGE))
    with pytest.raises(UsageError, match=r"^source: .*image is a file, but not a snapshot"):
        asyncio.run(check(image, other))


def test_two_snapshots_of_one_qemu_are_not_the_sides_of_a_migration(
    stack: ExitStack, tmp_path: Path
) -> None:
    qemu = qemu_of(stack, "source", migration=SENT, pid=os.getpid())
    before, after = (save(qemu, tmp_path / f"{name}.snap") for name in "ab")
    with pytest.raises(UsageError, match=f"both sides are the same QEMU .process {os.getpid()}"):
        asyncio.run(compare_guests(before, after))
    assert asyncio.run(compare_guests(before, after, expect_migration=False)).exit_code == 0
    other = qemu_of(stack, "destination", state="paused", pid=os.getpid())
    assert asyncio.run(compare_guests(before, save(other, tmp_path / "c.snap"))).exit_code == 0


def test_a_file_that_this_user_may_not_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmp_tools.ram_check.check.run_folder", lambda: nullcontext(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "a.snap").write_bytes(b"")
    with pytest.raises(UntestableError, match=r"^source: this user may not read .*a\.snap$"):
        asyncio.run(check(tmp_path / "a.snap", tmp_path / "other"))


class Hold:
    """A hold of a process that ends, or not, as a test says."""

    def __init__(self) -> None:
        self.end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def ended(self) -> bool:
        return await self.end


class Source:
    """A held source, whose QEMU and process a test controls."""

    def __init__(self, qemu: SimulatedQemu, folder: Path) -> None:
        self.qemu = qemu
        self._folder = folder

    async def __aenter__(self) -> Source:
        self.hold = Hold()
        self._stack = AsyncExitStack()
        self.held = HeldSource(self.qemu.attached, self._folder, await guest_state(self._attached))
        self._stack.push_async_callback(self.held.close)
        await self.held.open()
        self.held.hold = cast(ExitHold, self.hold)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    @property
    def _attached(self) -> Any:
        return self.qemu.attached


@pytest.fixture
def source(stack: ExitStack, tmp_path: Path) -> Source:
    return Source(qemu_of(stack, "source", state="running", migration={}), tmp_path)


def test_the_switchover_is_the_end_of_the_migration(source: Source) -> None:
    async def wait() -> tuple[str, str]:
        async with source:
            waiting = asyncio.create_task(source.held.wait_for_switchover())
            for status in ("setup", "active", "device"):
                source.qemu.migration = {"status": status}
                await asyncio.sleep(0.1)
                assert not waiting.done()
            source.qemu.regions = [MapRegion(0, PAGE, "ram", "moved")]
            source.qemu.state, source.qemu.migration = "postmigrate", SENT
            state = await waiting
            assert [region.name for region in source.held.guest.ram.regions] == ["moved"]
            await source.held.require_still_paused()
            source.qemu.state = "running"
            with pytest.raises(GuestHasRunError, match="was resumed or reset"):
                await source.held.require_still_paused()
            return state.run_state, state.migration

    assert asyncio.run(wait()) == ("postmigrate", "completed")


@pytest.mark.parametrize("earlier", ["failed", "cancelled", "completed"])
def test_the_end_of_an_earlier_migration_is_ignored(source: Source, earlier: str) -> None:
    source.qemu.migration = {"status": earlier, "ram": {}}

    async def wait() -> str:
        async with source:
            waiting = asyncio.create_task(source.held.wait_for_switchover())
            await asyncio.sleep(0.2)
            assert not waiting.done()
            source.qemu.state, source.qemu.migration = "postmigrate", SENT
            return (await waiting).run_state

    assert asyncio.run(wait()) == "postmigrate"


@pytest.mark.parametrize("qmp_closes_first", [False, True])
def test_the_switchover_may_be_the_end_of_qemu(source: Source, *, qmp_closes_first: bool) -> None:
    async def wait() -> tuple[str, str]:
        async with source:
            waiting = asyncio.create_task(source.held.wait_for_switchover())
            source.qemu.migration = {"status": "active"}
            await asyncio.sleep(0.2)
            if qmp_closes_first:
                source.qemu.closed = QmpClosedError("gone")
                await asyncio.sleep(0.2)
                assert not waiting.done()
            source.hold.end.set_result(True)
            state = await waiting
            source.qemu.closed = QmpClosedError("gone")
            await source.held.require_still_paused()
            return state.run_state, state.migration

    assert asyncio.run(wait()) == (ENDED, "active")


def test_without_a_switchover_there_is_no_snapshot(source: Source) -> None:
    async def wait(status: str) -> None:
        async with source:
            waiting = asyncio.create_task(source.held.wait_for_switchover())
            source.qemu.migration = {"status": status}
            await waiting

    for status in ("failed", "cancelled"):
        with pytest.raises(MigrationFailedError, match=f"is '{status}', so there is nothing to"):
            asyncio.run(wait(status))


def test_memory_that_could_not_be_held_is_reported(source: Source) -> None:
    async def wait() -> None:
        async with source:
            source.hold.end.set_result(False)
            await source.held.wait_for_switchover()

    with pytest.raises(UntestableError, match="is not held any more"):
        asyncio.run(wait())


@pytest.mark.parametrize(
    ("migration", "why"),
    [(SENT, "has already completed a migration: take the"), ({}, "this user may not read the")],
)
def test_a_source_that_cannot_be_held_is_refused(
    source: Source, migration: dict[str, Any], why: str
) -> None:
    source.qemu.state, source.qemu.migration = "postmigrate", migration

    async def hold() -> None:
        async with source:
            source.held.require_holdable()

    with pytest.raises(UntestableError, match=why):
        asyncio.run(hold())
