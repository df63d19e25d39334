"""The output of a program that uses the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_library_prints_nothing_by_itself(tmp_path: Path) -> None:
    script = (
        "import logging, qmp_tools.blocking\n"
        "logging.getLogger('qmp_tools.proof.probes').warning('a warning')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
