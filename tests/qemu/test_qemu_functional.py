"""`check` in QEMU's own migration test, and in unittest with QEMU's Python classes."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.builds import installed
from support.qemu_source import qemu_source

SUITE = Path(__file__).parents[1] / "unittest_suite"
PATCH = SUITE / "qemu_functional.patch"
DOCS = Path(__file__).parents[2] / "docs" / "unittest.md"
SPOIL = SUITE / "spoil"
TEST = Path("tests/functional/test_migration.py")


@pytest.fixture(scope="module")
def source() -> Path:
    """Return a folder with QEMU's own tests and Python classes."""
    return qemu_source()


@pytest.fixture
def patched(source: Path, tmp_path: Path) -> Path:
    """Return a copy of `source` with the lines that the documentation shows."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    subprocess.run(["git", "apply", "--unidiff-zero", PATCH], cwd=copy, check=True)
    return copy


@dataclass(frozen=True)
class Result:
    """The exit code of a test's process, and all its output."""

    exit_code: int
    output: str

    def by_name(self) -> dict[str, str]:
        """Return 'ok', 'not ok' or 'skipped' for each test of TAP output."""
        lines = re.findall(r"^(ok|not ok) \d+ \S+\.(test_\w+)(.*)", self.output, re.MULTILINE)
        return {name: "skipped" if "# SKIP" in rest else result for result, name, rest in lines}


def run(folder: Path, test: Path, *python_path: Path, **environment: str) -> Result:
    """Run the file `test` by Python in `folder`."""
    done = subprocess.run(
        [sys.executable, test],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path)), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    return Result(done.returncode, done.stdout)


def run_qemus_test(folder: Path, source: Path, qemu: Path, *spoil: Path) -> Result:
    """Run QEMU's migration test in `source`; `folder` stands for the folder of QEMU's build."""
    (folder / "tests/functional").mkdir(parents=True)
    return run(
        folder,
        source / TEST,
        *(*spoil, source / "python", source / TEST.parent),
        QEMU_BUILD_ROOT=str(folder),
        QEMU_TEST_QEMU_BINARY=str(qemu),
    )


def test_three_lines_check_all_ram_in_qemus_migration_test(
    source: Path, patched: Path, tmp_path: Path
) -> None:
    if not installed(X86_64):  # QEMU before 9.0 may lose pages of this guest under TCG
        pytest.skip("needs a newer QEMU: dmaproof qemu fetch 11.1")
    qemu = installed(X86_64)[-1].path
    exec_result = "ok" if shutil.which("ncat") else "skipped"
    before, after = (each.joinpath(TEST).read_text().splitlines() for each in (source, patched))
    changed = [line for line in difflib.ndiff(before, after) if line[0] != " "]
    assert [line[0] for line in changed] == ["+", "+", "+"]

    unpatched = run_qemus_test(tmp_path / "before", source, qemu)
    passed = run_qemus_test(tmp_path / "after", patched, qemu)
    for result in (unpatched, passed):
        assert result.exit_code == 0, result.output
        assert result.by_name() == {
            "test_migration_with_tcp_localhost": "ok",
            "test_migration_with_unix": "ok",
            "test_migration_with_exec": exec_result,
        }, result.output

    spoiled = run_qemus_test(tmp_path / "spoiled", patched, qemu, SPOIL)
    assert spoiled.exit_code == 1, spoiled.output
    failed = [name for name, result in spoiled.by_name().items() if result == "not ok"]
    assert len(failed) == list(passed.by_name().values()).count("ok")
    assert spoiled.output.count("microvm.ram +0x200000 (GPA 0x200000)") == len(failed)


def test_the_documentation_shows_the_patch_that_is_tested() -> None:
    assert f"```diff\n{PATCH.read_text()}```\n" in DOCS.read_text()


def test_qemus_machine_class_is_checked_over_tcp_and_unix(source: Path, tmp_path: Path) -> None:
    require_pass_and_find(tmp_path, SUITE / "machine_migration.py", source / "python")


def test_the_clients_of_qemu_qmp_are_checked(tmp_path: Path) -> None:
    require_pass_and_find(tmp_path, SUITE / "qmp_migration.py")


def require_pass_and_find(folder: Path, test: Path, *python_path: Path) -> None:
    """Require that both tests in the file `test` pass, and fail if a byte is changed."""
    passed = run(folder, test, *python_path)
    assert passed.exit_code == 0, passed.output
    assert "Ran 2 tests" in passed.output
    spoiled = run(folder, test, SPOIL, *python_path)
    assert spoiled.exit_code == 1, spoiled.output
    assert "FAILED (failures=2)" in spoiled.output
    lines = [line.strip() for line in spoiled.output.splitlines()]
    assert lines.count("pc.ram +0x200000 (GPA 0x200000)") == 2, spoiled.output
