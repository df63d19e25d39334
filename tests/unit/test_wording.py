"""No text of the project uses the idioms of ``tests/wording.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
WORDING: Final = ROOT / "tests" / "wording.toml"
FOLDERS: Final = ("docs", "guests", "plugin", "qmp_tools", "tests")
SUFFIXES: Final = {".c", ".h", ".j2", ".json", ".md", ".py", ".pyi", ".S", ".svg", ".toml"}
EXCEPT: Final = {WORDING, Path(__file__), ROOT / "CHANGELOG.md"}
"""They name what was renamed."""
GAP: Final = r"""(?:[ \t]|["'`*_]*\s*\n[ \t]*(?:[#*]|//)?[ \t]*[rbf]?["'`*_]*)+"""
"""Between two words of a text: spaces, or the end of a line with what begins the next one."""


def idioms() -> list[tuple[re.Pattern[str], str]]:
    """What to look for, and what to write instead."""
    found = tomllib.loads(WORDING.read_text())["idiom"]
    return [(re.compile(each["never"].replace(" ", GAP), re.I), each["instead"]) for each in found]


def texts() -> Iterator[tuple[Path, str]]:
    """Every file with text of the project, and the text."""
    files = [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "meson.build"]
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*")
    for file in files:
        if file.suffix in SUFFIXES and file not in EXCEPT and "build" not in file.parts:
            yield file, file.read_text()


def found_in(text: str) -> list[str]:
    """'LINE: IDIOM → WHAT TO WRITE' for each idiom in the text."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())} → {instead}"
        for never, instead in idioms()
        for match in never.finditer(text)
    ]


def test_no_text_uses_an_idiom_that_its_reader_would_have_to_decode() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{idiom}" for file, text in texts() for idiom in found_in(text)
    ]
    assert not found, "\n".join(found)


def test_an_idiom_is_found_across_the_lines_of_a_comment_and_of_a_string() -> None:
    assert found_in("# The guest stands\n    # still.\n") == ["1: stands # still → is paused"]
    assert found_in('f"the guest stands "\n    f"still"') == ['1: stands " f"still → is paused']
    assert found_in("The guest is paused.\n") == []
