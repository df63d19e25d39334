"""The examples of docs/library.md, each run as the page shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_tools.blocking import Environment
from support.command import Tool

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OUTPUTS = (
    r"all pages are equal: \d+ pages compared\n",
    r"[\d.]+.* running\nall pages are equal: \d+ pages compared\n",
    r"(\w+ \d+ (\d+|None)\n)*completed \d+ 0\nall pages are equal: \d+ pages compared\n",
    r"[\d.]+.* running\n\d+ bytes a second\n",
    r"\[\('0x12000', 12288\)\]\n",
    r"all pages are equal: \d+ pages compared\n",
)
"""What the examples print, in the order of the page."""
RUNNING_QEMU = 3


def run(number: int, tool: Tool, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number], *arguments],
        env={**os.environ, "TMPDIR": str(tool.folder)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "number", [index for index in range(len(OUTPUTS)) if index != RUNNING_QEMU]
)
def test_an_example_prints_what_it_should(number: int, tool: Tool) -> None:
    assert re.fullmatch(OUTPUTS[number], run(number, tool))
    assert not tool.leftovers()


def test_the_example_for_a_running_qemu(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tool.folder))
    with Environment() as environment:
        qemu = environment.qemu(["-machine", "q35", "-m", "64"], accelerator="tcg")
        assert re.fullmatch(OUTPUTS[RUNNING_QEMU], run(RUNNING_QEMU, tool, str(qemu.socket_path)))


def test_every_example_of_the_page_is_tested() -> None:
    assert len(EXAMPLES) == len(OUTPUTS)
