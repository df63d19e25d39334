"""The public names of dmaproof: they exist, they are cheap to import, and their examples work."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest

import dmaproof

PUBLIC = {name: getattr(dmaproof, name) for name in dmaproof.__all__}


def run(program: str) -> tuple[str, str]:
    """Standard output and error of a Python program that succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout, done.stderr


def test_type_checkers_and_programs_see_the_same_names() -> None:
    tree = ast.parse(Path(dmaproof.__file__).read_text())
    for_checkers = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for name in node.names
    }
    assert for_checkers == set(dmaproof.__all__)
    assert len(dmaproof.__all__) == len(set(dmaproof.__all__))
    assert {*dmaproof.__all__, "__version__"} <= set(dir(dmaproof))


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="'dmaproof' has no attribute 'IovaBitmaps'"):
        _ = dmaproof.IovaBitmaps  # type: ignore[attr-defined]


def test_the_package_and_its_errors_are_imported_without_numpy() -> None:
    told, _ = run(
        "import sys, dmaproof\n"
        "from dmaproof import UsageError\n"
        "print([name for name in ('numpy', 'importlib.metadata') if name in sys.modules])"
    )
    assert told == "[]\n"


def test_the_version_is_that_of_the_distribution() -> None:
    assert dmaproof.__version__ == metadata.version("dmaproof")


def test_a_plain_tree_without_metadata_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_metadata(distribution: str) -> NoReturn:
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "version", no_metadata)
    monkeypatch.setitem(vars(dmaproof), "__version__", "known already")
    monkeypatch.delitem(vars(dmaproof), "__version__")
    assert dmaproof.__version__ == "0+unknown"


def test_the_logger_is_silent_until_an_application_configures_it() -> None:
    warn = "import logging, dmaproof\nlogging.getLogger('dmaproof.part').warning('overflow')"
    assert run(warn) == ("", "")
    assert "overflow" in run(f"import logging\nlogging.basicConfig()\n{warn}")[1]


EXPLAINED = {"dmaproof": dmaproof} | {
    name: part for name, part in PUBLIC.items() if not isinstance(part, int)
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_examples_give_what_they_show(name: str) -> None:
    subject = EXPLAINED[name]
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(subject, name, module=False, globs=dict(PUBLIC)):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
