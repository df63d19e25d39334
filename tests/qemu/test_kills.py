"""A process killed at any time: the message names it, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from support.command import TIMEOUT_S, Running, Tool, is_alive

MOMENTS = {
    "boot": "starting",
    "precopy": "migration active",
    "postcopy": "switching to postcopy",
    "after": "continuing",
}
NAMES = {"source": "source QEMU", "destination": "destination QEMU", "device": "device"}


def run_up_to(tool: Tool, moment: str) -> tuple[Running, dict[str, int]]:
    """Start a run, wait until it has reached `moment`, and return it with its processes."""
    # Each moment lasts long enough for the kill to come in time.
    guest = "linux" if moment == "boot" else "bare"
    scenario = "postcopy-running" if moment == "postcopy" else "unix"
    options = (
        *("--guest", guest, "--scenario", scenario, "--bandwidth", "32M"),
        *("--requests-after", "1000000"),
    )
    running = tool.start("prove", *options)
    running.wait_for_line(MOMENTS[moment])
    running.wait_for(lambda: NAMES.keys() <= running.children().keys(), "all processes")
    return running, running.children()


def assert_nothing_is_left(tool: Tool, processes: dict[str, int]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(is_alive(pid) for pid in processes.values()) or tool.leftovers():
        alive = {name: pid for name, pid in processes.items() if is_alive(pid)}
        assert time.monotonic() < deadline, f"still there: {alive} {tool.leftovers()}"
        time.sleep(0.05)
    # The folders belong to other tests (support/scratch.py).
    objects = [path for path in Path("/dev/shm").iterdir() if path.is_file()]
    assert not [path for path in objects if "dmaproof" in path.name]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", NAMES)
def test_a_killed_process_is_named(tool: Tool, victim: str, moment: str) -> None:
    running, processes = run_up_to(tool, moment)
    os.kill(processes[victim], signal.SIGKILL)
    outcome = running.finish()
    assert outcome.exit_code == 3, outcome.errors
    assert f"{NAMES[victim]} was killed by SIGKILL" in outcome.errors
    assert ("The guest is lost" in outcome.errors) is (moment == "postcopy")
    assert "Traceback" not in outcome.errors
    assert_nothing_is_left(tool, processes)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_tool_leaves_nothing(tool: Tool, how: signal.Signals, moment: str) -> None:
    running, processes = run_up_to(tool, moment)
    assert tool.leftovers()
    running.process.send_signal(how)
    outcome = running.finish()
    assert outcome.exit_code == (-how if how == signal.SIGKILL else 3)
    assert "Traceback" not in outcome.errors
    assert_nothing_is_left(tool, processes)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_build_of_a_guest(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory, how: signal.Signals
) -> None:
    folder = tmp_path_factory.mktemp("build")
    compiler = folder / "cc"
    compiler.write_text(
        f"#!/bin/sh\necho $$ >{folder}/new && mv {folder}/new {folder}/pid && exec sleep 900\n"
    )
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        running = tool.start("prove", "--guest", "bare")
    running.wait_for((folder / "pid").exists, "the compiler")
    running.process.send_signal(how)
    outcome = running.finish()
    assert outcome.exit_code == 3
    assert "interrupted" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert_nothing_is_left(tool, {"compiler": int((folder / "pid").read_text())})
    assert not list((folder / "cache").rglob("partial-*"))


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_an_impatient_user_changes_nothing(tool: Tool, pause_s: float) -> None:
    running, processes = run_up_to(tool, "precopy")
    while running.process.poll() is None:  # until the process has ended
        running.process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
    outcome = running.finish()
    assert outcome.exit_code == 3
    assert outcome.errors.count("interrupted") == 1
    assert "Traceback" not in outcome.errors
    assert_nothing_is_left(tool, processes)


def test_a_later_run_removes_a_folder_without_a_reaper(tool: Tool) -> None:
    """The tool and its reaper killed together leave a folder, but only until the next run."""
    running, processes = run_up_to(tool, "boot")
    (folder,) = tool.leftovers()
    reaper = next(pid for name, pid in processes.items() if name == str(folder))
    os.kill(reaper, signal.SIGKILL)
    running.process.kill()
    running.finish()
    assert tool.leftovers() == [folder]
    again, processes = run_up_to(tool, "boot")
    assert folder not in tool.leftovers()
    again.process.terminate()
    again.finish()
    assert_nothing_is_left(tool, processes)
