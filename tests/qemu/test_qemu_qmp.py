"""A folder `qemu` with an `__init__.py`, earlier on sys.path, does not hide qemu.qmp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import Tool

LIBRARY = """
from qmp_tools.blocking import Environment
with Environment() as environment:
    assert environment.qemu(["-machine", "none"]).execute("query-status")["status"] == "running"
import qemu.tests
assert qemu.tests.FOUND
"""
PLUGIN = """
import qemu.tests

def test_it(qemu):
    assert qemu("-machine", "none").execute("query-status")["status"] == "running"
    import qemu.tests
    assert qemu.tests.FOUND
"""
COMMAND_LINE = """
import sys
from qmp_tools.cli.main import main
sys.exit(main(["prove", "--machine", "pigeon"]))
"""


@pytest.mark.parametrize("first", [True, False], ids=["imported first", "imported later"])
@pytest.mark.parametrize(
    ("program", "exit_code", "output"),
    [
        pytest.param(COMMAND_LINE, 3, "does not have this machine type", id="command line"),
        pytest.param(LIBRARY, 0, "", id="library"),
        pytest.param(PLUGIN, 0, "1 passed", id="pytest plugin"),
    ],
)
def test_a_folder_named_qemu_does_not_hide_qemu_qmp(
    tool: Tool, tmp_path: Path, program: str, exit_code: int, output: str, first: bool
) -> None:
    folder = tmp_path / "project"
    (folder / "qemu").mkdir(parents=True)
    (folder / "qemu" / "__init__.py").touch()
    (folder / "qemu" / "tests.py").write_text("FOUND = True\n")
    script = tmp_path / "test_script.py"
    script.write_text("import qemu\n" * first + program)
    pytest_options = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if program is PLUGIN else []
    done = subprocess.run(
        [sys.executable, *pytest_options, script],
        env={**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(tool.folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert output in done.stdout + done.stderr
    assert not tool.leftovers()
