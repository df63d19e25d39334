"""What the documentation names is there: tests, proofs and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def text_of(*folders: str) -> str:
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", page.read_text()))
    tests = text_of("tests")
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_proofs_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"`((?:START|REPORT|HWPT|TYPE1|ITERATOR): [^`]+)`", page.read_text()))
    proofs = text_of("qmp_tools/passthrough")
    assert [name for name in named if f'"{name}"' not in proofs] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_this_test_finds_what_is_missing() -> None:
    assert "def test_that_is_nowhere(" not in text_of("qmp_tools")
    named = re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs" / "iterator.md").read_text())
    assert len(named) > 30
