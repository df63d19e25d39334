"""Proofs with too little disk space, and in a folder with commas in its name."""

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
    "for the evidence": (
        "64k",
        [],
        f"evidence to {{folder}}/dmaproof-\\w+/source-device-evidence: {NO_ROOM}",
    ),
    "for the stream": ("16M", ["--scenario", "exec"], "no space left in {folder}"),
    "for the journal": (
        "64k",
        ["--kill-device"],
        "device cannot continue: No space left on device",
    ),
}


@pytest.mark.parametrize(("size", "options", "message"), ROOM.values(), ids=ROOM)
def test_a_full_temporary_folder_is_reported(
    tool: Tool, size: str, options: list[str], message: str
) -> None:
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
        pytest.skip(f"this machine has no namespaces: {done.stderr}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(message.format(folder=tool.folder), done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_limit_of_file_sizes_is_reported(tool: Tool) -> None:
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
def test_the_temporary_folder_may_have_commas_in_its_name(tool: Tool, options: list[str]) -> None:
    folder = tool.folder / "a,b,,c"
    folder.mkdir()
    outcome = Tool(folder).run("prove", "--guest", "bare", "--quiet", *options)
    assert outcome.exit_code == 0, outcome.errors
