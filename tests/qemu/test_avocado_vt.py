"""check_migrations in tests that avocado-vt itself runs, with real QEMUs."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROVIDER = ROOT / "tests" / "avocado_vt_provider"
PAGE = ROOT / "docs" / "avocado-vt.md"
SPOILT_AT = 0x2345000


@dataclass(frozen=True)
class Result:
    """The outcome of a test: its status and reason, its log, and its report by name."""

    status: str
    reason: str
    log: str
    reports: dict[str, dict[str, Any]]


def run_tests(folder: Path, *words: str) -> dict[str, Result]:
    """Run tests of the provider in `folder`, and return their results by name."""
    done = subprocess.run(
        [sys.executable, str(PROVIDER / "run.py"), *words, "--json", str(folder / "results.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    output = done.stdout + done.stderr
    assert (folder / "results.json").exists(), output
    results = {}
    for test in json.loads((folder / "results.json").read_text())["tests"]:
        log = Path(test["logfile"])
        reports = {
            file.stem: json.loads(file.read_text()) for file in log.parent.glob("data/*.json")
        }
        status, reason = test["status"], test["fail_reason"]
        results[test["name"]] = Result(status, reason, log.read_text(), reports)
    return results


@pytest.fixture(scope="module", autouse=True)
def _prerequisites() -> None:
    missing = [
        remedy
        for is_there, remedy in (
            (importlib.util.find_spec("virttest"), "pip install 'dmaproof[avocado-vt]'"),
            (shutil.which("tcpdump"), "apt-get install tcpdump"),  # avocado-vt starts it
        )
        if not is_there
    ]
    if missing and os.environ.get("DMAPROOF_NO_SKIP") == "1":
        pytest.fail("; ".join(missing))
    if missing:
        pytest.skip("; ".join(missing))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of the provider's tests, run in one job."""
    tests = ("good.pingpong.checked", "spoilt.once.plain", "spoilt.once.checked")
    return run_tests(tmp_path_factory.mktemp("vt"), *tests)


def test_equal_ram_passes_in_each_migration_and_the_guest_continues(
    results: dict[str, Result],
) -> None:
    # The provider's test fails if the guest does not continue.
    result = results["good.pingpong.checked"]
    assert result.status == "PASS", result.log
    assert result.reports.keys() == {"ram", "ram-2"}
    pids = set()
    for report in result.reports.values():
        assert report["exit_code"] == 0
        assert report["pages"] >= (64 << 20) // 4096
        pids |= {report["source"]["pid"], report["destination"]["pid"]}
    assert len(pids) == 3, "the destination of the first migration is the source of the second"


def test_a_changed_byte_fails_the_test_with_the_page_named(results: dict[str, Result]) -> None:
    result = results["spoilt.once.checked"]
    assert result.status == "FAIL", result.log
    assert "1 of 16448 pages differ" in result.reason
    assert f"(GPA {SPOILT_AT:#x})" in result.reason
    (difference,) = result.reports["ram"]["differences"]
    assert difference["gpa"] == SPOILT_AT
    after = result.log.partition("1 of 16448 pages differ")[2]
    assert '{"execute": "cont"' in after, "the guest of the destination continues"


def test_a_test_without_dmaproof_is_as_before(results: dict[str, Result]) -> None:
    result = results["spoilt.once.plain"]
    assert result.status == "PASS", result.log
    assert not result.reports


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_a_hook_checks_a_test_that_is_not_changed(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("vt")
    (hook,) = python_blocks(PAGE.read_text())
    (folder / "check_migrations.py").write_text(hook)
    option = f"test_pre_hook={folder / 'check_migrations.py'}"
    results = run_tests(folder, "spoilt.once.plain", "--vt-extra-params", option)
    result = results["spoilt.once.plain"]
    assert result.status == "FAIL", result.log
    assert f"(GPA {SPOILT_AT:#x})" in result.reason


def test_the_docs_show_the_whole_change_to_a_test() -> None:
    plain, checked = (
        (PROVIDER / "qemu" / "tests" / f"{name}.py").read_text().splitlines()
        for name in ("migration_without_os", "migration_without_os_checked")
    )
    lines = list(difflib.unified_diff(plain, checked, n=1, lineterm=""))[2:]
    added = [line for line in lines if line.startswith("+")]
    assert len(added) <= 3
    assert not [line for line in lines if line.startswith("-")]
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in lines]
