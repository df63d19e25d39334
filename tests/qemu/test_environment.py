"""Where a proof has too little room, or a place with a comma in its name: it says so, or copes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from support.command import Tool

SMALL = ["--guest", "bare", "--workload", "write_once=512", "--quiet"]
NO_ROOM = "No space left on device; set TMPDIR"
ROOM = {
    "for the image": ("40M", ["--device", "qemu:virtio-blk-pci"], NO_ROOM),
    "for the evidence": ("64k", [], f"evidence into {{folder}}/dmaproof-\\w+: {NO_ROOM}"),
    "for the stream": ("16M", ["--scenario", "exec"], "no room left in {folder}"),
    "for the journal": ("64k", ["--kill-device"], "device cannot go on: No space left on device"),
}


@pytest.mark.parametrize(("size", "options", "told"), ROOM.values(), ids=ROOM)
def test_a_small_temporary_folder(tool: Tool, size: str, options: list[str], told: str) -> None:
    proof = [sys.executable, "-m", "qmp_tools.cli", "prove", *SMALL, *options]
    script = f"mount -t tmpfs -o size={size} none {tool.folder} && exec {shlex.join(proof)}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        env={**os.environ, "TMPDIR": str(tool.folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if "unshare:" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(told.format(folder=tool.folder), done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_limit_of_files_sizes(tool: Tool) -> None:
    proof = [sys.executable, "-m", "qmp_tools.cli", "prove", *SMALL]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 2048; exec {shlex.join(proof)}"],
        env={**os.environ, "TMPDIR": str(tool.folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 3
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--device", "qemu:virtio-blk-pci"], ["--kill-device"]])
def test_a_comma_in_the_temporary_folder(tool: Tool, options: list[str]) -> None:
    folder = tool.folder / "a,b,,c"
    folder.mkdir()
    outcome = Tool(folder).run("prove", "--guest", "bare", "--quiet", *options)
    assert outcome.exit_code == 0, outcome.errors
