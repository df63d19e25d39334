"""The public names of both packages: they exist, are fast to import, and their examples work."""

from __future__ import annotations

import ast
import doctest
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

import dmaproof
import qmp_tools

PUBLIC = {name: getattr(dmaproof, name) for name in dmaproof.__all__}


@pytest.mark.parametrize("package", [dmaproof, qmp_tools], ids=lambda package: package.__name__)
def test_type_checkers_and_programs_see_the_same_names(package: ModuleType) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())
    for_checkers = {
        name.name
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert for_checkers == set(package.__all__)
    assert len(package.__all__) == len(set(package.__all__))
    assert {*package.__all__, "__version__"} <= set(dir(package))
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def test_a_private_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="'dmaproof' has no attribute 'IovaBitmaps'"):
        _ = dmaproof.IovaBitmaps  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution() -> None:
    assert dmaproof.__version__ == qmp_tools.__version__ == metadata.version("dmaproof")


def test_a_plain_tree_without_metadata_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_metadata(distribution: str) -> NoReturn:
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "version", no_metadata)
    monkeypatch.setitem(vars(dmaproof), "__version__", "known already")
    monkeypatch.delitem(vars(dmaproof), "__version__")
    assert dmaproof.__version__ == "0+unknown"


EXPLAINED = {"dmaproof": dmaproof} | {
    name: part for name, part in PUBLIC.items() if not isinstance(part, int)
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_the_examples_in_docstrings_work(name: str) -> None:
    subject = EXPLAINED[name]
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(subject, name, module=False, globs=dict(PUBLIC)):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
