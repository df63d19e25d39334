"""`dmaproof snapshot` of QEMUs that the test starts itself, and checks with its files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmp_tools.qemu.choice import find_qemu
from support.command import TIMEOUT_S, Tool, is_alive
from support.foreign_pair import MEMORY, WITH_RAM0, Pair, foreign_pair

INJECTED = 0x2345000


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a path short enough for sockets."""
    return tmp_path_factory.mktemp("p")


def guest(kind: str) -> list[str]:
    """Return QEMU's options for a guest with this kind of memory."""
    return [*WITH_RAM0, *MEMORY[kind], "-vga", "std"]


def poke(pair: Pair, side: int, gpa: int, byte: bytes = b"!") -> None:
    """Change the byte at `gpa` of a side (0 source, 1 destination)."""
    text = pair.monitors[side].execute("human-monitor-command", command_line=f"gpa2hva {gpa:#x}")
    with Path(f"/proc/{pair.pids[side]}/mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), byte, int(text.split()[-1], 16))


def run(tool: Tool, exit_code: int, *words: str | Path) -> str:
    """Run dmaproof, and return what it has printed."""
    outcome = tool.run(*map(str, words))
    assert outcome.exit_code == exit_code, outcome.output + outcome.errors
    return outcome.output + outcome.errors


def terminate(pair: Pair) -> None:
    os.kill(pair.pids[0], signal.SIGTERM)


def kill(pair: Pair) -> None:
    os.kill(pair.pids[0], signal.SIGKILL)


def leave(pair: Pair) -> None:
    """Let the source stay as it is."""


@pytest.mark.parametrize("kind", ["memfd", "private"])
@pytest.mark.parametrize("end", [terminate, kill, leave], ids=lambda end: end.__name__)
def test_the_ram_at_the_switchover_is_compared_although_the_source_has_ended(
    tool: Tool, folder: Path, kind: str, end: Callable[[Pair], None]
) -> None:
    """The source is ended before its migration completes: nothing can be asked of it then."""
    file = folder / "source.snap"
    with foreign_pair(find_qemu(None), folder, guest(kind)) as pair:
        source, destination = pair.monitors
        printed = run(tool, 0, "snapshot", pair.source, file, "--at-switchover", "--background")
        assert f"holds the memory; {file} will be complete after the migration" in printed
        poke(pair, 0, INJECTED)  # after the memory was opened, before the switchover
        source.execute("stop")
        pair.begin_to_migrate()
        destination.wait_for("query-migrate", "completed")
        end(pair)
        assert "PASS" in run(tool, 0, "check", file, pair.destination)
        destination.execute("stop")
        poke(pair, 1, INJECTED, b"?")
        assert f"GPA {INJECTED:#x} (ram0 +{INJECTED:#x})" in run(
            tool, 1, "check", file, pair.destination
        )
        if end is leave:
            assert source.execute("query-status")["status"] == "postmigrate"
    assert not tool.leftovers()


def test_snapshots_of_both_sides_take_the_place_of_the_sockets(tool: Tool, folder: Path) -> None:
    before, after = folder / "before.snap", folder / "after.snap"
    with foreign_pair(find_qemu(None), folder, guest("private")) as pair:
        why = run(tool, 3, "snapshot", pair.source, before)
        assert "is running, so its RAM changes while dmaproof reads it" in why
        assert not before.exists()
        pair.migrate()
        run(tool, 0, "snapshot", pair.source, before, "--content")
        run(tool, 0, "snapshot", pair.destination, after)
        for sides in ((before, after), (pair.source, after), (before, pair.destination)):
            run(tool, 0, "check", *sides)
        assert "give the source first" in run(tool, 2, "check", after, before)
        assert "give the source first" in run(tool, 2, "check", pair.destination, before, "--wait")
        assert "both sides are the same QEMU" in run(tool, 2, "check", before, pair.source)
        assert "no guest to resume" in run(tool, 2, "check", before, after, "--resume")
        assert "is a snapshot, not a raw image" in run(tool, 2, "check", "--raw", before, after)
        assert "is given for both sides" in run(tool, 2, "check", before, before)
        for gpa in (INJECTED, INJECTED + 1):
            poke(pair, 1, gpa)
        report = tool.run("check", str(before), str(pair.destination), "--json", "-").report
        (difference,) = report["differences"]
        assert (difference["gpa"], difference["bytes_differing"]) == (INJECTED, 2)
        assert report["source"]["snapshot"] == str(before)
    assert not tool.leftovers()


def test_a_check_waits_for_the_snapshot_and_for_the_qemus(tool: Tool, folder: Path) -> None:
    """The check is started first. A QEMU that was killed has left its socket."""
    file, destination = folder / "source.snap", folder / "destination"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(destination))
    waiting = tool.start("check", str(file), str(destination), "--wait", "--resume")
    waiting.wait_for(waiting.children, "reaper")
    destination.unlink()
    with foreign_pair(find_qemu(None), folder, guest("memfd")) as pair:
        run(tool, 0, "snapshot", pair.source, file, "--at-switchover", "--background")
        pair.migrate()
        outcome = waiting.finish()
        assert outcome.exit_code == 0, outcome.errors
        assert pair.monitors[1].execute("query-status")["status"] == "running"
    assert not tool.leftovers()


def test_a_migration_that_fails_leaves_the_reason_in_the_file(tool: Tool, folder: Path) -> None:
    file = folder / "source.snap"
    with foreign_pair(find_qemu(None), folder, guest("memfd")) as pair:
        run(tool, 0, "snapshot", pair.source, file, "--at-switchover", "--background")
        pair.monitors[0].execute("migrate", uri=f"unix:{folder / 'nothing'}")
        printed = run(tool, 3, "check", file, pair.destination)
        assert "has no snapshot: the migration of QEMU" in printed
        assert "is 'failed', so there is nothing to compare" in printed
        assert pair.monitors[0].execute("query-status")["status"] == "running"
        run(tool, 0, "snapshot", pair.source, file, "--at-switchover", "--background")
        late = run(tool, 3, "check", file, pair.destination, "--timeout", "0.2")
        assert "has not finished within 0.2 s" in late, "it takes the failure for a new one"
        pair.migrate()
        run(tool, 0, "check", file, pair.destination)
    assert not tool.leftovers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_releases_qemu(
    tool: Tool, folder: Path, number: signal.Signals
) -> None:
    file = folder / "source.snap"
    with foreign_pair(find_qemu(None), folder, guest("private")) as pair:
        waiting = tool.start("snapshot", str(pair.source), str(file), "--at-switchover")
        waiting.wait_for_line("the memory is held; waiting for a migration to complete")
        late = run(tool, 3, "check", file, pair.destination, "--timeout", "0.2")
        assert "has not finished within 0.2 s" in late
        tracers = tracers_of(pair)
        assert tracers
        waiting.process.send_signal(number)
        waiting.finish()
        printed = run(tool, 3, "check", file, pair.destination)
        assert "was interrupted" in printed or "the program that wrote it was ended" in printed
        assert not any(map(is_alive, tracers)) or wait_for_end(tracers)
        assert not tracers_of(pair)
        pair.migrate()
        run(tool, 0, "check", pair.source, pair.destination)


def tracers_of(pair: Pair) -> list[int]:
    """Return the process that traces the source, if there is one."""
    status = Path(f"/proc/{pair.pids[0]}/status").read_text()
    return [pid for pid in [int(status.partition("TracerPid:")[2].split()[0])] if pid]


def wait_for_end(pids: list[int]) -> bool:
    """Wait until the kernel has ended these processes, whose parent was killed."""
    while any(map(is_alive, pids)):
        pass
    return True


def test_a_source_that_another_program_traces_is_refused(tool: Tool, folder: Path) -> None:
    with foreign_pair(find_qemu(None), folder, guest("private")) as pair:
        first = folder / "first.snap"
        run(tool, 0, "snapshot", pair.source, first, "--at-switchover", "--background")
        second = str(pair.source) + "-2"
        words = ("snapshot", second, folder / "second.snap", "--at-switchover", "--background")
        assert "traces it already (another 'dmaproof snapshot', gdb" in run(tool, 3, *words)
        assert not (folder / "second.snap").exists()
        assert "needs --at-switchover" in run(tool, 2, *words[:3], "--background")
        kill(pair)
        # QEMU ended before a migration: the destination knows that nothing has arrived.
        assert "still waits for the data" in run(tool, 3, "check", first, pair.destination)


def test_no_module_of_the_current_folder_is_imported_in_the_background(tmp_path: Path) -> None:
    """The user root may run the command in a folder of another user."""
    (tmp_path / "asyncio.py").write_text("raise SystemExit('this is not asyncio')")
    words = ["snapshot", "missing.sock", "a.snap", "--at-switchover", "--background"]
    outcome = subprocess.run(
        [sys.executable, "-P", "-m", "qmp_tools.cli", *words],  # as the installed command does
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 2
    assert "not found: missing.sock" in outcome.stderr


def test_raw_images_of_other_virtual_machine_monitors_are_compared(
    tool: Tool, tmp_path: Path
) -> None:
    """Firecracker's memory file and cloud-hypervisor's memory-ranges are such images."""
    before, after = tmp_path / "before.mem", tmp_path / "after.mem"
    with before.open("wb") as image:
        image.truncate(64 << 20)
        os.pwrite(image.fileno(), b"content", INJECTED)
    subprocess.run(["cp", "--sparse=always", before, after], timeout=TIMEOUT_S, check=True)
    run(tool, 0, "check", "--raw", before, after)
    with after.open("r+b") as changed:
        changed.seek(INJECTED)
        changed.write(b"!")
    html = tmp_path / "report.html"
    outcome = tool.run("check", "--raw", str(before), str(after), "--report", str(html))
    assert f"at an offset (image +{INJECTED:#x}): 1 byte differs" in outcome.output
    assert outcome.exit_code == 1
    assert f"image {before}" in html.read_text()
    after.write_bytes(after.read_bytes()[:-4096])
    assert "not images of one guest" in run(tool, 3, "check", "--raw", before, after)
    assert "is not a regular file" in run(tool, 2, "check", "--raw", before, tmp_path)
    assert "is given for both sides" in run(tool, 2, "check", "--raw", before, before)
    for path, end in ((before, b"x"), (after, b"y")):
        path.write_bytes(bytes(4096) + end)
    assert "1 of 2 pages differ" in run(tool, 1, "check", "--raw", before, after)
    before.write_bytes(b"short")
    after.write_bytes(b"small")
    assert "less than a page" in run(tool, 3, "check", "--raw", before, after)
