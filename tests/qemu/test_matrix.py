"""A matrix on the system's QEMU: the states of its cells, the result cache, interruption."""

from __future__ import annotations

import os
import signal
import time
from html import unescape
from pathlib import Path

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.build import compile_c
from qmp_tools.qemu.choice import known_qemus
from qmp_tools.qemu.program_files import ProgramFiles
from support.command import TIMEOUT_S, Tool, is_alive

BARE = ("--guest", "bare", "--accel", "tcg")


def descendants(pid: int) -> set[int]:
    """Return the processes that `pid` has started, and their descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def test_cells_have_the_expected_states_and_verdicts_are_cached(tool: Tool, tmp_path: Path) -> None:
    files = {form: tmp_path / form for form in ("report", "junit", "tap")}
    options = [f"--{form}={file}" for form, file in files.items()]
    options += [f"--folder={tmp_path / 'cache'}", "--json=-", "--jobs=2", *BARE]
    # A machine type that no QEMU has, and a timeout that no wait can meet.
    version = known_qemus(X86_64)[0].version
    axes = [f"--qemu={version}", "--machine=q35,toaster", "--fault=drop-pages=0.01", "--fault="]
    outcome = tool.run("matrix", *axes, "--timeout=0.01,900", *options)
    assert outcome.exit_code == 1, outcome.errors
    cells = {cell["name"]: cell for cell in outcome.report["cells"]}
    assert len(cells) == 8
    for name, cell in cells.items():
        lost = "fault=drop" in name
        expected = "skipped" if "toaster" in name else "lost" if lost else "clean"
        assert cell["state"] == ("untested" if "q35 timeout=0.01" in name else expected), name
        if cell["state"] == "lost":
            assert cell["short"] == "LOST: device"
            assert cell["qemu_versions"][0].startswith(version)
            assert "lost at the dirty log" in cell["stories"][0]
    assert (
        "does not have this machine type"
        in cells["machine=toaster timeout=900 fault=none"]["message"]
    )
    untested = cells["machine=q35 timeout=0.01 fault=none"]["message"]
    assert "within 0.01 s" in untested
    assert untested in unescape(files["report"].read_text())
    assert files["tap"].read_text().count("# SKIP") == 4
    assert not tool.leftovers()

    again = tool.run("matrix", *axes, "--timeout=900", *options).report
    assert [cell["cached"] for cell in again["cells"]] == [True, True, False, False]
    counts = {state: number for state, number in again["counts"].items() if number}
    assert counts == {"clean": 1, "lost": 1, "skipped": 2}
    command = again["cells"][0]["command"]
    assert command[:2] == ["dmaproof", "prove"]
    assert f"--seed={cells['machine=q35 timeout=900 fault=drop-pages=0.01']['seed']}" in command


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_matrix_leaves_nothing_and_can_be_continued(
    tool: Tool, tmp_path: Path, how: signal.Signals
) -> None:
    cache = tmp_path / "cache"
    # The second cell would run for a long time.
    options = ["--jobs=1", f"--folder={cache}", *BARE]
    running = tool.start("matrix", "--requests-after=1000,1000000000", *options)
    running.wait_for_line("1/2")
    running.wait_for(lambda: len(descendants(running.process.pid)) >= 5, "the second cell")
    processes = descendants(running.process.pid)
    os.kill(running.process.pid, how)
    outcome = running.finish()
    assert outcome.exit_code == (-how if how == signal.SIGKILL else 3)
    assert "Traceback" not in outcome.errors
    deadline = time.monotonic() + TIMEOUT_S
    while tool.leftovers() or any(map(is_alive, processes)):
        assert time.monotonic() < deadline, tool.leftovers()
        time.sleep(0.05)
    assert {file.suffix for file in cache.iterdir()} == {".json", ""}
    report = tool.run("matrix", "--requests-after=1000", *options, "--json=-").report
    assert [cell["cached"] for cell in report["cells"]] == [True]


def test_the_shared_libraries_of_a_program_count_as_its_contents(tmp_path: Path) -> None:
    library, program = tmp_path / "libanswer.so", tmp_path / "program"
    source = tmp_path / "source.c"

    def compile_library(answer: int) -> None:
        source.write_text(f"int answer(void) {{ return {answer}; }}")
        compile_c([source], library, "-shared", "-fPIC")

    compile_library(1)
    source.write_text("int answer(void); int main(void) { return answer(); }")
    compile_c([source, library], program, f"-Wl,-rpath,{tmp_path}")
    before = ProgramFiles().contents([program])
    compile_library(2)
    after = ProgramFiles().contents([program])
    assert {file for file in after if after[file] != before[file]} == {str(library)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario=pigeon"], "pigeon"),
        (["--qemu=0.1"], "nor an available version; available: "),
        (["--fault=gremlins"], "gremlins"),
        (["/no/such/file.toml"], "No such file"),
    ],
)
def test_wrong_usage_is_reported_at_once(
    tool: Tool, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = tool.run("matrix", *arguments, f"--folder={tmp_path}", *BARE)
    assert (outcome.exit_code, outcome.output) == (2, "")
    assert message in outcome.errors
    assert not tool.leftovers()
