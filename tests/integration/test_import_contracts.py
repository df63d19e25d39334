"""The import contracts of pyproject.toml: they hold, and notice an import that breaks one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = {"dmaproof": ROOT / "plugin" / "dmaproof", "qmp_tools": ROOT / "qmp_tools"}
CHECK: Final = "from importlinter.cli import lint_imports_command as run; run()"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of both packages and the contracts."""
    pytest.importorskip("importlinter")
    for name, folder in PACKAGES.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    """Run import-linter in a copy; return its exit code and its output, in unbroken lines."""
    done = subprocess.run(
        # -S, so that no hook of an editable installation hides the copy.
        [sys.executable, "-S", "-c", CHECK, "--no-cache"],
        cwd=tree,
        env={
            **os.environ,
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join((str(tree), sysconfig.get_path("purelib"))),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold(tree: Path) -> None:
    code, printed = lint(tree)
    assert code == 0, printed
    assert "0 broken" in printed


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("qmp_tools.host.timeout", "qmp_tools.cli.main"),
        ("dmaproof.units", "qmp_tools.exit_codes"),
        ("dmaproof.guest_memory", "dmaproof.devices.blk"),
        ("dmaproof.vhost_user.server", "dmaproof.faults.log"),
    ],
)
def test_an_import_from_a_higher_layer_breaks_a_contract(
    tree: Path, importer: str, imported: str
) -> None:
    module = tree.joinpath(*importer.split(".")).with_suffix(".py")
    module.write_text(f"{module.read_text()}\nimport {imported}\n")
    code, printed = lint(tree)
    assert code == 1, printed
    assert f"{importer} -> {imported}" in printed
