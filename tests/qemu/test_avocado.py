"""The avocado suite on real QEMU, run by avocado itself: its results are read, and its files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.qemu

SUITE = Path(__file__).parents[1] / "avocado_suite"
DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Job:
    """An avocado run: its exit code, and what it tells of each test."""

    exit_code: int
    tests: list[dict[str, Any]]

    def files(self, test: int = 0) -> Path:
        """The output folder of a test."""
        return Path(self.tests[test]["logdir"]) / "data"

    def log(self, test: int = 0) -> str:
        """What a test has logged."""
        return Path(self.tests[test]["logfile"]).read_text()


@dataclass
class Avocado:
    """Runs tests of the suite with a temporary folder of their own."""

    scratch: Path
    results: Path

    def run(self, test: str, *options: str, **environment: str) -> Job:
        """Run the file `test`."""
        command = [sys.executable, "-m", "avocado", "run", str(SUITE / test), *options]
        command += ["--job-results-dir", str(self.results), "--disable-sysinfo", "--json", "-"]
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(self.scratch), **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.stdout, done.stderr
        return Job(done.returncode, json.loads(done.stdout)["tests"])


@pytest.fixture
def avocado(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Avocado:
    """Avocado, if it is here."""
    if importlib.util.find_spec("avocado") is None:
        if os.environ.get("DMAPROOF_NO_SKIP") == "1":
            pytest.fail("avocado is not here: pip install 'dmaproof[avocado]'")
        pytest.skip("avocado is not here: pip install 'dmaproof[avocado]'")
    monkeypatch.delenv("DMAPROOF_NO_SKIP", raising=False)
    return Avocado(tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("results"))


def no_runs_left(avocado: Avocado) -> bool:
    return not [*avocado.scratch.glob("dmaproof-*"), *avocado.scratch.glob(".dmaproof-*")]


def test_a_pass_and_its_files(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "guest=bare", "-p", "seed=1")
    assert [test["status"] for test in job.tests] == ["PASS"], job.log()
    assert job.exit_code == 0
    assert json.loads((job.files() / "proof.json").read_text())["exit_code"] == 0
    names = {file.name for file in job.files().iterdir()}
    assert names >= {"ram.json", "ram.html", "proof.html", "source-qemu.log", "device.log"}
    assert "every page equal" in job.log()
    assert no_runs_left(avocado)


def test_a_planted_fault_fails_with_each_pages_story(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "guest=bare", "-p", "fault=drop-pages=0.01")
    assert [test["status"] for test in job.tests] == ["FAIL"]
    assert job.exit_code == 1
    assert "pages were lost" in job.tests[0]["fail_reason"]
    story = r"GPA 0x[0-9a-f]+: \d+ bytes differ; request \d+ on queue \d .*; lost at the log"
    assert re.search(story, job.log())
    assert no_runs_left(avocado)


def test_the_existing_test_with_three_more_lines(avocado: Avocado) -> None:
    assert (SUITE / "existing_migration.py").read_text().count("# added\n") == 3
    job = avocado.run("existing_migration.py")
    assert [test["status"] for test in job.tests] == ["PASS"], job.log()
    job = avocado.run("existing_migration.py", "-p", "spoil=0x2345000")
    assert [test["status"] for test in job.tests] == ["FAIL"]
    assert "GPA 0x2345000" in job.log()
    (difference,) = json.loads((job.files() / "ram.json").read_text())["differences"]
    assert difference["gpa"] == 0x2345000


def test_the_page_shows_the_three_lines_as_they_are() -> None:
    shown = (DOCS / "avocado.md").read_text()
    for line in (SUITE / "existing_migration.py").read_text().splitlines():
        assert not line.endswith("# added") or line in shown
    assert (SUITE / "matrix.yaml").read_text().split("\n", 1)[1] in shown


def test_a_varianter_file_makes_a_matrix(avocado: Avocado) -> None:
    options = ("-m", str(SUITE / "matrix.yaml"), "--max-parallel-tasks", "1")
    job = avocado.run("disk.py", *options)
    assert [test["status"] for test in job.tests] == ["PASS"] * 4
    setups = [json.loads((job.files(i) / "proof.json").read_text())["setup"] for i in range(4)]
    trackers, harvests = ("iommu", "address-queue"), ("0.05", "final")
    assert {(it["tracker"], it["harvest"]) for it in setups} == {*product(trackers, harvests)}


def test_cancelled_with_the_remedy_where_something_is_missing(avocado: Avocado) -> None:
    empty = {"PATH": "/nowhere", "XDG_DATA_HOME": "/nowhere"}
    job = avocado.run("disk.py", "-p", "guest=bare", **empty)
    assert [test["status"] for test in job.tests] == ["CANCEL"]
    assert "apt-get install qemu-system-x86" in job.log()
    job = avocado.run("disk.py", "-p", "guest=bare", **empty, DMAPROOF_NO_SKIP="1")
    assert [test["status"] for test in job.tests] == ["ERROR"]
    assert "apt-get install qemu-system-x86" in job.tests[0]["fail_reason"]
    assert no_runs_left(avocado)


def test_a_parameter_that_is_wrong_is_an_error(avocado: Avocado) -> None:
    job = avocado.run("disk.py", "-p", "tracker=none-such")
    assert [test["status"] for test in job.tests] == ["ERROR"]
    assert "none-such" in job.tests[0]["fail_reason"]
