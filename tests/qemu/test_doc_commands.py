"""The commands of README and docs that are marked as run, typed as the pages show them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_tools.host.user_folders import cache_folder
from support.doc_commands import ROOT, Block, all_blocks

RUN = [block for block in all_blocks() if block.is_run]


def type_in(block: Block, folder: Path) -> tuple[int, str]:
    """Type the block into a shell in `folder`; return its exit code and output."""
    (folder / "tests").symlink_to(ROOT / "tests")
    shell = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", block.script],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(cache_folder().parent),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = shell.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the block's background processes
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    return shell.returncode, printed


def missing(block: Block, printed: str) -> list[str]:
    """Return the lines that the page shows and the block did not print in this order.

    Numbers may differ; … stands for any text.
    """
    lines = iter(printed.splitlines())
    absent = []
    for shown in block.printed:
        parts = map(re.escape, re.split(r"…|0x[0-9a-f]+|[\d.]*\d", shown))
        pattern = re.compile(".*?".join(parts))
        if not any(pattern.fullmatch(line) for line in lines):
            absent.append(shown)
    return absent


@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_in_the_docs_print_what_the_docs_show(
    block: Block, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("d")  # short, for sockets
    exit_code, printed = type_in(block, folder)
    assert exit_code == block.exit_code, f"{block}: {block.script}\n{printed}"
    assert not missing(block, printed), printed
    shutil.rmtree(folder)


def test_a_line_that_is_not_printed_is_noticed() -> None:
    block = next(block for block in RUN if len(block.printed) > 5)
    others = [line for shown in block.printed for line in ("something else", shown)]
    assert missing(block, "\n".join(others)) == []
    for line in block.printed:
        rest = [other for other in block.printed if other is not line]
        assert line in missing(block, "\n".join(rest)) or line.strip(" …") == ""
