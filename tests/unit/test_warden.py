"""The warden removes a run's folder, though others remove files in it at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qmp_tools.processes import warden

FILES = 4000


def test_a_folder_goes_while_its_files_are_going(tmp_path: Path) -> None:
    """As a device does that is told to end, and removes its own sockets."""
    folder = tmp_path / "run"
    folder.mkdir()
    files = [folder / f"{number}.sock" for number in range(FILES)]
    for file in files:
        file.touch()
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", warden.__file__, str(folder)], stdin=subprocess.PIPE
    )
    assert watch.stdin is not None
    watch.stdin.close()
    for file in files:
        file.unlink(missing_ok=True)
    assert watch.wait(20) == 0
    assert not folder.exists()
