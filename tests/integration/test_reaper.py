"""The reaper removes a run's folder even if other processes remove files in it meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_tools.host import reaper
from qmp_tools.host.process import Process
from qmp_tools.host.run_folder import run_folder
from support.command import is_alive

FILES = 4000


def test_a_folder_is_removed_while_its_files_are_removed(tmp_path: Path) -> None:
    """A device that ends removes its own sockets."""
    folder = tmp_path / "run"
    folder.mkdir()
    files = [folder / f"{number}.sock" for number in range(FILES)]
    for file in files:
        file.touch()
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder)], stdin=subprocess.PIPE
    )
    assert watch.stdin is not None
    watch.stdin.close()
    for file in files:
        file.unlink(missing_ok=True)
    assert watch.wait(60) == 0
    assert not folder.exists()


async def first_number(log: Path) -> int:
    async with asyncio.timeout(900):
        while not log.read_text():  # noqa: ASYNC110  (another process writes it)
            await asyncio.sleep(0.01)
    return int(log.read_text())


@pytest.mark.parametrize("keep", [False, True])
def test_children_of_third_party_programs_are_killed_too(tmp_path: Path, keep: bool) -> None:
    """The grandchild has its own session, so no signal of a parent reaches it."""

    async def start_and_kill() -> tuple[int, int]:
        with run_folder(keep=keep) as folder:
            command = ["sh", "-c", "setsid sleep 1000 & echo $!; sleep 1000"]
            processes = [
                await Process.start("other", command, folder / log, run_folder=run)
                for log, run in (("marked", folder), ("other", tmp_path))
            ]
            marked, other = [await first_number(folder / log) for log in ("marked", "other")]
            for process in processes:
                await process.end()
            assert is_alive(marked)
        if keep:
            shutil.rmtree(folder)
        return marked, other

    marked, other = asyncio.run(start_and_kill())
    try:
        assert not is_alive(marked)
        assert is_alive(other)
    finally:
        os.kill(other, signal.SIGKILL)
