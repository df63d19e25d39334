"""`dmaproof check` on pairs of QEMUs that the test starts itself."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.blocking import Environment
from qmp_tools.guest.bare import probe_guest
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu, version_of
from qmp_tools.ram_check.migrated import GuestHasRunError, NotMigratedError
from support import balloon_guest
from support.command import Tool
from support.foreign_pair import (
    FIRMWARE_OUTPUT,
    MEMORY,
    MIB,
    PROBE_OUTPUT,
    WITH_RAM0,
    Pair,
    foreign_pair,
)

PAGE = 4096
INJECTED = 0x2345000
REPETITIONS = int(os.environ.get("BALLOON_REPETITIONS", "1"))
"""How often the test with a balloon runs."""
BUILDS = {build.version: build.path for build in installed(X86_64)}


@pytest.fixture(params=["system", *BUILDS])
def qemu(request: pytest.FixtureRequest) -> Path:
    """Return each QEMU that is installed."""
    return BUILDS.get(request.param) or find_qemu(None)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a path short enough for sockets."""
    return tmp_path_factory.mktemp("p")


def _major(qemu: Path) -> int:
    return int(str(version_of(qemu)).split(".")[0])


def checked(tool: Tool, pair: Pair, exit_code: int) -> dict[str, Any]:
    outcome = tool.run("check", str(pair.source), str(pair.destination), "--json", "-")
    assert not tool.leftovers()
    assert outcome.exit_code == exit_code, outcome.output + outcome.errors
    return outcome.report


def make_fault(pair: Pair, kind: str) -> None:
    """Change one byte of the destination's RAM."""
    if kind in ("memfd", "file"):
        name = "memfd:" if kind == "memfd" else "destination-ram"
        with pair.memory_file(1, name).open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), b"!", INJECTED + 7)
        return
    # Anonymous and private memory can be written only through the process's memory.
    poke(pair, INJECTED + 7)


def poke(pair: Pair, gpa: int, offset: int = 0) -> None:
    """Change the byte at `gpa` plus `offset` in the memory of the destination's process."""
    text = pair.monitors[1].execute("human-monitor-command", command_line=f"gpa2hva {gpa:#x}")
    with Path(f"/proc/{pair.pids[1]}/mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), b"!", int(text.split()[-1], 16) + offset)


@pytest.mark.parametrize("kind", MEMORY)
def test_equal_pages_pass_and_an_injected_byte_is_found(
    tool: Tool, qemu: Path, folder: Path, kind: str
) -> None:
    with foreign_pair(qemu, folder, [*WITH_RAM0, *MEMORY[kind], "-vga", "std"]) as pair:
        pair.migrate()
        report = checked(tool, pair, 0)
        # At least 64 MiB of RAM and 256 KiB of firmware. The RAM is of one kind only.
        assert int(str(report["pages"])) >= (64 * MIB - 128 * 1024 + 256 * 1024) // PAGE
        assert report["notes"] == []
        side = report["source"]
        assert isinstance(side, dict)
        shared = 60 * MIB if kind != "private" else 0
        assert side["in_place_bytes"] >= shared
        assert (side["in_place_bytes"] == 0) == (kind == "private")
        # Firmware and video memory are always private.
        assert side["copied_bytes"] > 0
        assert side["saved_bytes"] == 0
        make_fault(pair, kind)
        report = checked(tool, pair, 1)
        differences = report["differences"]
        assert isinstance(differences, list)
        assert [
            (difference["gpa"], difference["region"], difference["bytes_differing"])
            for difference in differences
        ] == [(INJECTED, "ram0", 1)]
        assert differences[0]["known"] is None
        # ram0 is the first RAM block, and a multiple of 256 KiB.
        notes = report["notes"]
        assert len(notes) == (_major(qemu) < 9)
        assert all("RAM block ram0, because its size, 65536 KiB," in note for note in notes)


def test_the_note_on_tcg_names_the_ram_blocks_that_may_be_affected(
    tool: Tool, qemu: Path, folder: Path
) -> None:
    """Main RAM is not the first RAM block if another backend is given before it."""
    arguments = [
        *("-machine", "q35,memory-backend=ram0", "-m", "64,slots=1,maxmem=1G"),
        *("-object", "memory-backend-ram,id=before,size=64M"),
        *MEMORY["memfd"],
        *("-object", "memory-backend-memfd,id=odd,size=131080K,share=on"),
        *("-device", "pc-dimm,id=dimm0,memdev=odd"),
    ]
    with foreign_pair(qemu, folder, arguments) as pair:
        pair.migrate()
        poke(pair, pair.monitors[1].execute("query-memory-devices")[0]["data"]["addr"])
        assert checked(tool, pair, 1)["notes"] == [], "QEMU syncs this DIMM page by page"
        poke(pair, INJECTED)
        (note,) = checked(tool, pair, 1)["notes"]
        assert "may lose what vCPUs write to RAM block ram0, because its size, 65536 KiB" in note
        assert ("not the first RAM block" in note) == (_major(qemu) >= 9)


QEMU_11_1 = next((path for version, path in BUILDS.items() if version.startswith("11.1.")), None)


@pytest.mark.skipif(not QEMU_11_1, reason="needs 'dmaproof qemu fetch 11.1'")
def test_the_note_on_tcg_names_the_capability_postcopy_ram(tool: Tool, folder: Path) -> None:
    assert QEMU_11_1
    with foreign_pair(QEMU_11_1, folder, [*WITH_RAM0, *MEMORY["memfd"]]) as pair:
        for monitor in pair.monitors:
            monitor.execute(
                "migrate-set-capabilities",
                capabilities=[{"capability": "postcopy-ram", "state": True}],
            )
        pair.migrate()
        assert checked(tool, pair, 0)["notes"] == []
        poke(pair, INJECTED)
        (note,) = checked(tool, pair, 1)["notes"]
        assert "RAM block ram0, because the capability postcopy-ram is on" in note


NUMA = [
    *("-machine", "q35", "-m", "4608,slots=2,maxmem=8G"),
    *("-object", "memory-backend-memfd,id=n0,size=4096M,share=on"),
    *("-object", "memory-backend-ram,id=n1,size=512M"),
    *("-numa", "node,memdev=n0", "-numa", "node,memdev=n1"),
    *("-object", "memory-backend-memfd,id=hot,size=128M,share=on"),
    *("-device", "pc-dimm,id=dimm0,memdev=hot"),
]
ABOVE = 1 << 32
NODE1 = ABOVE + (2 << 30)
"""q35 puts the first 2 of 4.5 GiB below 4 GiB; node 1 consists of the last 512 MiB."""


def test_several_backends_and_ram_above_four_gigabytes(tool: Tool, folder: Path) -> None:
    with foreign_pair(find_qemu(None), folder, NUMA) as pair:
        pair.migrate()
        dimm = pair.monitors[1].execute("query-memory-devices")[0]["data"]["addr"]
        report = checked(tool, pair, 0)
        hidden = report["not_compared"]
        assert hidden == [], "a private backend that is completely in the map hides nothing"
        injected = {ABOVE + 5 * PAGE: "n0", NODE1 + 3 * PAGE: "n1", dimm + 9 * PAGE: "hot"}
        for gpa in injected:
            poke(pair, gpa)
        report = checked(tool, pair, 1)
        differences = report["differences"]
        assert isinstance(differences, list)
        assert {difference["gpa"]: difference["region"] for difference in differences} == injected
        assert [difference["device"] for difference in differences] == [None, None, "dimm0"]


@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_ram_that_the_map_hides_is_compared(tool: Tool, folder: Path, kind: str) -> None:
    arguments = [*WITH_RAM0, *MEMORY[kind], "-vga", "std", *FIRMWARE_OUTPUT]
    with foreign_pair(find_qemu(None), folder, arguments) as pair:
        # Before that, SeaBIOS maps RAM in place of the VGA window for a while (SMRAM).
        pair.wait_for_output("No bootable device")
        pair.migrate()
        assert checked(tool, pair, 0)["not_compared"] == []
        poke(pair, 0, 0xA1000)  # after the VGA window
        report = checked(tool, pair, 1)
        differences = report["differences"]
        assert isinstance(differences, list)
        assert [(difference["gpa"], difference["offset"]) for difference in differences] == [
            (None, 0xA1000)
        ]


UNPRIVILEGED = 65534
WRAPPERS = {
    "root": [],
    "root without CAP_SYS_PTRACE": ["setpriv", "--bounding-set=-sys_ptrace"],
    # The Python that runs the tests may be in root's home, and needs the capability to be read.
    "QEMU's user in another group": [
        *("setpriv", f"--reuid={UNPRIVILEGED}", "--regid=4711", "--clear-groups"),
        *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
    ],
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other users: run the tests as root")
def test_private_memory_of_another_users_qemu() -> None:
    arguments = [*WITH_RAM0, *MEMORY["private"], "-runas", "nobody"]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # a folder that every user can reach
        folder = Path(name)
        os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        (folder / "t").mkdir()
        os.chown(folder / "t", UNPRIVILEGED, UNPRIVILEGED)
        with foreign_pair(find_qemu(None), folder, arguments) as pair:
            for path in (pair.source, pair.destination):
                path.chmod(0o777)
            pair.migrate()
            for user, wrapper in WRAPPERS.items():
                side = checked(Tool(folder / "t", wrapper), pair, 0)["source"]
                assert isinstance(side, dict)
                assert (side["copied_bytes"] > 0, side["saved_bytes"] > 0) == (
                    user == "root",
                    user != "root",
                ), user
            other_user = Tool(
                folder / "t", ["--reuid=4711" if "reuid" in word else word for word in wrapper]
            )
            os.chown(folder / "t", 4711, 4711)
            refused(other_user, pair.source, pair.destination, 3, "which belongs to user")
            make_fault(pair, "private")
            for wrapper in list(WRAPPERS.values())[:2]:
                checked(Tool(folder / "t", wrapper), pair, 1)


def test_the_pvclock_page_is_named_and_not_hidden(tool: Tool, qemu: Path, folder: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: load the module kvm and join the group of the device")
    arguments = [*WITH_RAM0, *MEMORY["memfd"], *FIRMWARE_OUTPUT]
    with foreign_pair(qemu, folder, arguments, accelerator="kvm") as pair:
        pair.wait_for_output("No bootable device")  # the firmware has registered its clock by then
        pair.migrate(running=True)
        report = checked(tool, pair, 0)
        assert report["pages_known_to_differ"] == 1
        differences = report["differences"]
        assert isinstance(differences, list)
        (clock,) = differences
        assert clock["known"] == "pvclock"
        assert clock["gpa"] in range(0xE0000, 0xF0000)
        text = tool.run("check", str(pair.source), str(pair.destination)).output
        assert f"GPA {clock['gpa']:#x}" in text
        assert "kvmclock" in text
        # The same page with another differing byte is a loss nevertheless.
        with pair.memory_file(1, "memfd:").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), b"!!", clock["gpa"] + 0x800)
        assert checked(tool, pair, 1)["notes"] == []


def refused(
    tool: Tool, source: Path, destination: Path, exit_code: int, message: str, *options: str
) -> None:
    outcome = tool.run("check", str(source), str(destination), *options)
    assert outcome.exit_code == exit_code, outcome.errors
    assert message in outcome.errors
    assert "Traceback" not in outcome.errors
    assert not tool.leftovers()


def wait_until_it_has_run(pair: Pair, side: int, accelerator: str) -> None:
    """Resume a side, and pause it when its vCPU is known to have run."""
    monitor = pair.monitors[side]
    monitor.execute("cont")
    if accelerator == "tcg":
        # A guest that waits for its next interrupt translates no code.
        deadline = time.monotonic() + 60
        while "TB count            0" in monitor.execute(
            "human-monitor-command", command_line="info jit"
        ):
            assert time.monotonic() < deadline, "the guest does not run"
            time.sleep(0.05)
    monitor.execute("stop")


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_a_guest_that_has_run_since_the_migration_is_refused(
    tool: Tool, folder: Path, qemu: Path, accelerator: str
) -> None:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm: load the module kvm and join the group of the device")
    arguments = [*WITH_RAM0, *MEMORY["memfd"]]
    with foreign_pair(qemu, folder, arguments, accelerator=accelerator) as pair:
        pair.migrate()
        checked(tool, pair, 0)
        refused(tool, pair.destination, pair.source, 2, "give the source first")
        pair.monitors[1].execute("cont")
        refused(tool, pair.source, pair.destination, 3, "is running, so its RAM has changed")
        wait_until_it_has_run(pair, 1, accelerator)
        refused(tool, pair.source, pair.destination, 3, "is paused, but has run since")
        wait_until_it_has_run(pair, 0, accelerator)
        refused(tool, pair.source, pair.destination, 3, "was resumed or reset after its migration")


def test_a_destination_that_is_stopped_before_the_end_of_the_migration_is_accepted(
    tool: Tool, folder: Path, qemu: Path
) -> None:
    arguments = [*WITH_RAM0, *MEMORY["memfd"]]
    with foreign_pair(qemu, folder, arguments, destination=["-incoming", "defer"]) as pair:
        pair.monitors[1].execute("stop")
        pair.migrate()
        checked(tool, pair, 0)


def test_guests_without_a_migration_are_compared_only_with_no_migration(
    tool: Tool, folder: Path
) -> None:
    arguments = [*WITH_RAM0, *MEMORY["memfd"], "-S"]
    with foreign_pair(find_qemu(None), folder, arguments, destination=[]) as pair:
        refused(tool, pair.source, pair.destination, 3, "has not been migrated")
        command = ["check", str(pair.source), str(pair.destination), "--no-migration"]
        outcome = tool.run(*command)
        assert outcome.exit_code == 0, outcome.errors
        assert "no migration was expected" in outcome.output
        make_fault(pair, "memfd")
        assert tool.run(*command).exit_code == 1
        pair.monitors[1].execute("cont")
        outcome = tool.run(*command)
        assert outcome.exit_code == 3
        assert "pause the guest first (QMP 'stop')" in outcome.errors


def test_a_guest_that_was_migrated_through_a_file_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Environment() as environment:
        pair = environment.pair(["-machine", "q35", "-m", "65544K"], accelerator="tcg")
        with pytest.raises(NotMigratedError):
            environment.check(pair.source, pair.destination)
        pair.migrate("exec")
        assert environment.check(pair.source, pair.destination).exit_code == 0
        hva = str(pair.destination.execute("human-monitor-command", command_line="gpa2hva 0x10000"))
        with Path(f"/proc/{pair.destination.pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), b"!!", int(hva.split()[-1], 16))
        assert environment.check(pair.source, pair.destination).exit_code == 1

        async def unknown(qemu: object) -> None:
            return None

        monkeypatch.setattr("qmp_tools.ram_check.migrated.has_run", unknown)
        with pytest.raises(
            GuestHasRunError, match=r"1 of \d+ pages differ, but it is unknown whether"
        ):
            environment.check(pair.source, pair.destination)


def test_qemus_of_different_migrations_are_refused(tool: Tool, folder: Path) -> None:
    other = [*WITH_RAM0[:3], "128", "-object", "memory-backend-memfd,id=ram0,size=128M,share=on"]
    arguments = [*WITH_RAM0, *MEMORY["memfd"]]
    qemu = find_qemu(None)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with (
        foreign_pair(qemu, folder / "a", arguments) as pair,
        foreign_pair(qemu, folder / "b", other) as larger,
    ):
        pair.migrate()
        larger.migrate()
        refused(tool, pair.source, pair.source, 2, "given for both sides")
        refused(tool, pair.source, folder / "a" / "source-2", 2, "both sides are the same QEMU")
        refused(tool, pair.source, larger.destination, 3, "KiB of RAM in its physical map")


def test_one_file_for_both_sides_is_refused(tool: Tool, folder: Path) -> None:
    both = "memory-backend-file,id=ram0,size=64M,share=on,mem-path={folder}/both"
    # With vapic, QEMU keeps state in the guest's RAM, which two QEMUs on one file may spoil.
    options = [*WITH_RAM0, "-object", both, "-global", "apic-common.vapic=off"]
    with foreign_pair(find_qemu(None), folder, options) as pair:
        pair.migrate()
        refused(tool, pair.source, pair.destination, 3, "in the same file")


def test_a_human_monitor_is_named(tool: Tool, folder: Path, qemu: Path) -> None:
    arguments = ["-machine", "none", "-monitor", "unix:{folder}/{side}-hmp,server=on,wait=off"]
    with foreign_pair(qemu, folder, arguments) as pair:
        refused(tool, folder / "source-hmp", pair.destination, 2, "is a human monitor (HMP)")


@pytest.mark.parametrize("share", ["on", "off"])
def test_what_is_not_the_same_memory_is_compared(tool: Tool, folder: Path, share: str) -> None:
    """A DIMM in one file of both sides, which they share, or of which each has a private copy."""
    arguments = [
        *("-machine", "q35,memory-backend=ram0", "-m", "64,slots=1,maxmem=1G", *MEMORY["private"]),
        "-object",
        f"memory-backend-file,id=hot,size=128M,share={share},mem-path={{folder}}/both",
        *("-device", "pc-dimm,id=dimm0,memdev=hot"),
    ]
    with foreign_pair(find_qemu(None), folder, arguments) as pair:
        pair.migrate()
        hot = {"region": "hot", "offset": 0, "length": 128 * MIB}
        same = [{**hot, "why": "the same memory on both sides"}] if share == "on" else []
        assert checked(tool, pair, 0)["not_compared"] == same
        dimm = pair.monitors[1].execute("query-memory-devices")[0]["data"]["addr"]
        poke(pair, INJECTED)
        poke(pair, dimm)
        regions = [difference["region"] for difference in checked(tool, pair, 1)["differences"]]
        assert regions == (["ram0"] if share == "on" else ["ram0", "hot"])


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize("memory", balloon_guest.MEMORY)
def test_what_a_balloon_discards_is_not_lost_and_hides_no_loss(
    tool: Tool, folder: Path, memory: str, repetition: int
) -> None:
    arguments = [
        *("-machine", "q35,memory-backend=ram0", "-m", balloon_guest.RAM),
        *("-object", balloon_guest.MEMORY[memory]),
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
        *balloon_guest.options(folder),
    ]
    with foreign_pair(find_qemu(None), folder, arguments) as pair:
        balloon_guest.free_while_migrating(pair)
        report = checked(tool, pair, 0)
        assert report["pages_discarded"] >= balloon_guest.FREED_BYTES // PAGE // 2
        assert (report["differences"], report["notes"]) == ([], [])
        assert report["discarding_devices"] == ["balloon device[0] (free-page-reporting)"]
        lost = balloon_guest.populated_after(pair, report["discarded"][repetition % 2])
        poke(pair, lost)
        after = checked(tool, pair, 1)
        assert [difference["gpa"] for difference in after["differences"]] == [lost]
        assert after["pages_discarded"] == report["pages_discarded"]


def test_a_balloon_that_the_guest_does_not_drive_discards_nothing(tool: Tool, folder: Path) -> None:
    arguments = [*WITH_RAM0, *MEMORY["memfd"], "-device", "virtio-balloon-pci,id=balloon0"]
    with foreign_pair(find_qemu(None), folder, arguments) as pair:
        pair.migrate()
        poke(pair, INJECTED)  # the source's guest never touched this page
        report = checked(tool, pair, 1)
        assert (report["pages_differing"], report["discarding_devices"]) == (1, [])


def test_a_busy_socket_is_named(tool: Tool, folder: Path) -> None:
    with foreign_pair(find_qemu(None), folder, [*WITH_RAM0, *MEMORY["memfd"]]) as pair:
        # The wait for a greeting is a tenth of the timeout.
        busy = (folder / "source-test", pair.destination)
        refused(tool, *busy, 3, "serves one client at a time", "--timeout", "50")


def test_a_vcpus_pages_are_compared_too(tool: Tool, folder: Path) -> None:
    """A guest writes during its migration, with a QEMU and a RAM size that lose nothing."""
    size = "64M" if BUILDS else "65544K"
    arguments = [
        "-machine",
        "q35,memory-backend=ram0",
        "-m",
        size,
        "-kernel",
        str(probe_guest(X86_64)),
    ]
    arguments += ["-object", f"memory-backend-memfd,id=ram0,size={size},share=on", *PROBE_OUTPUT]
    qemu = next(reversed(BUILDS.values())) if BUILDS else find_qemu(None)
    with foreign_pair(qemu, folder, arguments) as pair:
        pair.wait_for_output("ready")
        pair.migrate(running=True)
        assert checked(tool, pair, 0)["pages_known_to_differ"] == 0


def test_a_check_waits_for_the_migration_and_continues_the_guest(tool: Tool, folder: Path) -> None:
    """The command is started before the QEMUs, and before the migration."""
    sockets = [str(folder / side) for side in ("source", "destination")]
    waiting = tool.start("check", *sockets, "--wait", "--resume")
    with foreign_pair(find_qemu(None), folder, [*WITH_RAM0, *MEMORY["memfd"]]) as pair:
        pair.migrate()
        outcome = waiting.finish()
        assert outcome.exit_code == 0, outcome.errors
        assert pair.monitors[1].execute("query-status")["status"] == "running"
    assert not tool.leftovers()


def test_a_wait_for_a_migration_ends_in_time_or_when_it_fails(tool: Tool, folder: Path) -> None:
    with foreign_pair(find_qemu(None), folder, [*WITH_RAM0, *MEMORY["memfd"]]) as pair:
        sockets = [str(pair.source), str(pair.destination)]
        late = tool.run("check", *sockets, "--wait", "--timeout", "0.5")
        assert late.exit_code == 3
        assert "has not begun after 0.5 s, not 'completed'" in late.errors
        failing = tool.start("check", *sockets, "--wait")
        pair.monitors[0].execute("migrate", uri=f"unix:{folder / 'nothing'}")
        outcome = failing.finish()
        assert outcome.exit_code == 3, outcome.output
        assert "is 'failed', so there is nothing to compare" in outcome.errors
        missing = tool.run("check", str(folder / "later"), sockets[1], "--wait", "--timeout", "0.2")
        assert "does not exist after 0.2 s" in missing.errors
        both = tool.run("check", "--raw", *sockets, "--wait")
        assert (both.exit_code, "do not apply" in both.errors) == (2, True)
        neither = tool.run("check", *sockets, "--wait", "--no-migration")
        assert neither.exit_code == 2
